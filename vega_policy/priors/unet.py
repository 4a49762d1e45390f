"""Stable Diffusion 2.1 and Stable Video Diffusion as priors: one noised latent, read on the way down.

Read-outs of both UNets: the output of down block 0 to 3 (3 is what enters the mid block), and 4, the mid
block's. Nothing behind the read-out is kept.
"""

import json
from pathlib import Path
from typing import Any

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
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import PriorReader, check_layer, drop_rest, fitting_size
from vega_policy.priors.weights import (
    check_class,
    empty_prompt,
    fingerprint_files,
    load_part,
    locate,
    way_out,
)


class Constant(nn.Module):
    """Stands in for a layer whose result is known, for any number of samples.

    Args:
        value: The result for one sample, without its leading axes.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The value, once for each leading index of what the layer is given."""
        return self.value.expand(*x.shape[: x.ndim - self.value.ndim], *self.value.shape)


class SingleToken(nn.Module):
    """Cross-attention to one token: its value behind the output projection, at every place.

    Args:
        attention: The cross-attention.
    """

    value: Any
    out: Any

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.value, self.out = attention.to_v, attention.to_out

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Tokens [b n d] and what they attend to, [b 1 c] -> [b n d].

        Raises:
            ValueError: If there is more than one token to attend to.
        """
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
    """Replace the time projection of every residual block by its result, in place.

    Args:
        unet: The UNet, cut behind its read-out.
        embedded: Time embedding [d] of the one noise level.

    Returns:
        How many there were.
    """
    blocks: list[Any] = [
        block for block in unet.modules() if isinstance(getattr(block, "time_emb_proj", None), nn.Linear)
    ]
    for block in blocks:
        projection = block.time_emb_proj
        block.time_emb_proj = Constant(projection(block.nonlinearity(embedded.to(projection.weight))))
    return len(blocks)


@torch.no_grad()
def fix_prompt(unet: nn.Module, prompt: Tensor) -> int:
    """Replace keys and values of every cross-attention to a constant prompt by their results, in place.

    Args:
        unet: The UNet, cut behind its read-out.
        prompt: The prompt's embedding with its padding, [m c].

    Returns:
        How many there were.
    """
    attentions: list[Any] = [
        part for part in unet.modules() if isinstance(part, Attention) and part.is_cross_attention
    ]
    for attention in attentions:
        words = prompt.to(attention.to_k.weight)
        attention.to_k, attention.to_v = Constant(attention.to_k(words)), Constant(attention.to_v(words))
    return len(attentions)


def fix_single_token(unet: nn.Module) -> int:
    """Replace every cross-attention by what it is on a single token, in place; returns their number."""
    places = [
        (parent, name, child)
        for parent in unet.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention) and child.is_cross_attention
    ]
    for parent, name, attention in places:
        setattr(parent, name, SingleToken(attention))
    return len(places)


FPS, MOTION_BUCKET, AUGMENTATION = 7, 127, 0.02
"""Conditions of Stable Video Diffusion, diffusers' defaults; the network is told FPS - 1."""

LARGEST_SIGMA = 700.0
"""Where Stable Video Diffusion's noise ends; stands for noise level 1."""


def _stop_at(unet: Any, layer: int) -> int:
    """Drop what lies behind a read-out; returns its stride in latent pixels."""
    downs = len(unet.down_blocks)
    unet.down_blocks = unet.down_blocks[: layer + 1]
    unet.up_blocks = torch.nn.ModuleList()
    drop_rest(unet, "conv_norm_out", "conv_act", "conv_out")
    if layer < downs:
        unet.mid_block = None
    return 2 ** sum(block.downsamplers is not None for block in unet.down_blocks)


