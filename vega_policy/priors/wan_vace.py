"""Wan2.1-VACE as a prior: Wan with a control branch that sees the clean frame.

The frame is a one-frame video to be made (mask of ones) and its own reference image. A reference is one more
latent frame in front, so the transformer sees twice as many tokens; those of the frame are the second half.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanVACETransformer3DModel
from einops import rearrange
from torch import Tensor

from vega_policy.parts import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.prompt import empty_prompt
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.weights import check_class, fingerprint_files, load_part, locate, way_out


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


def load(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> ControlledWorldSimulator:
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
