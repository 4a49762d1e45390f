"""Linear probes of frozen features: ridge regressions on held-out scenes, with bootstrap intervals.

A probe is cross-validated over scenes: each fold is predicted by a probe fitted to the others, whose
regularisation is chosen on a part of those. Sums per scene are kept (squared errors, squared deviations); R2
and its interval, a bootstrap over scenes, follow from them.

The second half reads out the future: where hand and object will be, and what will move, from one moment of a
demonstration. There a scene is an episode, or all episodes of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis import FutureSettings
from vega_policy.data.scenes import Demonstration

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

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit; a negative factor swaps the interval's ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high)

    def rounded(self) -> list[float | None]:
        """Return value and interval to five digits, None for nan, for a summary in JSON."""
        return [None if np.isnan(x) else round(x, 5) for x in (self.value, self.low, self.high)]


def format_estimate(number: Estimate) -> str:
    """Format a value with its interval; a dash if it is nan, the value alone if the interval is."""
    if not np.isfinite(number.value):
        return "\u2013"
    return str(number) if np.isfinite(number.low) else f"{number.value:.3f}"


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

    Raises:
        ValueError: If there is no scene.
    """
    return _bootstrap(statistic, seed, sums)


def difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0
) -> Estimate:
    """Estimate a statistic of the first minus that of the second, paired by scene, both [scenes k].

    Raises:
        ValueError: If the two have different numbers of scenes.
    """
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


Sums = dict[str, np.ndarray]
"""`Metric.sums` -> float64 [scenes 2]; zeros where there was nothing to measure."""


@dataclass(frozen=True)
class Metric:
    """A number of the report, computed from sums per scene."""

    title: str  # heading of its column
    sums: str  # key of its sums
    statistic: Statistic = ratio_of_sums
    scale: float = 1.0  # factor into the unit of the title
    higher_is_better: bool = True

    def value(self, sums: Sums) -> Estimate:
        """Return the metric with its interval; nan where the scenes did not allow it."""
        return estimate(sums[self.sums], self.statistic).scaled(self.scale)

    def gain(self, first: Sums, second: Sums) -> Estimate:
        """Return by how much the first is better than the second, paired by scene; positive is better."""
        sign = 1 if self.higher_is_better else -1
        return difference(first[self.sums], second[self.sums], self.statistic).scaled(sign * self.scale)


FOLDS = 5
RIDGE_STRENGTHS = (1e-4, 1e-2, 1.0)  # candidates, relative to the features' mean variance


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
    """Predict each scene with a probe fitted to all other folds; scene i belongs to fold i modulo `folds`.

    Raises:
        ValueError: If there are too few scenes to hold one out and choose a regularisation.
    """
    if len(scenes) < 3:
        raise ValueError(f"expected at least 3 scenes to test a probe on held-out scenes; got {len(scenes)}")
    return predict_folds([scenes] * min(folds, len(scenes)))


def predict_folds(folds: Sequence[list[ProbeData]]) -> ProbeResult:
    """Predict scene i with a probe fitted to those of other folds; its fold is i modulo their number.

    `folds` holds all scenes once a fold, with the features that the fold's probe reads.
    """
    count = len(folds[0])
    predictions: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    squares = np.zeros((count, folds[0][0].targets.shape[1], 2))
    for fold, scenes in enumerate(folds):
        ridge = _fit_best([scene for index, scene in enumerate(scenes) if index % len(folds) != fold])
        for index in range(fold, count, len(folds)):
            targets = scenes[index].targets.double()
            predictions[index] = ridge.predict(scenes[index].features)
            errors[index] = predictions[index] - targets
            squares[index, :, 0] = errors[index].square().sum(dim=0)
            squares[index, :, 1] = (targets - ridge.mean_target).square().sum(dim=0)
    return ProbeResult(squares, [predictions[i] for i in range(count)], [errors[i] for i in range(count)])


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


NOTHING = "nothing"
"""What moves where no part moves."""


@dataclass(frozen=True)
class Future:
    """What happens after each of the n moments of a demonstration."""

    gripper: Tensor  # [n h 3], displacement (m) after each horizon
    target: Tensor  # [n h 3], that of the part that moves now or next
    mover: tuple[
        str, ...
    ]  # [n], kind of the part that moves farthest within the longest horizon, or `NOTHING`
    begins: Tensor  # bool [n], whether that part has not moved in as many steps before

    def __len__(self) -> int:
        return len(self.mover)