class StableDiffusion(PriorReader):
    """Stable Diffusion 2.1 on single pictures: the tensor that enters the mid block, for the empty prompt.

    The noise level t selects index round(1000 t) of the checkpoint's own schedule.

    Args:
        parts: `vae` (its decoder is dropped), `unet` and `schedule`, the cumulative alphas [1000].
        prompt: Embedding of the empty prompt with its padding, [n d_text].
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.

    Raises:
        ValueError: If the UNet has no such layer or frames cannot have the size asked for.
    """

    vae: Any
    unet: Any
    prompt: Tensor

    def __init__(
        self,
        parts: dict[str, Any],
        prompt: Tensor,
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
    ) -> None:
        vae, unet = parts["vae"], parts["unet"]
        layer = check_layer(config, len(unet.down_blocks) + 1, "read-outs")
        stride = _latent_stride(vae) * _stop_at(unet, layer)
        super().__init__(config, grid, fitting_size(config, grid, stride), fingerprint)
        self.vae, self.unet = vae, unet
        drop_rest(vae, "decoder", "post_quant_conv")
        self.width: int = unet.config.block_out_channels[min(layer, len(unet.down_blocks) - 1)]
        self.index = min(round(1000 * self.noise_level), len(parts["schedule"]) - 1)
        self.signal: float = parts["schedule"][self.index].item()
        self.register_buffer("prompt", prompt[None])
        if config.engine != "plain":
            fix_time(unet, self.embed_time(torch.zeros(1, dtype=unet.dtype, device=prompt.device))[0])
            fix_prompt(unet, prompt)

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        latent = clean_latent(self.vae, clips[:, 0]) * self.vae.config.scaling_factor
        noise = self.noise(latent, generator)
        noisy = (self.signal**0.5 * latent + (1 - self.signal) ** 0.5 * noise).to(self.unet.dtype)
        return self.read(noisy)[:, None]

    def read(self, latent: Tensor) -> Tensor:
        """The UNet down to the read-out, noised latent [n 4 h w] -> [n d gh gw]."""
        unet, embedded = self.unet, self.embed_time(latent)
        prompt = self.prompt.to(latent).expand(len(latent), -1, -1)
        sample = unet.conv_in(latent)
        for block in unet.down_blocks:
            words = {"encoder_hidden_states": prompt} if _attends(block) else {}
            sample = block(sample, embedded, **words)[0]
        return sample if unet.mid_block is None else unet.mid_block(sample, embedded, prompt)

    def embed_time(self, latent: Tensor) -> Tensor:
        """Time embedding of the noise level in the latent's type, [n ...] -> [n d]."""
        time = self.unet.time_proj(torch.full((len(latent),), self.index, device=latent.device))
        return self.unet.time_embedding(time.to(latent))


class StableVideoDiffusion(PriorReader):
    """Stable Video Diffusion on clips; its noise is chosen by sigma = t / (1 - t).

    Each frame's clean latent stands in the conditioning channels, the first frame's CLIP embedding in
    cross-attention, as in image-to-video.

    Args:
        parts: `vae` (its decoder is dropped), `unet`, `image_encoder`.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.

    Raises:
        ValueError: If the UNet has no such layer or frames cannot have the size asked for.
    """

    vae: Any
    unet: Any
    image_encoder: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae, unet = parts["vae"], parts["unet"]
        layer = check_layer(config, len(unet.down_blocks) + 1, "read-outs")
        stride = _latent_stride(vae) * _stop_at(unet, layer)
        super().__init__(config, grid, fitting_size(config, grid, stride), fingerprint)
        self.vae, self.unet, self.image_encoder = vae, unet, parts["image_encoder"]
        drop_rest(vae, "decoder")
        self.width: int = unet.config.block_out_channels[min(layer, len(unet.down_blocks) - 1)]
        level = self.noise_level
        self.sigma = LARGEST_SIGMA if level == 1 else min(level / (1 - level), LARGEST_SIGMA)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD)[:, None, None])
        if config.engine != "plain":
            fix_time(unet, self.embed_time(torch.zeros(1, dtype=unet.dtype, device=unet.device))[0])
            fix_single_token(unet)

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of every frame of each clip, [n t 3 h w] in [0, 1] -> [n t d gh gw]."""
        times = clips.shape[1]
        augmented = clips + AUGMENTATION / 2 * self.noise(clips, generator)  # 0.02 in the range [-1, 1]
        pictures = torch.cat([clips, augmented]).flatten(0, 1)
        latent, condition = clean_latent(self.vae, pictures).unflatten(0, (-1, times)).chunk(2)
        latent = latent * self.vae.config.scaling_factor
        noisy = latent + self.sigma * self.noise(latent, generator)
        scaled = noisy / (self.sigma**2 + 1) ** 0.5
        sample = torch.cat([scaled, condition], dim=2).to(self.unet.dtype)  # [n t 8 h w]
        return self.read(sample, self.embed_picture(clips[:, 0]))

    def embed_picture(self, pictures: Tensor) -> Tensor:
        """CLIP's embedding of pictures, [n 3 h w] in [0, 1] -> [n 1 d]."""
        side = self.image_encoder.config.image_size
        pixels = (resize(pictures, side, side) - self.mean) / self.std
        return self.image_encoder(pixels.to(self.image_encoder.dtype)).image_embeds[:, None]

    def read(self, sample: Tensor, picture: Tensor) -> Tensor:
        """The UNet down to the read-out, [n t 8 h w], picture embedding [n 1 c] -> [n t d gh gw]."""
        unet, (batch, times) = self.unet, sample.shape[:2]
        embedded = self.embed_time(sample)
        embedded = repeat(embedded, "n d -> (n t) d", t=times)
        picture = repeat(picture.to(sample), "n l d -> (n t) l d", t=times)
        only_pictures = sample.new_zeros(batch, times)
        hidden = unet.conv_in(sample.flatten(0, 1))
        for block in unet.down_blocks:
            seen = {"encoder_hidden_states": picture} if _attends(block) else {}
            hidden = block(hidden, embedded, image_only_indicator=only_pictures, **seen)[0]
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, embedded, picture, only_pictures)
        return rearrange(hidden, "(n t) d h w -> n t d h w", t=times)

    def embed_time(self, sample: Tensor) -> Tensor:
        """Embedding of noise level, frame rate and motion in the sample's type, [n ...] -> [n d]."""
        unet, batch = self.unet, len(sample)
        # the scheduler's continuous time of a noise level; the smallest of its training stands for 0
        time = sample.new_full((batch,), max(self.sigma, 0.002), dtype=torch.float32).log() / 4
        conditions = sample.new_tensor([FPS - 1, MOTION_BUCKET, AUGMENTATION], dtype=torch.float32)
        added = unet.add_time_proj(conditions).flatten().expand(batch, -1)
        return unet.time_embedding(unet.time_proj(time).to(sample)) + unet.add_embedding(added.to(sample))


