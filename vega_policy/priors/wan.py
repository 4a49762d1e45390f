"""Wan2.1 as a latent world simulator: one noised latent, read in the middle (VEGA-3D, arXiv 2603.19235).

    z0 = normalised VAE mean        z = (1 - t) z0 + t noise        feature = blocks[layer](z, 1000 t, "")

Everything is diffusers' own (`AutoencoderKLWan`, `WanTransformer3DModel`); blocks after the one that is
read are dropped when the prior is built. This file is the plain path; `wan_fast` computes the same faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import PriorReader, check_layer, fitting_size
from vega_policy.priors.wan_fast import Engine, make_engine
from vega_policy.priors.weights import (
    PROMPT_LENGTH,
    check_class,
    empty_prompt,
    fingerprint_files,
    fingerprint_seed,
    load_part,
    locate,
    way_out,
)
from vega_policy.resources import resource


class LatentWorldSimulator(PriorReader):
    """A frozen Wan video diffusion model, read out at one block and one noise level.

    Args:
        vae: The video autoencoder, an `AutoencoderKLWan`; its decoder is dropped.
        transformer: The diffusion transformer, a `WanTransformer3DModel`; blocks after the one that
            is read are dropped.
        prompt: Embedding of the empty prompt, [n d_text], without padding.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.
        untrained: Whether the weights are those of a seed.

    Raises:
        ValueError: If the layer lies outside the transformer or the input size does not fit its patches.
    """

    vae: Any
    transformer: Any
    prompt: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        prompt: Tensor,
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
        untrained: bool = False,
    ) -> None:
        layer = check_layer(config, len(transformer.blocks))
        patch: int = vae.spatial_compression_ratio * transformer.config.patch_size[-1]
        super().__init__(config, grid, fitting_size(config, grid, patch), fingerprint)
        self.untrained, self.engine, self.patch = untrained, config.engine, patch
        self._forget_engine()
        self.vae, self.transformer = vae, transformer
        transformer.blocks = transformer.blocks[: layer + 1]
        transformer.norm_out = transformer.proj_out = nn.Identity()
        vae.decoder = None
        self.width: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        padded = functional.pad(prompt, (0, 0, 0, PROMPT_LENGTH - len(prompt)))
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        self.register_buffer("prompt", padded[None])
        self.register_buffer("latents_mean", torch.tensor(statistics[0])[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(statistics[1])[:, None, None, None])

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        A history is one video. Views are encoded one by one, so that no camera leaks into the next one's
        latent, and meet in the transformer.
        """
        if self.clip == "frame":
            return self.features(clips[:, 0], generator)[:, None]
        if self.clip == "views":
            alone = self.encode(rearrange(clips, "n t c h w -> (n t) c 1 h w"))
            latent = rearrange(alone, "(n t) z 1 h w -> n z t h w", t=clips.shape[1])
        else:
            latent = self.encode(clips.transpose(1, 2))
        noisy = (1 - self.noise_level) * latent + self.noise_level * self.noise(latent, generator)
        return self.read_video(noisy)

    def features(self, pictures: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of single pictures on the prior's own grid, [n 3 h w] in [0, 1] -> [n d gh gw]."""
        if not self._engine_chosen:  # at the first call, because weights may have moved before
            self._engine, self._engine_chosen = make_engine(self, self.engine), True
        if self._engine is not None:
            latent = torch.empty(len(pictures), *self._engine.latent, device=pictures.device)
            return self._engine(pictures.float(), self.noise(latent, generator), self.noise_level)
        latent = self.encode(pictures[:, :, None])
        noisy = (1 - self.noise_level) * latent + self.noise_level * self.noise(latent, generator)
        return self.read(noisy)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised mean of the VAE's posterior, [n 3 t h w] in [0, 1] -> [n z t' h/8 w/8] float32."""
        posterior = self.vae.encode((2 * video - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mode().float() - self.latents_mean) / self.latents_std

    def read(self, latent: Tensor) -> Tensor:
        """Output of the block that is read (no final norm), noised latent [n z 1 h w] -> [n d h/2 w/2]."""
        return self.read_video(latent)[:, 0]

    def read_video(self, latent: Tensor) -> Tensor:
        """The same of a video, noised latent [n z t h w] -> [n t d h/2 w/2]."""
        network = self.transformer
        latent = latent.to(network.dtype)
        time = torch.full((len(latent),), 1000 * self.noise_level, device=latent.device)
        prompt = self.prompt.to(latent).expand(len(latent), -1, -1)
        rotary = network.rope(latent)
        tokens = network.patch_embedding(latent)  # [n d t gh gw]
        gh, gw = tokens.shape[-2:]
        _, modulation, prompt, _ = network.condition_embedder(time, prompt, None)
        modulation = modulation.unflatten(1, (6, -1))
        tokens = rearrange(tokens, "n d t gh gw -> n (t gh gw) d")
        for block in network.blocks:
            tokens = block(tokens, prompt, modulation, rotary)
        return rearrange(tokens, "n (t gh gw) d -> n t d gh gw", gh=gh, gw=gw)

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Let the engine run without a graph of its own, so that somebody else can capture it."""
        if self._engine is not None:
            self._engine.nested = True
        try:
            yield
        finally:
            if self._engine is not None:
                self._engine.nested = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Build the engine anew where the weights move or change their type."""
        self._forget_engine()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy builds its own engine: captured graphs cannot be copied."""
        return self.__dict__ | {"_engine": None, "_engine_chosen": False}

    def use_engine(self, engine: str) -> None:
        """Read with another engine from now on, `plain`, `fast` or `auto`."""
        self.engine = engine
        self._forget_engine()

    def _forget_engine(self) -> None:
        self._engine: Engine | None = None
        self._engine_chosen = False


