"""Linear probes of frozen features: ridge regressions on held-out groups, with bootstrap intervals.

A probe is cross-validated over scenes: each fold is predicted by a probe fitted to the others, whose
regularisation is chosen on a part of those. Sums per scene are kept (squared errors, squared deviations); R2
and its interval, a bootstrap over scenes, follow from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
