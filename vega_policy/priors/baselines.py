"""Baselines: an autoencoder's clean latent, vision transformers, a random projection."""

from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from einops import rearrange, repeat
from torch import Tensor
from transformers import DINOv3ViTModel, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import BasePrior, check_layer, drop_modules, refuse_noise
from vega_policy.priors.unet import latent_mean
from vega_policy.priors.weights import fingerprint_seed

CELL = 16
"""Pixels of a frame for each token of the backbone, as with the diffusion priors."""


class Autoencoder(BasePrior):
    """The encoder of a latent diffusion model alone; latents of one token are averaged."""

    vae: Any

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse a layer, a noise level and `clip=views`."""
        check_layer(config, 1)
        refuse_noise(config)
        if config.clip == "views":
            raise ValueError(
                f"prior.clip=views: the autoencoder {config.name!r} encodes each camera by itself, so that "
                "clip=views would change nothing. Take clip=frame or clip=history."
            )
        return super().load(config, entry, grid)


class StableDiffusionVae(Autoencoder):
    """Mean of Stable Diffusion's autoencoder times its scaling factor, 4 channels."""

    networks: ClassVar = {"vae": AutoencoderKL}

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae = parts["vae"]
        super().__init__(config, grid, fingerprint, 2 ** (len(vae.config.block_out_channels) - 1), CELL)
        self.vae, self.width = vae, vae.config.latent_channels
        drop_modules(vae, "decoder", "post_quant_conv")

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return latents of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 4 h/8 w/8]."""
        return (latent_mean(self.vae, clips[:, 0]) * self.vae.config.scaling_factor)[:, None]


class WanVae(Autoencoder):
    """Normalised mean of Wan's video autoencoder, of a frame or a history."""

    networks: ClassVar = {"vae": AutoencoderKLWan}
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae = parts["vae"]
        stride = vae.spatial_compression_ratio
        super().__init__(config, grid, fingerprint, stride, max(CELL, stride))
        self.vae, self.width = vae, vae.config.z_dim
        drop_modules(vae, "decoder")
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean)[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std)[:, None, None, None])

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return latents of clips, [n t 3 h w] in [0, 1] -> [n 1+(t-1)/4 z h/8 w/8]."""
        video = (2 * clips - 1).to(self.vae.dtype).transpose(1, 2)
        mean = self.vae.encode(video).latent_dist.mode().float()
        return ((mean - self.latents_mean) / self.latents_std).transpose(1, 2)


class VisionTransformer(BasePrior):
    """A vision transformer read at one block, with its final norm; its module `encoder` holds the blocks."""

    encoder: str
    network: Any
    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse a noise level."""
        refuse_noise(config)
        return super().load(config, entry, grid)

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        network = parts["."]
        encoder = getattr(network, self.encoder)
        layer = check_layer(config, len(encoder.layer))
        super().__init__(config, grid, fingerprint, network.config.patch_size)
        encoder.layer = encoder.layer[: layer + 1]
        self.network, self.width, self.patch = network, network.config.hidden_size, network.config.patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None])

    def normalize(self, clips: Tensor) -> Tensor:
        """Apply ImageNet's statistics, [n t 3 h w] in [0, 1] -> [n t 3 h w] in the network's type."""
        return ((clips - self.mean) / self.std).to(self.network.dtype)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Arrange the tokens of t' times as maps, [n t'*gh*gw d] -> [n t' d gh gw]."""
        gh, gw = (side // self.patch for side in self.input_size)
        return rearrange(tokens, "n (t h w) d -> n t d h w", h=gh, w=gw)


class Dinov3(VisionTransformer):
    """DINOv3 on single frames: patch tokens, without class and register tokens."""

    networks: ClassVar = {".": DINOv3ViTModel}
    encoder = "model"

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return patch tokens of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        hidden = self.network(self.normalize(clips)[:, 0]).last_hidden_state
        return self.to_grid(hidden[:, 1 + self.network.config.num_register_tokens :])


class VJepa2(VisionTransformer):
    """V-JEPA 2's encoder on clips; one token spans two frames, so that a single frame is repeated."""

    networks: ClassVar = {".": VJEPA2Model}
    encoder = "encoder"

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(parts, config, grid, fingerprint)
        if grid[0] != grid[1]:
            raise ValueError(f"prior: 'vjepa2' has positions on square grids only; the backbone's is {grid}.")
        drop_modules(self.network, "predictor")
        for block in self.network.encoder.layer:  # transformers takes a frame's rows from the config
            block.attention.grid_size = self.input_size[1] // self.patch

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return tokens of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        For `clip=views` every camera fills a token's time span alone (t' = t); a history that does not fill
        its last span begins with its first frame repeated.
        """
        span = self.network.config.tubelet_size
        if self.clip == "history":
            missing = -clips.shape[1] % span
            clips = torch.cat([clips[:, :1].expand(-1, missing, -1, -1, -1), clips], dim=1)
        else:
            clips = repeat(clips, "n t c h w -> n (t s) c h w", s=span)
        return self.to_grid(self.network.encoder(self.normalize(clips)).last_hidden_state)


class RandomProjection(BasePrior):
    """The control: patches of 16x16 pixels through one fixed random matrix. A useful prior must beat it."""

    patch, width = 16, 256
    untrained = True
    matrix: Tensor

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Draw the matrix from the config's seed; refuse a layer and a noise level."""
        check_layer(config, 1)
        refuse_noise(config)
        return cls(config, grid)

    def __init__(self, config: PriorConfig, grid: tuple[int, int]) -> None:
        fingerprint = fingerprint_seed(config.seed, {"patch": self.patch, "width": self.width})
        super().__init__(config, grid, fingerprint, self.patch)
        values = 3 * self.patch**2
        matrix = torch.randn(values, self.width, generator=torch.Generator().manual_seed(config.seed))
        self.register_buffer("matrix", matrix * 4 / values**0.5)

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return projected patches of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        patches = rearrange(
            clips - 0.5, "n t c (gh p) (gw q) -> n t gh gw (c p q)", p=self.patch, q=self.patch
        )
        return rearrange(patches @ self.matrix, "n t gh gw d -> n t d gh gw")
