"""The control: a fixed random projection of each patch. A prior worth its cost must beat it."""

import torch
from einops import rearrange
from torch import Tensor, nn

from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import check_no_noise
from vega_policy.priors.weights import fingerprint_seed

PATCH = 16
WIDTH = 256


class RandomPrior(nn.Module):
    """Patches of 16x16 pixels through one fixed random matrix.

    Args:
        seed: Seed of the matrix.
        grid: Token grid (gh, gw).
        width: Width d of a feature.
    """

    untrained = True
    matrix: Tensor
    layer = 0
    noise_level = 0.0

    def __init__(self, seed: int, grid: tuple[int, int], width: int = WIDTH) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.fingerprint = fingerprint_seed(seed, {"patch": PATCH, "width": width})
        generator = torch.Generator().manual_seed(seed)
        values = 3 * PATCH * PATCH
        self.register_buffer("matrix", torch.randn(values, width, generator=generator) * 4 / values**0.5)

    def forward(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features of the last frame of each clip, [b v t 3 h w] in [0, 1] -> [b v d gh gw]."""
        (gh, gw) = self.grid
        frames = resize(frames[:, :, -1], gh * PATCH, gw * PATCH) - 0.5
        patches = rearrange(frames, "b v c (gh p) (gw q) -> b v gh gw (c p q)", p=PATCH, q=PATCH)
        return rearrange(patches @ self.matrix, "b v gh gw d -> b v d gh gw")


def load(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> RandomPrior:
    """Build the control from its seed.

    Raises:
        ValueError: If a layer other than its only one is asked for, or noise.
    """
    check_no_noise(config)
    if config.layer != 0:
        raise ValueError(f"prior.layer: the random prior has the single layer 0; got {config.layer}.")
    return RandomPrior(config.seed, grid)