def clean_latent(vae: Any, pictures: Tensor) -> Tensor:
    """Mean of an image VAE's posterior, not yet scaled, [n 3 h w] in [0, 1] -> [n z h/8 w/8] float32."""
    return vae.encode((2 * pictures - 1).to(vae.dtype)).latent_dist.mode().float()


def _latent_stride(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _attends(block: Any) -> bool:
    return hasattr(block, "has_cross_attention") and block.has_cross_attention


def load_sd(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> StableDiffusion:
    """Load Stable Diffusion from a folder in the hub's layout or from the hub.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture or the layer does not exist.
    """
    source = str(config.path)
    folder = locate(source, config.revision, ["vae", "unet", "scheduler"], way_out(entry))
    check_class(folder / "vae", "AutoencoderKL")
    check_class(folder / "unet", "UNet2DConditionModel")
    betas = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    wanted = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    schedule = DDIMScheduler(**{key: betas[key] for key in wanted if key in betas})
    parts = {
        "vae": load_part(AutoencoderKL, folder / "vae", config),
        "unet": load_part(UNet2DConditionModel, folder / "unet", config),
        "schedule": schedule.alphas_cumprod,
    }
    width = parts["unet"].config.cross_attention_dim
    prompt = empty_prompt(source, folder, config.revision, config.prompt_file, width, encode_empty_prompt)
    return StableDiffusion(parts, prompt, config, grid, fingerprint_files(folder, ["vae", "unet"]))


def encode_empty_prompt(folder: Path) -> Tensor:
    """Run the checkpoint's tokenizer and CLIP text encoder on "", -> [77 d] float32, padding included."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    length = encoder.config.max_position_embeddings
    words = tokenizer([""], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(words.input_ids).last_hidden_state[0].contiguous()


def load_svd(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> StableVideoDiffusion:
    """Load Stable Video Diffusion from a folder in the hub's layout or from the hub.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture or the layer does not exist.
    """
    classes = {
        "vae": AutoencoderKLTemporalDecoder,
        "unet": UNetSpatioTemporalConditionModel,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    folder = locate(str(config.path), config.revision, list(classes), way_out(entry))
    for part, cls in classes.items():
        check_class(folder / part, cls.__name__)
    parts = {part: load_part(cls, folder / part, config) for part, cls in classes.items()}
    return StableVideoDiffusion(parts, config, grid, fingerprint_files(folder, list(classes)))
