"""The exact reductions of a Wan prior.

A robot sees new frames at every step, but of one size, at one noise level and with one prompt. `FastWan` is
the prior for just that: the encoder of `wan_frame`, the transformer of `wan_fixed`. Its features are the
plain path's up to rounding (1e-5 in float32). `wan_captured` compiles it for one batch and replays it as one
CUDA graph; `wan_engine` chooses.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

from vega_policy.priors.wan_fixed import FixedTransformer
from vega_policy.priors.wan_frame import FrameEncoder
from vega_policy.priors.wan_rounded import round_products


def obstacle(prior: Any) -> str | None:
    """Why a prior has no fast form, or None if it has one.

    Args:
        prior: A `LatentWorldSimulator`.
    """
    vae, transformer = prior.vae, prior.transformer
    if (type(vae), type(transformer)) != (AutoencoderKLWan, WanTransformer3DModel):
        return f"its networks are {type(vae).__name__} and {type(transformer).__name__}, not Wan's own"
    if vae.use_tiling:
        return "its autoencoder works in tiles"
    if transformer.config.patch_size[0] != 1:
        return f"its patches span {transformer.config.patch_size[0]} frames"
    if transformer.config.added_kv_proj_dim is not None:
        return "its transformer also attends to a reference image"
    return None


class FastWan(nn.Module):
    """A Wan prior for one frame size, noise level and prompt; batches of any length.

    Weights that the reductions leave alone are shared with the prior, the others are copied.

    Args:
        prior: A `LatentWorldSimulator` that `obstacle` finds nothing wrong with.
        float8: Round the transformer's products to eight bits, which is not exact.

    Raises:
        ValueError: If the prior has no fast form, or the device no such products.
    """

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __init__(self, prior: Any, float8: bool = False) -> None:
        super().__init__()
        reason = obstacle(prior)
        if reason is not None:
            raise ValueError(
                f"prior.engine=fast: this prior has no fast form: {reason}. Take prior.engine=plain."
            )
        self.noise_level: float = prior.noise_level
        self.frame: tuple[int, int] = prior.input_size
        scale = prior.vae.spatial_compression_ratio
        size = (self.frame[0] // scale, self.frame[1] // scale)
        self.encoder = FrameEncoder(prior.vae)
        self.transformer = FixedTransformer(prior.transformer, prior.prompt[0], self.noise_level, size)
        if float8:
            round_products(self.transformer, prior.prompt.device)
        self.latent: tuple[int, ...] = (len(prior.latents_mean), 1, *size)
        self.rows = size[0] // self.transformer.patch[0]
        self.register_buffer("mean", prior.latents_mean[:, 0])
        self.register_buffer("std", prior.latents_std[:, 0])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """Features of single frames on the prior's own grid.

        Args:
            frames: Frames [n 3 h w], float32 in [0, 1].
            noise: Standard normal noise [z 1 gh gw] or [n z 1 gh gw] float32.
            noise_level: The level that the caller means, which must be the engine's.

        Returns:
            Features [n d gh gw] in the prior's floating-point type.

        Raises:
            ValueError: If shape, type, device or noise level are not those it was built for.
        """
        self.check(frames, noise, noise_level)
        tokens = self.enter(self.encoder(frames), noise)
        return self.leave(self.transformer.run(tokens, self.blocks))

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks."""
        return list(self.transformer.blocks)

    def enter(self, means: Tensor, noise: Tensor) -> Tensor:
        """From the encoder's means to the transformer's first tokens, [n z gh gw] -> [n m d]."""
        latent = (means.float() - self.mean) / self.std
        return self.transformer.embed((1 - self.noise_level) * latent + self.noise_level * noise.squeeze(-3))

    def leave(self, tokens: Tensor) -> Tensor:
        """[n m d] -> [n d gh gw]."""
        return rearrange(tokens, "n (gh gw) d -> n d gh gw", gh=self.rows)

    def check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        """Refuse what the engine was not built for; see `forward`."""
        expected = (3, *self.frame)
        if frames.ndim != 4 or tuple(frames.shape[1:]) != expected:
            refuse("frames", f"[n {' '.join(map(str, expected))}]", list(frames.shape))
        if tuple(noise.shape) not in (self.latent, (len(frames), *self.latent)):
            refuse("noise", f"{list(self.latent)} or {[len(frames), *self.latent]}", list(noise.shape))
        if frames.dtype != torch.float32 or noise.dtype != torch.float32:
            refuse("frames and noise", "float32", f"{frames.dtype} and {noise.dtype}")
        if frames.device != self.mean.device:
            refuse("frames", f"on {self.mean.device}", f"frames on {frames.device}")
        if noise_level != self.noise_level:
            refuse("a noise level", str(self.noise_level), noise_level)


def refuse(what: str, expected: str, found: Any) -> None:
    """Say what the engine was built for and what came instead."""
    raise ValueError(
        f"This engine was built for {what} {expected}; got {found}. Build the prior for it, or take "
        "prior.engine=plain, which takes what comes."
    )