def load(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> LatentWorldSimulator:
    """Load Wan from a folder in the hub's layout, from the hub or from the package, or build it from a seed.

    Args:
        config: Resolved prior config.
        entry: The table's line.
        grid: Token grid (gh, gw) of the backbone.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture or the layer does not exist.
    """
    if config.path is None and entry.shipped is None:
        return seeded(config, entry.architecture or {}, grid)
    parts = ["vae", "transformer"]
    source = config.path or str(resource("assets") / str(entry.shipped))
    folder = locate(source, config.revision, parts, way_out(entry))
    check_class(folder / "vae", "AutoencoderKLWan")
    check_class(folder / "transformer", "WanTransformer3DModel")
    dtype = getattr(torch, str(config.dtype))
    transformer: Any = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    prompt = empty_prompt(source, folder, config.revision, config.prompt_file, transformer.config.text_dim)
    return LatentWorldSimulator(
        AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype),
        transformer,
        prompt,
        config,
        grid,
        fingerprint_files(folder, parts),
    )


def seeded(config: PriorConfig, architecture: dict[str, Any], grid: tuple[int, int]) -> LatentWorldSimulator:
    """Wan with untrained weights of a fixed seed; the latent's statistics are measured on seeded pictures.

    Args:
        config: Resolved prior config.
        architecture: Constructor arguments of `vae` and `transformer`.
        grid: Token grid (gh, gw) of the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        vae = AutoencoderKLWan(**architecture["vae"]).eval()
        transformer = WanTransformer3DModel(**architecture["transformer"])
        prompt = torch.randn(1, architecture["transformer"]["text_dim"])
        _measure_latents(vae)
    dtype = getattr(torch, str(config.dtype))
    if dtype != torch.float32:
        vae, transformer = vae.to(dtype), transformer.to(dtype)
    return LatentWorldSimulator(
        vae,
        transformer,
        prompt,
        config,
        grid,
        fingerprint_seed(config.seed, architecture),
        untrained=True,
    )


@torch.no_grad()
def _measure_latents(vae: Any) -> None:
    """Give an untrained VAE the latent mean and deviation that it has on smooth random pictures."""
    coarse = torch.rand(16, 3, 6, 6)
    pictures = functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)
    latent = vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()
    mean, deviation = latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


class ControlledWorldSimulator(LatentWorldSimulator):
    """Wan2.1-VACE, read out at one block, the control's hint included, at control scale 1.

    Args:
        vae: An `AutoencoderKLWan`; its decoder is dropped.
        transformer: A `WanVACETransformer3DModel`; what lies behind the block that is read is dropped.
        prompt: Embedding of the empty prompt, [n d_text], without padding.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.
    """

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        prompt: Tensor,
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
    ) -> None:
        super().__init__(vae, transformer, prompt, config, grid, fingerprint)
        self.hinted = [layer for layer in transformer.config.vace_layers if layer < len(transformer.blocks)]
        transformer.vace_blocks = transformer.vace_blocks[: len(self.hinted)]

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        video = rearrange(clips, "n 1 c h w -> n c 1 h w")
        grey = torch.full_like(video[:1], 0.5)  # the masked video: nothing is kept
        latent, masked = self.encode(torch.cat([video, grey])).split([len(video), 1])
        clean = torch.cat([latent, latent], dim=2)  # reference, then frame
        noisy = (1 - self.noise_level) * clean + self.noise_level * self.noise(clean, generator)
        return self.read_controlled(noisy, self.control(latent, masked.expand_as(latent)))[:, 1:]

    def control(self, latent: Tensor, masked: Tensor) -> Tensor:
        """What VACE is told, clean latent and masked latent [n z 1 h w] -> [n 2z+64 2 h w].

        Channels: the kept part of the video (or the reference), the part to be made, the mask of each pixel
        that a latent covers.
        """
        reference = torch.cat([latent, torch.zeros_like(latent)], dim=1)
        frame = torch.cat([masked, latent], dim=1)
        pixels = self.vae.spatial_compression_ratio**2
        shape = (len(latent), pixels, 1, *latent.shape[-2:])
        mask = torch.cat([latent.new_zeros(shape), latent.new_ones(shape)], dim=2)
        return torch.cat([torch.cat([reference, frame], dim=2), mask], dim=1)

    def read_controlled(self, latent: Tensor, control: Tensor) -> Tensor:
        """Output of the block that is read, [n z t h w], [n c t h w] -> [n t d h/2 w/2]."""
        network = self.transformer
        latent, control = latent.to(network.dtype), control.to(network.dtype)
        time = torch.full((len(latent),), 1000 * self.noise_level, device=latent.device)
        prompt = self.prompt.to(latent).expand(len(latent), -1, -1)
        rotary = network.rope(latent)
        embedded = network.patch_embedding(latent)
        times, (gh, gw) = embedded.shape[2], embedded.shape[-2:]
        tokens = rearrange(embedded, "n d t gh gw -> n (t gh gw) d")
        controls = rearrange(network.vace_patch_embedding(control), "n d t gh gw -> n (t gh gw) d")
        _, modulation, prompt, _ = network.condition_embedder(time, prompt, None)
        modulation = modulation.unflatten(1, (6, -1))
        hints: dict[int, Tensor] = {}
        for layer, block in zip(self.hinted, network.vace_blocks, strict=True):
            hints[layer], controls = block(tokens, prompt, controls, modulation, rotary)
        for layer, block in enumerate(network.blocks):
            tokens = block(tokens, prompt, modulation, rotary)
            tokens = tokens + hints[layer] if layer in hints else tokens
        return rearrange(tokens, "n (t gh gw) d -> n t d gh gw", t=times, gh=gh, gw=gw)


def load_vace(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> ControlledWorldSimulator:
    """Load Wan2.1-VACE from a folder in the hub's layout or from the hub.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture, the layer does not exist, or the fast engine is
            asked for.
    """
    if config.engine == "fast":
        raise ValueError(f"prior.engine=fast: {config.name!r} has no fast form. Take plain or auto.")
    source, parts = str(config.path), ["vae", "transformer"]
    folder = locate(source, config.revision, parts, way_out(entry))
    check_class(folder / "vae", "AutoencoderKLWan")
    check_class(folder / "transformer", "WanVACETransformer3DModel")
    transformer = load_part(WanVACETransformer3DModel, folder / "transformer", config)
    width = transformer.config.text_dim
    prompt = empty_prompt(source, folder, config.revision, config.prompt_file, width)
    vae = load_part(AutoencoderKLWan, folder / "vae", config)
    return ControlledWorldSimulator(vae, transformer, prompt, config, grid, fingerprint_files(folder, parts))
