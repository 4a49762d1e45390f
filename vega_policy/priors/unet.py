"""Stable Diffusion 2.1 and Stable Video Diffusion as priors: one noised latent, read on the way down.

Layers of both UNets: the output of down block 0 to 3 (3 is what enters the mid block), and 4, the output of
the mid block. Everything behind the layer that is read is dropped.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.schedulers import DDIMScheduler
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize
from vega_policy.priors.base import BasePrior, check_layer, drop_modules, empty_prompt
from vega_policy.run_dir import read_json

FPS, MOTION_BUCKET, AUGMENTATION = 7, 127, 0.02
"""Conditions of Stable Video Diffusion, diffusers' defaults; the network takes FPS - 1."""

SMALLEST_SIGMA, LARGEST_SIGMA = 0.002, 700.0
"""Range of Stable Video Diffusion's training noise; its ends stand for noise levels 0 and 1."""


class UNetPrior(BasePrior):
    """The way down through a UNet, cut at the layer that is read."""

    vae: Any
    unet: Any

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae, unet = parts["vae"], parts["unet"]
        count = len(unet.down_blocks)
        layer = check_layer(config, count + 1, "read-outs")
        unet.down_blocks, unet.up_blocks = unet.down_blocks[: layer + 1], nn.ModuleList()
        drop_modules(unet, "conv_norm_out", "conv_act", "conv_out", *(["mid_block"] if layer < count else []))
        drop_modules(vae, "decoder", "post_quant_conv")
        downs = sum(block.downsamplers is not None for block in unet.down_blocks)
        super().__init__(config, grid, fingerprint, 2 ** (len(vae.config.block_out_channels) - 1 + downs))
        self.vae, self.unet = vae, unet
        self.width: int = unet.config.block_out_channels[min(layer, count - 1)]

    def run_blocks(self, hidden: Tensor, embedded: Tensor, context: Tensor, **options: Any) -> Tensor:
        """Run the blocks, [n c h w] with time embedding [n d_time] and context [n m c'] -> [n d gh gw]."""
        for block in self.unet.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            attended = {"encoder_hidden_states": context} if attends else {}
            hidden = block(hidden, embedded, **attended, **options)[0]
        if self.unet.mid_block is None:
            return hidden
        return self.unet.mid_block(hidden, embedded, encoder_hidden_states=context, **options)


class StableDiffusion(UNetPrior):
    """Stable Diffusion 2.1 on single frames, for the empty prompt.

    The noise level t selects index round(1000 t) of the checkpoint's own schedule.
    """

    networks: ClassVar = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
    other_folders = ("scheduler",)
    prompt: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        """`parts` also hold `prompt` [n d_text] with padding, and `schedule`, cumulative alphas [1000]."""
        super().__init__(parts, config, grid, fingerprint)
        prompt, schedule = parts["prompt"], parts["schedule"]
        self.index = min(round(1000 * self.noise_level), len(schedule) - 1)
        self.signal: float = schedule[self.index].item()
        self.register_buffer("prompt", prompt[None])
        if config.engine != "plain":
            like = torch.zeros(1, dtype=self.unet.dtype, device=prompt.device)
            fix_time(self.unet, self.embed_time(like)[0])
            fix_prompt(self.unet, prompt)

    @classmethod
    def load_inputs(cls, config: PriorConfig, folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
        """Load the empty prompt and the schedule."""
        schedule = read_json(folder / "scheduler" / "scheduler_config.json")
        fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        scheduler = DDIMScheduler(**{key: schedule[key] for key in fields if key in schedule})
        width = parts["unet"].config.cross_attention_dim
        prompt = empty_prompt(config, folder, width, encode_empty_prompt)
        return {"prompt": prompt, "schedule": scheduler.alphas_cumprod}

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        latent = latent_mean(self.vae, clips[:, 0]) * self.vae.config.scaling_factor
        noise = self.noise(latent, generator)
        noisy = (self.signal**0.5 * latent + (1 - self.signal) ** 0.5 * noise).to(self.unet.dtype)
        prompt = self.prompt.to(noisy).expand(len(noisy), -1, -1)
        return self.run_blocks(self.unet.conv_in(noisy), self.embed_time(noisy), prompt)[:, None]

    def embed_time(self, latent: Tensor) -> Tensor:
        """Embed the noise level in the latent's type, [n ...] -> [n d_time]."""
        time = self.unet.time_proj(torch.full((len(latent),), self.index, device=latent.device))
        return self.unet.time_embedding(time.to(latent))


class StableVideoDiffusion(UNetPrior):
    """Stable Video Diffusion on clips, with noise sigma = t / (1 - t).

    As in image-to-video, each frame's clean latent fills the conditioning channels, and cross-attention reads
    the first frame's CLIP embedding.
    """

    networks: ClassVar = {
        "vae": AutoencoderKLTemporalDecoder,
        "unet": UNetSpatioTemporalConditionModel,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    image_encoder: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(parts, config, grid, fingerprint)
        self.image_encoder, unet, level = parts["image_encoder"], self.unet, self.noise_level
        self.sigma = LARGEST_SIGMA if level == 1 else min(level / (1 - level), LARGEST_SIGMA)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD)[:, None, None])
        if config.engine != "plain":
            fix_time(unet, self.embed_conditions(torch.zeros(1, dtype=unet.dtype, device=unet.device))[0])
            fix_single_token(unet)

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of every frame of each clip, [n t 3 h w] in [0, 1] -> [n t d gh gw]."""
        batch, times = clips.shape[:2]
        augmented = clips + AUGMENTATION / 2 * self.noise(clips, generator)  # 0.02 in the range [-1, 1]
        frames = torch.cat([clips, augmented]).flatten(0, 1)
        latent, condition = latent_mean(self.vae, frames).unflatten(0, (-1, times)).chunk(2)
        latent = latent * self.vae.config.scaling_factor
        noisy = latent + self.sigma * self.noise(latent, generator)
        scaled = noisy / (self.sigma**2 + 1) ** 0.5
        sample = torch.cat([scaled, condition], dim=2).to(self.unet.dtype)  # [n t 8 h w]
        embedded = repeat(self.embed_conditions(sample), "n d -> (n t) d", t=times)
        image = repeat(self.embed_image(clips[:, 0]).to(sample), "n l d -> (n t) l d", t=times)
        is_video = sample.new_zeros(batch, times)
        hidden = self.unet.conv_in(sample.flatten(0, 1))
        hidden = self.run_blocks(hidden, embedded, image, image_only_indicator=is_video)
        return rearrange(hidden, "(n t) d h w -> n t d h w", t=times)

    def embed_image(self, images: Tensor) -> Tensor:
        """Return CLIP's embedding of images, [n 3 h w] in [0, 1] -> [n 1 d]."""
        side = self.image_encoder.config.image_size
        pixels = (resize(images, side, side) - self.mean) / self.std
        return self.image_encoder(pixels.to(self.image_encoder.dtype)).image_embeds[:, None]

    def embed_conditions(self, sample: Tensor) -> Tensor:
        """Embed noise level, frame rate and motion in the sample's type, [n ...] -> [n d_time]."""
        unet, batch = self.unet, len(sample)
        # the continuous time of the scheduler of the checkpoint, EulerDiscreteScheduler
        time = sample.new_full((batch,), max(self.sigma, SMALLEST_SIGMA), dtype=torch.float32).log() / 4
        conditions = sample.new_tensor([FPS - 1, MOTION_BUCKET, AUGMENTATION], dtype=torch.float32)
        added = unet.add_time_proj(conditions).flatten().expand(batch, -1)
        return unet.time_embedding(unet.time_proj(time).to(sample)) + unet.add_embedding(added.to(sample))