def future_of(demonstration: Demonstration, horizons: Sequence[int], moved: float) -> Future:
    """Return what happens after each moment; a part has moved where it is more than `moved` metres away.

    Where no part moves until the end of the episode, the target is the one that moved last.

    Raises:
        ValueError: If the episode ends before the longest horizon of a moment, or nothing moves in it.
    """
    steps, paths = demonstration.steps, demonstration.positions
    longest = horizons[-1]
    if steps[-1] + longest >= len(paths):
        raise ValueError(
            f"{demonstration.name}: expected {longest} steps behind each moment; the last one is step "
            f"{steps[-1]} of {len(paths)}"
        )
    targets, mover, begins = [], [], []
    for step in steps.tolist():
        away = np.linalg.norm(paths[step:] - paths[step], axis=-1)  # [t-step k]
        beyond = (away > moved).any(axis=1)
        if beyond.any():
            targets.append(int(away[beyond.argmax()].argmax()))
        elif targets:
            targets.append(targets[-1])
        else:
            raise ValueError(f"{demonstration.name}: no part moves by more than {moved} m")
        farthest = away[: longest + 1].max(axis=0)
        part = int(farthest.argmax())
        does_move = bool(farthest[part] > moved)
        before = paths[max(0, step - longest) : step + 1, part] - paths[step, part]
        mover.append(demonstration.objects[part] if does_move else NOTHING)
        begins.append(does_move and bool(np.linalg.norm(before, axis=-1).max() <= moved))
    later = steps[:, None] + np.array(horizons)  # [n h]
    shift = paths[later, np.array(targets)[:, None]] - paths[steps, targets][:, None]
    hand = demonstration.gripper[later] - demonstration.gripper[steps][:, None]
    return Future(torch.from_numpy(hand), torch.from_numpy(shift), tuple(mover), torch.tensor(begins))


def future_metrics(horizons: Sequence[int]) -> dict[str, Metric]:
    """Return the metrics of the future: R2 and error of each displacement, and two accuracies in %."""
    metrics = {}
    for part in ("gripper", "target"):
        for steps in horizons:
            name = f"{part}_{steps}"
            metrics[f"{name}_r2"] = Metric(f"{part} +{steps} R2", f"{name}_squares", r_squared)
            title = f"{part} +{steps} error (cm)"
            metrics[f"{name}_cm"] = Metric(title, f"{name}_errors", scale=100, higher_is_better=False)
    metrics["moves"] = Metric("what moves (%)", "moves", scale=100)
    metrics["begins"] = Metric("what begins to move (%)", "begins", scale=100)
    return metrics


def principal_components(parts: Sequence[Tensor], fitted: Sequence[int], count: int) -> list[Tensor]:
    """Project features [n ... d] to principal components fitted to some of the parts alone, -> [n count].

    Each of the d channels is scaled to unit deviation before, over all its places.
    """
    scale = torch.cat([parts[i].flatten(0, -2) for i in fitted]).float().std(dim=0).clamp_min(1e-6)
    x = torch.cat([(parts[i].float() / scale).flatten(1) for i in fitted])
    mean = x.mean(dim=0)
    x -= mean
    count = min(count, *x.shape)
    values, vectors = torch.linalg.eigh((x @ x.T).double())  # samples are fewer than features
    values, vectors = values[-count:].clamp_min(1e-9 * values[-1].clamp_min(1e-9)), vectors[:, -count:]
    axes = x.T @ (vectors / values.sqrt()).float()
    return [((part.float() / scale).flatten(1) - mean) @ axes for part in parts]


def probe_future(
    features: Sequence[Tensor] | None,
    appended: Mapping[str, Sequence[Tensor]],
    futures: Sequence[Future],
    units: Sequence[Sequence[int]],
    horizons: Sequence[int],
    components: int,
) -> dict[str, Sums]:
    """Read out the future of episodes from features [n ... d], with each of `appended` [n a] beside them.

    A unit holds indices of episodes that are held out together, and is what sums are kept of. The principal
    components are fitted to the same episodes as the probes. Without features only what is appended is read.

    Raises:
        ValueError: If there are too few units to hold one out and choose a regularisation.
    """
    if len(units) < 3:
        raise ValueError(f"expected at least 3 episodes or tasks to hold some out; got {len(units)}")
    folds = min(FOLDS, len(units))
    reduced = []
    for fold in range(folds):
        fitted = [index for place, unit in enumerate(units) if place % folds != fold for index in unit]
        if features is None:  # a constant, whose probe predicts the mean
            reduced.append([torch.zeros(len(future), 1) for future in futures])
        else:
            reduced.append(principal_components(features, fitted, components))
    found = {}
    for name, others in appended.items():
        inputs = [[torch.cat(pair, dim=1) for pair in zip(part, others, strict=True)] for part in reduced]
        found[name] = _probe_targets(inputs, futures, units, horizons)
    return found


