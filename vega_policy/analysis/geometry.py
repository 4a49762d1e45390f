"""Geometry in frozen features: correspondence between views, linear probes, and their sweep over layers.

The correspondence score of VEGA-3D is a cosine that is not centred: a component common to all tokens gives
0.9 for any two of them. Three numbers belong together: the score, the same for pairs of different places
(chance), and the score after the mean token is subtracted. Retrieval measures in metres: whether the most
similar token of the other view shows the same point.

A linear probe is a ridge regression, cross-validated over scenes: each fold is predicted by a probe fitted to
the others, whose regularisation is chosen on a part of those. Sums per scene are kept (squared errors,
squared deviations); R2 and its interval, a bootstrap over scenes, follow from them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.features import UNTRAINED, FeatureExtractor, FeatureSpec, cache_key, frames_of
from vega_policy.analysis.scenes import TokenGeometry, relative_pose, token_geometry
from vega_policy.data.scenes import Scene
from vega_policy.run_dir import atomic_file


@dataclass(frozen=True)
class Correspondence:
    """Scores of one scene, each a mean over pairs of adjacent views; nan if no two views share a place."""

    raw: float  # mean cosine of both views' mean tokens in the same voxel
    chance: float  # mean cosine over all pairs of different voxels
    centred: float  # `raw` after the scene's mean token is subtracted
    centred_chance: float
    retrieval: float  # fraction of points whose most similar token in the other view lies within the radius
    retrieval_chance: float  # the same for a token drawn at random


def correspondence(
    features: Tensor, geometry: TokenGeometry, voxel: float = 0.1, radius: float = 0.1
) -> Correspondence:
    """Compare each view of a scene with the next one, features [n t d].

    `voxel` is the side of a voxel (m), `radius` the distance (m) within which a retrieved token is correct.
    """
    if features.shape[:2] != geometry.valid.shape:
        raise ValueError(
            f"features [n t d] must have the tokens of the geometry {tuple(geometry.valid.shape)}; got "
            f"{tuple(features.shape)}"
        )
    if len(features) < 2:
        raise ValueError("correspondence compares views; this scene has only one")
    raw = functional.normalize(features.double(), dim=-1)
    centred = functional.normalize(raw - raw[geometry.valid].mean(dim=0), dim=-1)
    pairs = []
    for first in range(len(raw) - 1):
        two = slice(first, first + 2)
        points, valid = geometry.points[two], geometry.valid[two]
        scores = [*_voxel_scores(raw[two], points, valid, voxel)]
        scores += _voxel_scores(centred[two], points, valid, voxel)
        pairs.append(torch.stack([*scores, *_retrieval(centred[two], points, valid, radius)]))
    return Correspondence(*torch.stack(pairs).nanmean(dim=0).tolist())


def _voxel_scores(tokens: Tensor, points: Tensor, valid: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Return the mean cosine in shared voxels and between different ones; [2 t d], [2 t 3], [2 t]."""
    lowest = points[valid].amin(dim=0) if valid.any() else points.new_zeros(3)
    cells = ((points - lowest) / voxel).floor().long()
    _, inverse = torch.cat([cells[0][valid[0]], cells[1][valid[1]]]).unique(dim=0, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    means, occupied = [], []
    for view, index in enumerate(inverse.split([int(valid[0].sum()), int(valid[1].sum())])):
        total = tokens.new_zeros(count, tokens.shape[-1]).index_add(0, index, tokens[view][valid[view]])
        means.append(functional.normalize(total, dim=-1))
        occupied.append(torch.bincount(index, minlength=count) > 0)
    shared = occupied[0] & occupied[1]
    m = int(shared.sum())
    nan = tokens.new_tensor(float("nan"))
    if m == 0:
        return nan, nan
    first, second = means[0][shared], means[1][shared]
    same = (first * second).sum()
    different = (first.sum(dim=0) * second.sum(dim=0)).sum() - same  # over every pair of different voxels
    return same / m, different / (m * (m - 1)) if m > 1 else nan


def _retrieval(tokens: Tensor, points: Tensor, valid: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the fraction of points retrieved in the other view, and chance level, over both directions."""
    near = torch.cdist(points[0], points[1]) <= radius  # [t t]
    near &= valid[0][:, None] & valid[1][None]
    similarity = tokens[0] @ tokens[1].T
    correct, by_chance = [], []
    for close, similar, candidates in ((near, similarity, valid[1]), (near.T, similarity.T, valid[0])):
        shared = close.any(dim=1)  # points that the other view shows too
        best = similar.masked_fill(~candidates[None], -2.0)[shared].argmax(dim=1)
        correct.append(close[shared].gather(1, best[:, None])[:, 0].double())
        by_chance.append(close[shared].sum(dim=1) / candidates.sum().clamp_min(1))
    return torch.cat(correct).mean(), torch.cat(by_chance).double().mean()


def match_tokens(
    tokens: Tensor, geometry: TokenGeometry, left: int, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Match the tokens of view `left` that the next view shows too with their most similar tokens there.

    Tokens are those of both views [2 t d]. Returns indices in the first view [m], in the second [m], and
    whether the match lies within `radius` (m), bool [m].
    """
    centred = functional.normalize(tokens - tokens.flatten(0, 1).mean(dim=0), dim=-1)
    near = torch.cdist(geometry.points[left], geometry.points[left + 1]) <= radius
    near &= geometry.valid[left][:, None] & geometry.valid[left + 1][None]
    first = near.any(dim=1).nonzero()[:, 0]
    similarity = (centred[0] @ centred[1].T).masked_fill(~geometry.valid[left + 1][None], -2.0)
    second = similarity[first].argmax(dim=1)
    return first, second, near[first, second]


RESAMPLES = 2000
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile bootstrap interval over scenes."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate in another unit; a negative factor swaps the interval's ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high)


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return the first over the second sum, [... 2] -> [...]; nan if the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def r_squared(sums: np.ndarray) -> np.ndarray:
    """Return R2 of summed squared errors and squared deviations, [... 2] -> [...]."""
    return 1 - ratio_of_sums(sums)


def estimate(sums: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0) -> Estimate:
    """Estimate a statistic ([... k] -> [...]) of sums over scenes [scenes k].

    Equal seeds draw equal scenes, so that two estimates are paired.
    """
    return _bootstrap(statistic, seed, sums)


def difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0
) -> Estimate:
    """Estimate a statistic of the first minus that of the second, paired by scene, both [scenes k]."""
    if len(first) != len(second):
        raise ValueError(f"expected sums of the same scenes, got {len(first)} and {len(second)}")
    return _bootstrap(statistic, seed, first, second)


def _bootstrap(statistic: Statistic, seed: int, *sums: np.ndarray) -> Estimate:
    # One multinomial draw of scene counts instead of scipy.stats.bootstrap: 2,000 matrix products of sums.
    scenes = len(sums[0])
    if scenes == 0:
        raise ValueError("expected at least one scene, got none")
    totals = [statistic(part.sum(axis=0)) for part in sums]
    value = float(totals[0] - totals[1] if len(totals) > 1 else totals[0])
    if scenes == 1:
        return Estimate(value, float("nan"), float("nan"))
    counts = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    values = [statistic(counts @ part) for part in sums]
    spread = values[0] - values[1] if len(values) > 1 else values[0]
    low, high = np.nanquantile(spread, [0.025, 0.975]) if np.isfinite(spread).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


FOLDS = 5
RIDGE_STRENGTHS = (1e-4, 1e-2, 1.0)  # candidates, relative to the features' mean variance
TOKEN_STRIDE = 3  # every third token goes into the probes of depth and normals
MIN_COVERAGE = 0.5  # tokens that an object must cover to be probed
POSE_GRID = (2, 2)  # grid to which views are pooled for the probe of the camera's motion


@dataclass(frozen=True)
class ProbeData:
    """Samples of one scene."""

    features: Tensor  # [m d]
    targets: Tensor  # [m k]


@dataclass(frozen=True)
class ProbeResult:
    """Predictions of a probe for scenes that it was not fitted to."""

    # Summed squared errors and summed squared deviations from the fitted scenes' mean, whose ratio is 1 - R2.
    squares: np.ndarray  # [scenes k 2]
    predictions: list[Tensor]  # of each scene, [m k]
    errors: list[Tensor]  # of each scene, prediction minus target, [m k]


def cross_validate(scenes: list[ProbeData], folds: int = FOLDS) -> ProbeResult:
    """Predict each scene with a probe fitted to all other folds; scene i belongs to fold i modulo `folds`."""
    if len(scenes) < 3:
        raise ValueError(f"expected at least 3 scenes to test a probe on held-out scenes; got {len(scenes)}")
    folds = min(folds, len(scenes))
    predictions: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    squares = np.zeros((len(scenes), scenes[0].targets.shape[1], 2))
    for fold in range(folds):
        ridge = _fit_best([scene for index, scene in enumerate(scenes) if index % folds != fold])
        for index in range(fold, len(scenes), folds):
            targets = scenes[index].targets.double()
            predictions[index] = ridge.predict(scenes[index].features)
            errors[index] = predictions[index] - targets
            squares[index, :, 0] = errors[index].square().sum(dim=0)
            squares[index, :, 1] = (targets - ridge.mean_target).square().sum(dim=0)
    order = range(len(scenes))
    return ProbeResult(squares, [predictions[i] for i in order], [errors[i] for i in order])


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression on standardised features."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    weights: Tensor  # [d k]
    mean_target: Tensor  # [k]

    def predict(self, features: Tensor) -> Tensor:
        """Predict targets, [m d] -> [m k]."""
        return (features.double() - self.mean) / self.scale @ self.weights + self.mean_target


def _fit(scenes: list[ProbeData], strengths: Sequence[float]) -> list[Ridge]:
    """Fit one ridge regression per strength, from the smaller of the two Gram matrices."""
    features = torch.cat([scene.features for scene in scenes]).double()
    targets = torch.cat([scene.targets for scene in scenes]).double()
    mean, mean_target = features.mean(dim=0), targets.mean(dim=0)
    x, y = features - mean, targets - mean_target
    scale = x.square().mean(dim=0).sqrt()
    scale = scale.clamp_min(1e-6 * scale.max().clamp_min(1e-12))
    x = x / scale
    samples, width = x.shape
    primal = width <= samples
    gram = (x.float().T @ x.float() if primal else x.float() @ x.float().T).double()
    values, vectors = torch.linalg.eigh(gram)
    projected = vectors.T @ (x.T @ y if primal else y)
    solutions = [vectors @ (projected / (values + strength * samples)[:, None]) for strength in strengths]
    return [Ridge(mean, scale, solution if primal else x.T @ solution, mean_target) for solution in solutions]


def _fit_best(scenes: list[ProbeData]) -> Ridge:
    """Fit to all scenes, with the strength that has the least error on every fourth of them."""
    validation = scenes[::4]
    rest = [scene for index, scene in enumerate(scenes) if index % 4]
    losses = [
        sum((ridge.predict(scene.features) - scene.targets).square().sum().item() for scene in validation)
        for ridge in _fit(rest, RIDGE_STRENGTHS)
    ]
    return _fit(scenes, (RIDGE_STRENGTHS[int(np.argmin(losses))],))[0]


@dataclass(frozen=True)
class Metric:
    """A number of the report, computed from sums per scene."""

    title: str  # heading of its column
    sums: str  # key of its sums
    statistic: Statistic = ratio_of_sums
    scale: float = 1.0  # factor into the unit of the title
    higher_is_better: bool = True


DEGREES = 180 / math.pi
METRICS: dict[str, Metric] = {
    "raw": Metric("correspondence", "raw"),
    "chance": Metric("its chance level", "chance"),
    "centred": Metric("centred", "centred"),
    "centred_chance": Metric("its chance level", "centred_chance"),
    "retrieval": Metric("retrieval", "retrieval"),
    "retrieval_chance": Metric("its chance level", "retrieval_chance"),
    "depth_r2": Metric("depth R2", "depth_squares", r_squared),
    "depth_cm": Metric("depth error (cm)", "depth_errors", scale=100, higher_is_better=False),
    "normal_r2": Metric("normal R2", "normal_squares", r_squared),
    "normal_deg": Metric("normal error (deg)", "normal_errors", scale=DEGREES, higher_is_better=False),
    "object_r2": Metric("object R2", "object_squares", r_squared),
    "object_cm": Metric("object error (cm)", "object_errors", scale=100, higher_is_better=False),
    "shift_r2": Metric("camera shift R2", "shift_squares", r_squared),
    "shift_cm": Metric("camera shift error (cm)", "shift_errors", scale=100, higher_is_better=False),
    "turn_r2": Metric("camera turn R2", "turn_squares", r_squared),
    "turn_deg": Metric("camera turn error (deg)", "turn_errors", scale=DEGREES, higher_is_better=False),
}
HEADLINE = ("centred", "retrieval", "depth_r2", "normal_r2", "object_r2", "shift_r2", "turn_r2")
"""Metrics on which a prior is compared with its untrained copy, and which have heat maps."""

Sums = dict[str, np.ndarray]
"""`Metric.sums` -> float64 [scenes 2]; zeros where there was nothing to measure."""


def metric_value(sums: Sums, name: str) -> Estimate:
    """Return a metric with its interval; nan where the scenes did not allow it."""
    metric = METRICS[name]
    return estimate(sums[metric.sums], metric.statistic).scaled(metric.scale)


def metric_gain(first: Sums, second: Sums, name: str) -> Estimate:
    """Return by how much the first is better than the second, paired by scene; positive is better."""
    metric = METRICS[name]
    sign = 1 if metric.higher_is_better else -1
    return difference(first[metric.sums], second[metric.sums], metric.statistic).scaled(sign * metric.scale)


@dataclass(frozen=True)
class Measurement:
    """Parameters of the measurement."""

    grid: tuple[int, int]  # token grid (gh, gw)
    voxel: float = 0.1  # m, side of a voxel of the correspondence score
    radius: float = 0.1  # m, distance within which a retrieved token is correct


def measure(
    features: Tensor, scenes: Sequence[Scene], geometry: Sequence[TokenGeometry], measurement: Measurement
) -> Sums:
    """Return all sums of one kind of features: tokens [n t d] of all views of all scenes, scene by scene."""
    tokens = features.split([len(scene.views) for scene in scenes])
    scores = [
        asdict(correspondence(part, place, measurement.voxel, measurement.radius))
        for part, place in zip(tokens, geometry, strict=True)
    ]
    sums: Sums = {}
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        known = np.isfinite(values)
        sums[name] = np.stack([np.where(known, values, 0.0), known.astype(float)], axis=1)
    sums |= _probe_tokens(tokens, geometry)
    sums |= _probe_objects(tokens, scenes, geometry)
    sums |= _probe_camera_motion(tokens, scenes, measurement.grid)
    return sums


def _probe_tokens(tokens: Sequence[Tensor], geometry: Sequence[TokenGeometry]) -> Sums:
    """Probe depth and normal under a token, with one probe of four outputs."""
    data = []
    for part, place in zip(tokens, geometry, strict=True):
        known = place.valid & (place.normals.norm(dim=-1) > 0)
        targets = torch.cat([place.depth[..., None], place.normals], dim=-1)
        data.append(ProbeData(part[known][::TOKEN_STRIDE], targets[known][::TOKEN_STRIDE]))
    result = _cross_validate_or_none(data)
    sums = _sum_errors("depth", result, len(data), slice(0, 1)) | _sum_errors(
        "normal", result, len(data), slice(1, 4)
    )
    if result is not None:  # the error of a normal is an angle
        for index, (predicted, scene) in enumerate(zip(result.predictions, data, strict=True)):
            cosine = functional.cosine_similarity(predicted[:, 1:], scene.targets[:, 1:], dim=-1)
            angle = cosine.clamp(-1, 1).arccos()
            sums["normal_errors"][index] = angle.sum().item(), len(angle)
    return sums


def _probe_objects(
    tokens: Sequence[Tensor], scenes: Sequence[Scene], geometry: Sequence[TokenGeometry]
) -> Sums:
    """Probe an object's centre in the robot's frame, from the mean of the tokens that show it."""
    data = []
    for part, scene, place in zip(tokens, scenes, geometry, strict=True):
        visible = place.coverage.sum(dim=-1) >= MIN_COVERAGE  # [n k]
        weight = place.coverage / place.coverage.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        means = weight.to(part) @ part  # [n k d]
        centres = torch.tensor([one.centre for one in scene.objects]).reshape(-1, 3).double()
        data.append(ProbeData(means[visible], centres.expand(len(part), -1, 3)[visible]))
    return _sum_errors("object", _cross_validate_or_none(data), len(data), slice(0, 3))


def _probe_camera_motion(tokens: Sequence[Tensor], scenes: Sequence[Scene], grid: tuple[int, int]) -> Sums:
    """Probe the camera's motion between views one or two apart, from both views' pooled tokens."""
    data = []
    for part, scene in zip(tokens, scenes, strict=True):
        maps = rearrange(part, "n (gh gw) d -> n d gh gw", gh=grid[0])
        pooled = functional.adaptive_avg_pool2d(maps, POSE_GRID).flatten(1)
        views = range(len(part))
        pairs = [(i, j) for i in views for j in views if 0 < abs(i - j) <= 2]
        first, second = (torch.tensor(side, dtype=torch.long) for side in zip(*pairs, strict=True))
        poses = torch.from_numpy(scene.views.poses)
        both = torch.cat([pooled[first], pooled[second]], dim=-1)
        data.append(ProbeData(both, relative_pose(poses[first], poses[second])))
    result = _cross_validate_or_none(data)
    shift = _sum_errors("shift", result, len(data), slice(0, 3))
    return shift | _sum_errors("turn", result, len(data), slice(3, 6))


def _cross_validate_or_none(data: list[ProbeData]) -> ProbeResult | None:
    """Return the probe's result; None unless there are three scenes and all have samples."""
    if sum(len(scene.features) > 0 for scene in data) < max(3, len(data)):
        return None
    return cross_validate(data)


def _sum_errors(name: str, result: ProbeResult | None, scenes: int, outputs: slice) -> Sums:
    """Sum squares, and lengths of the error vector, over some outputs of a probe."""
    sums = {f"{name}_{kind}": np.zeros((scenes, 2)) for kind in ("squares", "errors")}
    if result is not None:
        sums[f"{name}_squares"] = result.squares[:, outputs].sum(axis=1)
        for index, error in enumerate(result.errors):
            lengths = error[:, outputs].norm(dim=-1)
            sums[f"{name}_errors"][index] = lengths.sum().item(), len(lengths)
    return sums


@dataclass(frozen=True)
class SceneSet:
    """Scenes with the hash that identifies them."""

    key: str
    scenes: list[Scene]
    max_depth: float = 10.0  # m, depth beyond it counts as unknown


@dataclass(frozen=True)
class Sweep:
    """Sums of all measured features, and the prior's features that a policy would use."""

    sums: dict[FeatureSpec, Sums]
    default: FeatureSpec

    def table(self) -> dict[FeatureSpec, dict[str, Estimate]]:
        """Return all metrics of all features."""
        return {
            spec: {name: metric_value(sums, name) for name in METRICS} for spec, sums in self.sums.items()
        }

    def main_specs(self) -> list[FeatureSpec]:
        """Return the features of the main table: the prior's default, its copy's, and all without layers."""
        place = (self.default.layer, self.default.noise_level)
        return [spec for spec in self.sums if spec.layer is None or (spec.layer, spec.noise_level) == place]

    def untrained_copy(self) -> FeatureSpec | None:
        """Return the untrained copy's features at the default layer and noise level; None without a copy."""
        copy = FeatureSpec(UNTRAINED, self.default.layer, self.default.noise_level)
        return copy if copy in self.sums else None

    def gains(self, other: FeatureSpec) -> dict[str, Estimate]:
        """Return by how much the prior's default features are better than others, per headline metric."""
        return {name: metric_gain(self.sums[self.default], self.sums[other], name) for name in HEADLINE}


def run_sweep(
    scenes: SceneSet,
    extractors: Sequence[FeatureExtractor],
    default: FeatureSpec,
    measurement: Measurement,
    cache: Path,
) -> Sweep:
    """Measure all features of all extractors, except those that the folder `cache` holds."""
    geometry = [
        token_geometry(scene.views, measurement.grid, len(scene.objects), scenes.max_depth)
        for scene in scenes.scenes
    ]
    frames = frames_of(scenes.scenes)
    results: dict[FeatureSpec, Sums] = {}
    for extractor in extractors:
        key = {"scenes": scenes.key, "max_depth": scenes.max_depth, "weights": extractor.fingerprint}
        key["measurement"] = asdict(measurement)
        files = {spec: cache / f"{cache_key(spec=asdict(spec), **key)}.npz" for spec in extractor.specs}
        missing = [spec for spec, path in files.items() if not path.is_file()]
        if missing:
            extracted = extractor.extract(frames, missing)
            for spec, tokens in tqdm(extracted, f"Measuring {extractor.name}", len(missing), unit="layer"):
                sums = measure(tokens, scenes.scenes, geometry, measurement)
                with atomic_file(files[spec]) as draft, draft.open("wb") as file:
                    np.savez(file, **sums)  # pyright: ignore[reportArgumentType]
        for spec, path in files.items():
            with np.load(path) as stored:
                results[spec] = dict(stored)
    return Sweep(results, default)
