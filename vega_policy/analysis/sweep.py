"""The sweep: every readout measured on the same scenes, each number computed once and kept."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.analysis.bootstrap import Estimate
from vega_policy.analysis.measures import (
    HEADLINE,
    METRICS,
    Setup,
    Sums,
    cache_key,
    gain,
    load_sums,
    measure,
    save_sums,
    value,
)
from vega_policy.analysis.readouts import UNTRAINED, Reader, Readout
from vega_policy.analysis.scenes import Scene
from vega_policy.analysis.tokens import token_geometry


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
        token_geometry(scene.views, setup.grid, len(scene.things), scenes.farthest) for scene in scenes.scenes
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