def _probe_targets(
    inputs: Sequence[Sequence[Tensor]],
    futures: Sequence[Future],
    units: Sequence[Sequence[int]],
    horizons: Sequence[int],
) -> Sums:
    """Return all sums of one kind of inputs, those of each fold by episode [n d]."""

    def probe(targets: Sequence[Tensor], chosen: Sequence[Tensor] | None = None) -> ProbeResult:
        chosen = chosen or [torch.ones(len(future), dtype=torch.bool) for future in futures]
        return predict_folds(
            [
                [
                    ProbeData(*(torch.cat([x[i][chosen[i]] for i in unit]) for x in (part, targets)))
                    for unit in units
                ]
                for part in inputs
            ]
        )

    sums: Sums = {}
    for part in ("gripper", "target"):
        for place, steps in enumerate(horizons):
            result = probe([getattr(future, part)[:, place] for future in futures])
            sums[f"{part}_{steps}_squares"] = result.squares.sum(axis=1)
            lengths = [error.norm(dim=-1) for error in result.errors]
            sums[f"{part}_{steps}_errors"] = np.array([(x.sum().item(), len(x)) for x in lengths])
    kinds = sorted({kind for future in futures for kind in future.mover})
    classes = [torch.tensor([kinds.index(kind) for kind in future.mover]) for future in futures]
    targets = [functional.one_hot(x, len(kinds)) for x in classes]
    for name, chosen in (("moves", None), ("begins", [future.begins for future in futures])):
        result = probe(targets, chosen)
        hits = []
        for predicted, error in zip(result.predictions, result.errors, strict=True):
            is_right = predicted.argmax(dim=1) == (predicted - error).argmax(dim=1)
            hits.append((is_right.sum().item(), len(is_right)))
        sums[name] = np.array(hits, dtype=float)
    return sums


CONSTANT, PROPRIOCEPTION = "nothing known", "proprioception only"
STATE, TASK = "state", "state and task"  # appended to features


def probe_moments(
    settings: FutureSettings, features: list[Tensor] | None, episodes: list[Demonstration], name: str
) -> dict[tuple[str, str], Sums]:
    """Return the sums of a row of the report by held-out unit and name of the row, with all that is appended.

    Without features the rows are those of nothing, of proprioception, and of proprioception and task.
    """
    futures = [future_of(one, settings.horizons, settings.moved) for one in episodes]
    tasks = list(dict.fromkeys(one.task for one in episodes))
    state = [torch.from_numpy(one.state) for one in episodes]
    hot = torch.eye(len(tasks))
    with_task = [
        torch.cat([part, hot[tasks.index(one.task)].expand(len(part), -1)], dim=1)
        for part, one in zip(state, episodes, strict=True)
    ]
    appended = {"": [part[:, :0] for part in state], STATE: state, TASK: with_task}
    names = {"": name or CONSTANT, STATE: f"{name} + {STATE}" if name else PROPRIOCEPTION}
    names[TASK] = f"{name} + {TASK}" if name else f"{PROPRIOCEPTION} + task"
    by_task = [[i for i, one in enumerate(episodes) if one.task == task] for task in tasks]
    units = {"episodes": [[i] for i in range(len(episodes))], "tasks": by_task}
    found = {}
    for unit, groups in units.items():
        if len(groups) < 3 and unit == "tasks":
            continue
        # a held-out task has no number that the probe could have learned
        chosen = {key: part for key, part in appended.items() if (unit, key) != ("tasks", TASK)}
        sums = probe_future(features, chosen, futures, groups, settings.horizons, settings.components)
        found |= {(unit, names[key]): part for key, part in sums.items()}
    return found


Numbers = dict[str, Estimate]
"""Key of `future_metrics` -> value."""


def future_gains(rows: Mapping[str, Sums], metrics: Mapping[str, Metric]) -> dict[str, dict[str, Numbers]]:
    """Return by how much each reading of a future is better than all others with the same appended."""
    proprioception = {STATE: PROPRIOCEPTION, TASK: f"{PROPRIOCEPTION} + task"}
    gains = {}
    for appended, alone in proprioception.items():
        alike = {name: sums for name, sums in rows.items() if name.endswith(f"+ {appended}") or name == alone}
        for first in (name for name in alike if name.startswith("future")):
            gains[first] = {
                other: {key: metric.gain(alike[first], sums) for key, metric in metrics.items()}
                for other, sums in alike.items()
                if other != first
            }
    return gains
