"""Every number of the report for one readout: sums of each scene, from which values and intervals follow."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.bootstrap import Estimate, Statistic, difference, estimate, explained, ratio_of_sums
from vega_policy.analysis.cameras import pose_change
from vega_policy.analysis.correspondence import Correspondence, correspondence
from vega_policy.analysis.probes import ProbeData, ProbeResult, probe
from vega_policy.analysis.scenes import Scene
from vega_policy.analysis.tokens import TokenGeometry

FORMAT = 1  # of the cache: goes up where a number would change
EVERY = 3  # of so many tokens one goes into the probes of depth and normals
LEAST_COVER = 0.5  # tokens that a thing must cover to be probed
POOL = (2, 2)  # grid to which views are pooled for the change of pose


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    Attributes:
        title: Heading of its column.
        sums: Key of its sums.
        statistic: From sums to the number.
        scale: Factor into the unit shown.
        higher: Whether more is better.
    """

    title: str
    sums: str
    statistic: Statistic = ratio_of_sums
    scale: float = 1.0
    higher: bool = True


METRICS: dict[str, Metric] = {
    "raw": Metric("correspondence", "raw"),
    "chance": Metric("its chance level", "chance"),
    "centred": Metric("centred", "centred"),
    "centred_chance": Metric("its chance level", "centred_chance"),
    "retrieval": Metric("retrieval", "retrieval"),
    "retrieval_chance": Metric("its chance level", "retrieval_chance"),
    "depth_r2": Metric("depth R2", "depth_squares", explained),
    "depth_cm": Metric("depth error (cm)", "depth_errors", scale=100, higher=False),
    "normal_r2": Metric("normal R2", "normal_squares", explained),
    "normal_deg": Metric("normal error (deg)", "normal_errors", scale=180 / math.pi, higher=False),
    "object_r2": Metric("object R2", "object_squares", explained),
    "object_cm": Metric("object error (cm)", "object_errors", scale=100, higher=False),
    "shift_r2": Metric("camera shift R2", "shift_squares", explained),
    "shift_cm": Metric("camera shift error (cm)", "shift_errors", scale=100, higher=False),
    "turn_r2": Metric("camera turn R2", "turn_squares", explained),
    "turn_deg": Metric("camera turn error (deg)", "turn_errors", scale=180 / math.pi, higher=False),
}
HEADLINE = ("centred", "retrieval", "depth_r2", "normal_r2", "object_r2", "shift_r2", "turn_r2")
"""Metrics on which a prior is held against its untrained copy, and of which there are heat maps."""

Sums = dict[str, np.ndarray]


def value(sums: Sums, name: str) -> Estimate:
    """A metric with its interval; nan where the scenes did not allow it."""
    metric = METRICS[name]
    return _scaled(estimate(sums[metric.sums], metric.statistic), metric.scale)


def gain(first: Sums, second: Sums, name: str) -> Estimate:
    """By how much the first is better than the second, scene by scene paired; positive is better."""
    metric = METRICS[name]
    apart = difference(first[metric.sums], second[metric.sums], metric.statistic)
    apart = _scaled(apart, metric.scale)
    return apart if metric.higher else Estimate(-apart.value, -apart.high, -apart.low)


def _scaled(number: Estimate, scale: float) -> Estimate:
    return Estimate(number.value * scale, number.low * scale, number.high * scale)


@dataclass(frozen=True)
class Setup:
    """How scenes are measured.

    Attributes:
        grid: Token grid (gh, gw).
        voxel: Side of a voxel of the correspondence score (m).
        radius: How far a retrieved token may lie from the point (m).
    """

    grid: tuple[int, int]
    voxel: float = 0.1
    radius: float = 0.1


def measure(
    features: Tensor, scenes: Sequence[Scene], geometry: Sequence[TokenGeometry], setup: Setup
) -> Sums:
    """All sums of one readout.

    Args:
        features: Tokens of all views of all scenes one after the other, [n t d].
        scenes: The scenes.
        geometry: Their tokens' geometry.
        setup: How.

    Returns:
        Key of `Metric.sums` -> float64 [scenes 2]; zeros where there was nothing to measure.
    """
    tokens = features.split([len(scene.views) for scene in scenes])
    scores = [
        correspondence(part, place, setup.voxel, setup.radius)
        for part, place in zip(tokens, geometry, strict=True)
    ]
    sums: Sums = {}
    for name in Correspondence.__dataclass_fields__:
        found = np.array([score.values()[name] for score in scores])
        known = np.isfinite(found)
        sums[name] = np.stack([np.where(known, found, 0.0), known.astype(float)], axis=1)
    sums |= _token_probes(tokens, geometry)
    sums |= _object_probe(tokens, scenes, geometry)
    sums |= _pose_probe(tokens, scenes, setup.grid)
    return sums


