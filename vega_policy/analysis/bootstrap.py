"""Intervals over scenes: tokens of one picture are not independent, scenes are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile bootstrap interval.

    Attributes:
        value: Over all scenes.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


RESAMPLES = 2000


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """First over second sum, [... 2] -> [...]: a mean where the second counts; nan if nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def explained(sums: np.ndarray) -> np.ndarray:
    """R2 from squared errors and squared deviations, [... 2] -> [...]."""
    return 1 - ratio_of_sums(sums)


Statistic = Callable[[np.ndarray], np.ndarray]


def estimate(sums: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0) -> Estimate:
    """A statistic of sums over scenes, with an interval from redrawing the scenes.

    Args:
        sums: What each scene adds, [scenes k].
        statistic: From summed [... k] to [...].
        seed: Of the redrawing; the same seed redraws the same scenes, so that two estimates are paired.

    Raises:
        ValueError: If there is no scene.
    """
    return _interval(statistic, seed, sums)


def difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0
) -> Estimate:
    """Statistic of the first minus that of the second, scene by scene paired, both [scenes k].

    Raises:
        ValueError: If the two are not of the same scenes.
    """
    if len(first) != len(second):
        raise ValueError(f"expected sums of the same scenes, got {len(first)} and {len(second)}")
    return _interval(statistic, seed, first, second)


def _interval(statistic: Statistic, seed: int, *sums: np.ndarray) -> Estimate:
    scenes = len(sums[0])
    if scenes == 0:
        raise ValueError("expected at least one scene, got none")
    whole = [statistic(part.sum(axis=0)) for part in sums]
    value = float(whole[0] - whole[1] if len(whole) > 1 else whole[0])
    if scenes == 1:
        return Estimate(value, float("nan"), float("nan"))  # one scene says nothing about others
    draws = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    values = [statistic(draws @ part) for part in sums]
    spread = values[0] - values[1] if len(values) > 1 else values[0]
    low, high = np.nanquantile(spread, [0.025, 0.975]) if np.isfinite(spread).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))
