"""Wan as a latent world simulator: one noised latent, read at a middle block (VEGA-3D, arXiv 2603.19235).

    z0 = normalised VAE mean        z = (1 - t) z0 + t noise        feature = blocks[layer](z, 1000 t, "")

Networks are diffusers' own; blocks after the one that is read are dropped when the prior is built. This file
is the plain path; `wan_fast` computes the same features faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, UMT5EncoderModel

from vega_policy import resource
from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import PROMPT_LENGTH, BasePrior, check_layer, empty_prompt, fingerprint_seed
from vega_policy.priors.wan_fast import Engine, make_engine


class LatentWorldSimulator(BasePrior):
    """A frozen Wan video diffusion model, read at one block and one noise level."""

    networks: ClassVar = {"vae": AutoencoderKLWan, "transformer": WanTransformer3DModel}
    vae: Any
    transformer: Any
    prompt: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        parts: dict[str, Any],
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
        untrained: bool = False,
    ) -> None:
        """`parts` are `vae`, `transformer` and `prompt`, the empty prompt's embedding [n d_text] unpadded."""
        vae, transformer, prompt = parts["vae"], parts["transformer"], parts["prompt"]
        layer = check_layer(config, len(transformer.blocks))
        self.patch: int = vae.spatial_compression_ratio * transformer.config.patch_size[-1]
        super().__init__(config, grid, fingerprint, self.patch)
        self.untrained, self.vae, self.transformer = untrained, vae, transformer
        transformer.blocks = transformer.blocks[: layer + 1]
        transformer.norm_out = transformer.proj_out = nn.Identity()
        vae.decoder = None
        self.width: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        padded = functional.pad(prompt, (0, 0, 0, PROMPT_LENGTH - len(prompt)))
        self.register_buffer("prompt", padded[None])
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean)[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std)[:, None, None, None])
        self.use_engine(config.engine)

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; without a path, load shipped weights or draw them from the seed."""
        if config.path is None and entry.shipped is None:
            return cls.from_seed(config, entry.architecture or {}, grid)
        if config.path is None:
            config = replace(config, path=str(resource("assets") / str(entry.shipped)))
        return super().load(config, entry, grid)

    @classmethod
    def load_inputs(cls, config: PriorConfig, folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
        """Load the empty prompt."""
        width = parts["transformer"].config.text_dim
        return {"prompt": empty_prompt(config, folder, width, encode_empty_prompt)}

    @classmethod
    def from_seed(
        cls, config: PriorConfig, architecture: dict[str, dict[str, Any]], grid: tuple[int, int]
    ) -> Self:
        """Build Wan with untrained weights of `config.seed`, from constructor arguments by network."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            vae = AutoencoderKLWan(**architecture["vae"]).eval()
            transformer = WanTransformer3DModel(**architecture["transformer"])
            prompt = torch.randn(1, architecture["transformer"]["text_dim"])
            set_latent_statistics(vae)
        dtype = getattr(torch, str(config.dtype))
        parts = {"vae": vae.to(dtype), "transformer": transformer.to(dtype), "prompt": prompt}
        return cls(parts, config, grid, fingerprint_seed(config.seed, architecture), untrained=True)

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        A history is one video. Views are encoded one by one, so that no camera affects the next one's latent,
        and meet in the transformer.
        """
        if self.clip == "frame":
            return self.encode_frames(clips[:, 0], generator)[:, None]
        if self.clip == "views":
            alone = self.encode_latent(rearrange(clips, "n t c h w -> (n t) c 1 h w"))
            latent = rearrange(alone, "(n t) z 1 h w -> n z t h w", t=clips.shape[1])
        else:
            latent = self.encode_latent(clips.transpose(1, 2))
        return self.run_blocks(self.add_noise(latent, generator))

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of single frames on the prior's own grid, [n 3 h w] in [0, 1] -> [n d gh gw]."""
        engine = self.fast_engine
        if engine is not None:
            latent = torch.empty(len(frames), *engine.latent, device=frames.device)
            return engine(frames.float(), self.noise(latent, generator), self.noise_level)
        latent = self.encode_latent(frames[:, :, None])
        return self.run_blocks(self.add_noise(latent, generator))[:, 0]

    def encode_latent(self, video: Tensor) -> Tensor:
        """Return the VAE's normalised mean, [n 3 t h w] in [0, 1] -> [n z t' h/8 w/8] float32."""
        posterior = self.vae.encode((2 * video - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mode().float() - self.latents_mean) / self.latents_std

    def run_blocks(self, latent: Tensor) -> Tensor:
        """Return the output of the block that is read, noised latent [n z t h w] -> [n t d h/2 w/2]."""
        tokens, conditions = self.embed(latent)
        for block in self.transformer.blocks:
            tokens = block(tokens, *conditions)
        return self.to_grid(tokens, latent)

    def embed(self, latent: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Any]]:
        """Return a noised latent's tokens [n m d], and prompt, modulation and rotary tables of the blocks."""
        network = self.transformer
        latent = latent.to(network.dtype)
        time = torch.full((len(latent),), 1000 * self.noise_level, device=latent.device)
        prompt = self.prompt.to(latent).expand(len(latent), -1, -1)
        rotary = network.rope(latent)
        tokens = rearrange(network.patch_embedding(latent), "n d t gh gw -> n (t gh gw) d")
        _, modulation, prompt, _ = network.condition_embedder(time, prompt, None)
        return tokens, (prompt, modulation.unflatten(1, (6, -1)), rotary)

    def to_grid(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """Arrange the tokens of a latent [n z t h w] as maps, [n m d] -> [n t d gh gw]."""
        _, ph, pw = self.transformer.config.patch_size
        gh, gw = latent.shape[-2] // ph, latent.shape[-1] // pw
        return rearrange(tokens, "n (t gh gw) d -> n t d gh gw", gh=gh, gw=gw)

    def use_engine(self, engine: str) -> None:
        """Encode single frames with another engine from now on: `plain`, `fast` or `auto`."""
        self.engine = engine
        self._engine: Engine | None = None
        self._engine_built = False

    @property
    def fast_engine(self) -> Engine | None:
        """The engine for single frames, None for the plain path; built at first use, on the final device."""
        if not self._engine_built:
            self._engine, self._engine_built = make_engine(self, self.engine), True
        return self._engine

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Let the engine run without a CUDA graph of its own, so that a larger graph can capture it."""
        if self._engine is not None:
            self._engine.nested = True
        try:
            yield
        finally:
            if self._engine is not None:
                self._engine.nested = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Drop the engine where the weights move or change their type."""
        self.use_engine(self.engine)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine out of copies: captured graphs cannot be copied."""
        return self.__dict__ | {"_engine": None, "_engine_built": False}


class ControlledWorldSimulator(LatentWorldSimulator):
    """Wan2.1-VACE, its control's hint included, at control scale 1."""

    networks: ClassVar = {"vae": AutoencoderKLWan, "transformer": WanVACETransformer3DModel}

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(parts, config, grid, fingerprint)
        network = self.transformer
        self.hinted = [layer for layer in network.config.vace_layers if layer < len(network.blocks)]
        network.vace_blocks = network.vace_blocks[: len(self.hinted)]

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse the fast engine."""
        if config.engine == "fast":
            raise ValueError(f"prior.engine=fast: {config.name!r} has no fast form. Take plain or auto.")
        return super().load(config, entry, grid)

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        video = rearrange(clips, "n 1 c h w -> n c 1 h w")
        grey = torch.full_like(video[:1], 0.5)  # the masked video: nothing is kept
        latent, masked = self.encode_latent(torch.cat([video, grey])).split([len(video), 1])
        clean = torch.cat([latent, latent], dim=2)  # reference, then frame
        noisy = self.add_noise(clean, generator)
        return self.run_controlled(noisy, self.control(latent, masked.expand_as(latent)))[:, 1:]

    def control(self, latent: Tensor, masked: Tensor) -> Tensor:
        """Return VACE's control of a clean and a masked latent, both [n z 1 h w] -> [n 2z+64 2 h w].

        Channels: the kept part of the video (or the reference), the part to be generated, the mask of each
        pixel that a latent covers.
        """
        reference = torch.cat([latent, torch.zeros_like(latent)], dim=1)
        frame = torch.cat([masked, latent], dim=1)
        pixels = self.vae.spatial_compression_ratio**2
        shape = (len(latent), pixels, 1, *latent.shape[-2:])
        mask = torch.cat([latent.new_zeros(shape), latent.new_ones(shape)], dim=2)
        return torch.cat([torch.cat([reference, frame], dim=2), mask], dim=1)

    def run_controlled(self, latent: Tensor, control: Tensor) -> Tensor:
        """Return the output of the block that is read, [n z t h w], [n c t h w] -> [n t d h/2 w/2]."""
        network = self.transformer
        tokens, conditions = self.embed(latent)
        prompt, modulation, rotary = conditions
        controls = network.vace_patch_embedding(control.to(network.dtype))
        controls = rearrange(controls, "n d t gh gw -> n (t gh gw) d")
        hints: dict[int, Tensor] = {}
        for layer, block in zip(self.hinted, network.vace_blocks, strict=True):
            hints[layer], controls = block(tokens, prompt, controls, modulation, rotary)
        for layer, block in enumerate(network.blocks):
            tokens = block(tokens, *conditions)
            tokens = tokens + hints[layer] if layer in hints else tokens
        return self.to_grid(tokens, latent)


def encode_empty_prompt(folder: Path) -> Tensor:
    """Run a checkpoint's tokenizer and UMT5 encoder on "", -> [n d] float32, padding cut off."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    text_encoder = folder / "text_encoder"
    encoder = UMT5EncoderModel.from_pretrained(text_encoder, dtype="auto", use_safetensors=True).eval()
    tokens = tokenizer(
        [""], padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    return hidden[tokens.attention_mask[0].bool()].float().contiguous()


@torch.no_grad()
def set_latent_statistics(vae: Any) -> None:
    """Give an untrained VAE the latent mean and deviation that it has on smooth random images."""
    coarse = torch.rand(16, 3, 6, 6)
    images = functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)
    latent = vae.encode(2 * images[:, :, None] - 1).latent_dist.mode()
    mean, deviation = latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