def latent_mean(vae: Any, images: Tensor) -> Tensor:
    """Return the unscaled mean of an image VAE, [n 3 h w] in [0, 1] -> [n z h/8 w/8] float32."""
    return vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()


def encode_empty_prompt(folder: Path) -> Tensor:
    """Run a checkpoint's tokenizer and CLIP text encoder on "", -> [77 d] float32, padding included."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    text_encoder = folder / "text_encoder"
    encoder = CLIPTextModel.from_pretrained(text_encoder, dtype=torch.float32, use_safetensors=True).eval()
    length = encoder.config.max_position_embeddings
    tokens = tokenizer([""], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state[0].contiguous()


# Exact reductions: with one noise level and one prompt, parts of the UNet are constants.


class Constant(nn.Module):
    """A layer whose result `value` for one sample is known, for any number of samples."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the value for each leading index of the layer's input."""
        return self.value.expand(*x.shape[: x.ndim - self.value.ndim], *self.value.shape)


class SingleToken(nn.Module):
    """Cross-attention to one token: its value behind the output projection, at every position."""

    value: Any
    out: Any

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.value, self.out = attention.to_v, attention.to_out

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Attend from tokens [b n d] to one token [b 1 c] -> [b n d]; refuse more than one."""
        if encoder_hidden_states.shape[1] != 1:
            raise ValueError(
                f"This cross-attention was reduced to a single token; got {encoder_hidden_states.shape[1]}. "
                "Take prior.engine=plain."
            )
        mixed = self.value(encoder_hidden_states)
        for layer in self.out:
            mixed = layer(mixed)
        return mixed.expand(-1, tokens.shape[1], -1)


@torch.no_grad()
def fix_time(unet: nn.Module, embedded: Tensor) -> int:
    """Replace every projection of the time embedding [d] by its result, in place; return their number."""
    blocks: list[Any] = [
        block for block in unet.modules() if isinstance(getattr(block, "time_emb_proj", None), nn.Linear)
    ]
    for block in blocks:
        projection = block.time_emb_proj
        block.time_emb_proj = Constant(projection(block.nonlinearity(embedded.to(projection.weight))))
    return len(blocks)


@torch.no_grad()
def fix_prompt(unet: nn.Module, prompt: Tensor) -> int:
    """Replace keys and values of cross-attentions to a prompt [m c] by results; return their number."""
    attentions: list[Any] = [
        part for part in unet.modules() if isinstance(part, Attention) and part.is_cross_attention
    ]
    for attention in attentions:
        words = prompt.to(attention.to_k.weight)
        attention.to_k, attention.to_v = Constant(attention.to_k(words)), Constant(attention.to_v(words))
    return len(attentions)


def fix_single_token(unet: nn.Module) -> int:
    """Replace every cross-attention by what it is on a single token, in place; return their number."""
    children = [(parent, *child) for parent in unet.modules() for child in parent.named_children()]
    attentions = [
        (parent, name, child)
        for parent, name, child in children
        if isinstance(child, Attention) and child.is_cross_attention
    ]
    for parent, name, attention in attentions:
        setattr(parent, name, SingleToken(attention))
    return len(attentions)
