"""An autoencoder alone as a prior: the clean latent, without any diffusion (a baseline of the paper)."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import PriorReader, check_layer, check_no_noise, drop_rest, fitting_size
from vega_policy.priors.unet import clean_latent
from vega_policy.priors.weights import check_class, fingerprint_files, load_part, locate, way_out

CELL = 16
"""Pixels a token of the backbone: frames are read as large as by the other priors, 2x2 latents a token."""


class StableDiffusionVae(PriorReader):
    """Mean of Stable Diffusion's autoencoder times its scaling factor, 4 numbers a place.

    Args:
        vae: An `AutoencoderKL`; its decoder is dropped.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.
    """

    vae: Any

    def __init__(self, vae: Any, config: PriorConfig, grid: tuple[int, int], fingerprint: str) -> None:
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(config, grid, fitting_size(config, grid, stride, CELL), fingerprint)
        self.vae, self.width = vae, vae.config.latent_channels
        drop_rest(vae, "decoder", "post_quant_conv")

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 4 h/8 w/8]."""
        return (clean_latent(self.vae, clips[:, 0]) * self.vae.config.scaling_factor)[:, None]


class WanVae(PriorReader):
    """Normalised mean of Wan's video autoencoder, a frame or a clip at a time.

    Args:
        vae: An `AutoencoderKLWan`; its decoder is dropped.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.
    """

    vae: Any
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: Any, config: PriorConfig, grid: tuple[int, int], fingerprint: str) -> None:
        stride = vae.spatial_compression_ratio
        size = fitting_size(config, grid, stride, max(CELL, stride))
        super().__init__(config, grid, size, fingerprint)
        self.vae, self.width = vae, vae.config.z_dim
        drop_rest(vae, "decoder")
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean)[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std)[:, None, None, None])

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents of clips, [n t 3 h w] in [0, 1] -> [n 1+(t-1)/4 z h/8 w/8]."""
        video = (2 * clips - 1).to(self.vae.dtype).transpose(1, 2)
        mean = self.vae.encode(video).latent_dist.mode().float()
        return ((mean - self.latents_mean) / self.latents_std).transpose(1, 2)


def load(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> PriorReader:
    """Load the autoencoder of a checkpoint in the hub's layout.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture, or a layer or noise level is asked for.
    """
    check_layer(config, 1)
    check_no_noise(config)
    if config.clip == "views":
        raise ValueError(
            f"prior.clip=views: the autoencoder {config.name!r} would read each camera by itself, so that "
            "clip=views would change nothing. Take clip=frame or clip=history."
        )
    folder = locate(str(config.path), config.revision, ["vae"], way_out(entry))
    wan = config.name == "wan_vae"
    cls = AutoencoderKLWan if wan else AutoencoderKL
    check_class(folder / "vae", cls.__name__)
    vae = load_part(cls, folder / "vae", config)
    return (WanVae if wan else StableDiffusionVae)(vae, config, grid, fingerprint_files(folder, ["vae"]))