def _token_probes(tokens: Sequence[Tensor], geometry: Sequence[TokenGeometry]) -> Sums:
    """Depth and normal under a token, by one probe with four outputs."""
    data = []
    for part, place in zip(tokens, geometry, strict=True):
        known = place.valid & (place.normals.norm(dim=-1) > 0)
        targets = torch.cat([place.depth[..., None], place.normals], dim=-1)
        data.append(ProbeData(part[known][::EVERY], targets[known][::EVERY]))
    found = _probe(data)
    if found is None:
        return _nothing(len(tokens), "depth", "normal")
    sums = _zeros(len(tokens), "depth", "normal")
    sums["depth_squares"] = found.squares[:, 0]
    sums["normal_squares"] = found.squares[:, 1:].sum(axis=1)
    for index, (guess, scene) in enumerate(zip(found.predictions, data, strict=True)):
        off = (guess[:, 0] - scene.targets[:, 0]).abs()
        cosine = functional.cosine_similarity(guess[:, 1:], scene.targets[:, 1:], dim=-1)
        angle = cosine.clamp(-1, 1).arccos()
        sums["depth_errors"][index] = off.sum().item(), len(off)
        sums["normal_errors"][index] = angle.sum().item(), len(angle)
    return sums


def _object_probe(
    tokens: Sequence[Tensor], scenes: Sequence[Scene], geometry: Sequence[TokenGeometry]
) -> Sums:
    """Middle of a thing in the robot's frame, from the mean of the tokens that show it."""
    data = []
    for part, scene, place in zip(tokens, scenes, geometry, strict=True):
        seen = place.cover.sum(dim=-1) >= LEAST_COVER  # [n k]
        weight = place.cover / place.cover.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        means = weight.to(part) @ part  # [n k d]
        centres = torch.tensor([thing.centre for thing in scene.things]).reshape(-1, 3).double()
        data.append(ProbeData(means[seen], centres.expand(len(part), -1, 3)[seen]))
    return _summed("object", _probe(data), len(tokens), slice(0, 3))


def _pose_probe(tokens: Sequence[Tensor], scenes: Sequence[Scene], grid: tuple[int, int]) -> Sums:
    """How the camera moved between two views one or two apart, from both views' pooled tokens."""
    data = []
    for part, scene in zip(tokens, scenes, strict=True):
        maps = rearrange(part, "n (gh gw) d -> n d gh gw", gh=grid[0])
        pooled = functional.adaptive_avg_pool2d(maps, POOL).flatten(1)
        count = len(part)
        pairs = [(i, j) for i in range(count) for j in range(count) if 0 < abs(i - j) <= 2]
        first, second = (torch.tensor(side, dtype=torch.long) for side in zip(*pairs, strict=True))
        poses = torch.from_numpy(scene.views.poses)
        both = torch.cat([pooled[first], pooled[second]], dim=-1)
        data.append(ProbeData(both, pose_change(poses[first], poses[second])))
    found = _probe(data)
    return _summed("shift", found, len(tokens), slice(0, 3)) | _summed(
        "turn", found, len(tokens), slice(3, 6)
    )


def _probe(data: list[ProbeData]) -> ProbeResult | None:
    """The probe's result; None where too few scenes have samples."""
    if sum(len(scene.features) > 0 for scene in data) < max(3, len(data)):
        return None
    return probe(data)


def _summed(name: str, found: ProbeResult | None, scenes: int, outputs: slice) -> Sums:
    sums = _zeros(scenes, name)
    if found is None:
        return sums
    sums[f"{name}_squares"] = found.squares[:, outputs].sum(axis=1)
    for index, error in enumerate(found.errors):
        lengths = error[:, outputs].norm(dim=-1)
        sums[f"{name}_errors"][index] = lengths.sum().item(), len(lengths)
    return sums


def _zeros(scenes: int, *names: str) -> Sums:
    return {f"{name}_{kind}": np.zeros((scenes, 2)) for name in names for kind in ("squares", "errors")}


_nothing = _zeros


def cache_key(**parts: object) -> str:
    """Hash over all that determines some numbers, 16 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_sums(path: Path) -> Sums | None:
    """Cached sums, or None."""
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return dict(stored)


def save_sums(path: Path, sums: Sums) -> None:
    """Keep sums; a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.savez(file, **sums)  # pyright: ignore[reportArgumentType]
    draft.rename(path)
