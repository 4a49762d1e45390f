"""What a prior is held against: other encoders, raw pixels, and the mere place in the picture."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.readouts import FixedReader, Reader, WanSweep
from vega_policy.attention import grid_positions
from vega_policy.backbones.encoders import STRIDE, ImageEncoder
from vega_policy.features import fingerprint
from vega_policy.observation import resize
from vega_policy.parts import BackboneConfig, PriorConfig
from vega_policy.priors import make_prior

COMPARED = ("semantic", "vae", "random", "pixels", "position")


def comparison_readers(
    names: Sequence[str], prior: Reader, backbone: BackboneConfig, grid: tuple[int, int], seed: int = 0
) -> list[Reader]:
    """What the prior is compared with.

    Args:
        names: Entries of `COMPARED`; `vae` is left out where the prior is no Wan.
        prior: The prior's reader, whose autoencoder `vae` takes.
        backbone: Names the semantic encoder.
        grid: Token grid.
        seed: Of the random projection.

    Raises:
        ValueError: If a name is unknown.
    """
    unknown = [name for name in names if name not in COMPARED]
    if unknown:
        raise ValueError(f"compare: expected entries of {', '.join(COMPARED)}; got {', '.join(unknown)}")
    readers: list[Reader] = []
    for name in names:
        if name == "semantic":
            encoder = ImageEncoder(backbone.image_encoder, backbone.pretrained, frozen=True)
            identity = f"{backbone.image_encoder}-{fingerprint(encoder)}"
            readers.append(FixedReader(name, identity, lambda x, e=encoder: _fit(e(_sized(x, grid)), grid)))
        elif name == "vae" and isinstance(prior, WanSweep):
            reader = prior
            readers.append(
                FixedReader(
                    name, prior.fingerprint, lambda x, r=reader: _unfolded(r.latents(x)[:, :, 0], grid)
                )
            )
        elif name == "random":
            random = make_prior(PriorConfig(name="random", seed=seed), grid)
            readers.append(
                FixedReader(name, random.fingerprint, lambda x, r=random: r(x[:, None, None])[:, 0])
            )
        elif name == "pixels":
            readers.append(FixedReader(name, "4x4", lambda x: _pixels(x, grid)))
        elif name == "position":
            places = rearrange(grid_positions(*grid, 64), "(gh gw) d -> d gh gw", gh=grid[0])
            readers.append(FixedReader(name, "64", lambda x, p=places: p.expand(len(x), -1, -1, -1)))
    return readers


def _sized(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    return resize(pictures, grid[0] * STRIDE, grid[1] * STRIDE)


def _fit(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == grid else functional.adaptive_avg_pool2d(maps, grid)


def _unfolded(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """All values of a cell side by side where the grid divides the map, their mean otherwise."""
    rows, columns = maps.shape[-2] // grid[0], maps.shape[-1] // grid[1]
    if maps.shape[-2:] != (rows * grid[0], columns * grid[1]):
        return functional.adaptive_avg_pool2d(maps, grid)
    return rearrange(maps, "n d (gh r) (gw c) -> n (d r c) gh gw", r=rows, c=columns)


def _pixels(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colours of 4x4 places a cell, [n 3 h w] -> [n 48 gh gw]."""
    return _unfolded(functional.adaptive_avg_pool2d(pictures - 0.5, (4 * grid[0], 4 * grid[1])), grid)
