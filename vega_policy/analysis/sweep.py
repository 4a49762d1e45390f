"""The sweep: every readout measured on the same scenes, each number computed once and kept."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.config import COMPARED
from vega_policy.analysis.correspondence import Estimate
from vega_policy.analysis.features import token_geometry
from vega_policy.analysis.linear_probes import (
    HEADLINE,
    METRICS,
    UNTRAINED,
    FixedReader,
    Reader,
    Readout,
    Setup,
    Sums,
    WanSweep,
    cache_key,
    gain,
    load_sums,
    measure,
    save_sums,
    value,
)
from vega_policy.backbones.compact import STRIDE, ImageEncoder
from vega_policy.data.feature_cache import fingerprint
from vega_policy.data.scenes import Scene
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.model.layers import grid_positions
from vega_policy.model.observation import resize
from vega_policy.priors import make_prior


@dataclass(frozen=True)
class SceneSet:
    """Scenes and what names them.

    Attributes:
        key: Hash over all that determines their content.
        scenes: The scenes.
        farthest: Depth beyond which a pixel counts as unknown (m).
    """

    key: str
    scenes: list[Scene]
    farthest: float = 10.0

    def pictures(self) -> Tensor:
        """All views of all scenes, [n 3 h w] in [0, 1]."""
        frames = [torch.from_numpy(scene.views.frames) for scene in self.scenes]
        return torch.cat(frames).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Sweep:
    """Numbers of every readout.

    Attributes:
        sums: Readout -> sums a scene.
        default: Readout of the prior that a policy would use.
    """

    sums: dict[Readout, Sums]
    default: Readout

    def table(self) -> dict[Readout, dict[str, Estimate]]:
        """All metrics of all readouts."""
        return {readout: {name: value(sums, name) for name in METRICS} for readout, sums in self.sums.items()}

    def compared(self) -> list[Readout]:
        """Readouts of the main table: the prior's default, that of its copy, and all without layers."""
        return [
            readout
            for readout in self.sums
            if readout.layer is None or (readout.layer, readout.noise_level) == _place(self.default)
        ]

    def twin(self) -> Readout | None:
        """The untrained copy's readout at the default place; None without a copy."""
        twin = Readout(UNTRAINED, *_place(self.default))
        return twin if twin in self.sums else None

    def gains(self, other: Readout) -> dict[str, Estimate]:
        """By how much the prior's default readout is better than another one, metric by metric."""
        return {name: gain(self.sums[self.default], self.sums[other], name) for name in HEADLINE}


def _place(readout: Readout) -> tuple[int | None, float | None]:
    return readout.layer, readout.noise_level


def sweep(scenes: SceneSet, readers: Sequence[Reader], default: Readout, setup: Setup, cache: Path) -> Sweep:
    """Measure all readouts of all readers; what the cache holds is not computed again.

    Args:
        scenes: On what.
        readers: By whom; the first is the prior.
        default: The prior's own readout.
        setup: How.
        cache: Folder of kept numbers.
    """
    geometry = [
        token_geometry(scene.views, setup.grid, len(scene.objects), scenes.farthest)
        for scene in scenes.scenes
    ]
    pictures = scenes.pictures()
    sums: dict[Readout, Sums] = {}
    for reader in readers:
        files = {
            readout: cache / f"{_key(scenes, reader, readout, setup)}.npz" for readout in reader.readouts
        }
        kept = {readout: load_sums(path) for readout, path in files.items()}
        missing = [readout for readout, found in kept.items() if found is None]
        if missing:
            read = reader.read(pictures, missing)
            for readout, tokens in tqdm(read, f"Measuring {reader.label}", len(missing), unit="readout"):
                kept[readout] = measure(tokens, scenes.scenes, geometry, setup)
                save_sums(files[readout], kept[readout] or {})
        sums |= {readout: found for readout, found in kept.items() if found is not None}
    return Sweep(sums, default)


def _key(scenes: SceneSet, reader: Reader, readout: Readout, setup: Setup) -> str:
    return cache_key(
        scenes=scenes.key,
        farthest=scenes.farthest,
        weights=reader.fingerprint,
        readout=asdict(readout),
        setup=asdict(setup),
    )


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
