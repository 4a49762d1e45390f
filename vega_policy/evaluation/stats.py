"""Statistics of success counts: confidence intervals, paired tests and averages over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, t

MIN_TASKS = 5
"""Fewer tasks have no interval over tasks."""


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a success probability, without continuity correction.

    Raises:
        ValueError: If not 0 <= successes <= trials, there is no trial, or confidence is outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    return _wilson(successes / trials, trials, confidence)


def repeated_wilson_interval(successes: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of a success probability from k repetitions of n initial states, bool [k n].

    Episodes from one state are correlated, so they count as p (1 - p) / var trials, var being the variance of
    the mean over states: the effective sample size of surveys (Franco, Little, Louis and Slud, Journal of
    Survey Statistics and Methodology 7, 2019). It is kept between n (repetitions add nothing; also taken at
    rates of 0 and 1) and k n (all episodes are independent). With k = 1 this is `wilson_interval`.

    Raises:
        ValueError: If there is no episode.
    """
    if successes.ndim != 2 or successes.size == 0:
        raise ValueError(f"expected successes of shape [k n] with k, n >= 1, got {list(successes.shape)}")
    rate, states = float(successes.mean()), successes.shape[1]
    trials = float(states)
    if successes.shape[0] > 1 and states > 1 and 0 < rate < 1:
        variance = float(successes.mean(axis=0).var(ddof=1)) / states
        trials = float(np.clip(rate * (1 - rate) / max(variance, 1e-12), states, successes.size))
    return _wilson(rate, trials, confidence)


def paired_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the adjusted Wald interval of a mean difference in success between paired episodes.

    The differences [n] in [-1, 1] are first minus second policy by initial state, means over repetitions. One
    state that only the first policy solves and one that only the second solves are added before mean and
    variance are computed (Bonett and Price, Journal of Educational and Behavioral Statistics 37, 2012; there
    for one episode a state). Unlike a bootstrap of the pairs, the interval keeps a width where the policies
    hardly ever disagree: with 50 pairs, where the first policy alone solves one state in a hundred and the
    second alone none, a percentile bootstrap covers the truth in 39% of the cases.

    Raises:
        ValueError: If there is no difference, or one is outside [-1, 1].
    """
    if differences.ndim != 1 or len(differences) == 0:
        raise ValueError(f"expected differences [n] with n >= 1, got shape {list(differences.shape)}")
    valid = np.abs(differences) <= 1  # False for NaN
    if not valid.all():
        raise ValueError(f"expected differences in [-1, 1], got {differences[~valid][0]}")
    padded = np.append(differences, [1.0, -1.0])
    center = float(padded.mean())
    margin = _quantile(confidence) * float(padded.std()) / math.sqrt(len(padded))
    return Interval(max(-1.0, center - margin), min(1.0, center + margin))


def student_interval(values: np.ndarray) -> Interval:
    """Return Student's 95% interval of the mean of independent values [n].

    Raises:
        ValueError: If there are fewer than two values.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected values [n] with n >= 2, got shape {list(values.shape)}")
    center, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    margin = float(t.ppf(0.975, len(values) - 1)) * error
    return Interval(center - margin, center + margin)


@dataclass(frozen=True)
class TaskDifference:
    """Mean of the tasks' paired differences in success, first minus second; every task has one weight."""

    tasks: int
    difference: float  # in [-1, 1]
    low: float | None  # of the 95% interval; None where all tasks have the same difference
    high: float | None
    better: int  # tasks that the first policy solved more often
    worse: int

    def describe(self, row: str) -> str:
        """Return one sentence, in %, for a row of a table."""
        change = f"{100 * self.difference:+.1f} in every task, no interval"
        if self.low is not None and self.high is not None:
            change = f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{row}, over {self.tasks} tasks: {change}; tasks better : worse {self.better}:{self.worse}."


def difference_over_tasks(changes: np.ndarray, tasks: Sequence[str]) -> TaskDifference | None:
    """Return the mean difference over tasks with Student's interval; None for fewer than `MIN_TASKS`.

    The changes, int [k n], are first minus second policy by seed and initial state, and `tasks` [n] names the
    states' tasks. The sample are the tasks, so the states of one task need not be independent.
    """
    names, places = np.unique(tasks, return_inverse=True)
    if len(names) < MIN_TASKS:
        return None
    sums = np.bincount(places, weights=changes.sum(axis=0))  # exactly 0 for a task that is neither
    means = sums / (np.bincount(places) * len(changes))
    interval = student_interval(means) if np.ptp(means) > 0 else None
    return TaskDifference(
        tasks=len(names),
        difference=float(means.mean()),
        low=None if interval is None else max(-1.0, interval.low),
        high=None if interval is None else min(1.0, interval.high),
        better=int((sums > 0).sum()),
        worse=int((sums < 0).sum()),
    )


def interval_of_mean(rates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of independent estimates from the interval of each.

    The squared distances of the estimates to their limits are added separately below and above, so that the
    result is as asymmetric near 0 and 1 as the intervals (MOVER: Zou and Donner, Statistics in Medicine 27,
    2008).

    Raises:
        ValueError: If there is no estimate.
    """
    if not rates:
        raise ValueError("expected at least one estimate, got none")
    mean = math.fsum(rates) / len(rates)
    pairs = list(zip(rates, intervals, strict=True))
    below = math.hypot(*(rate - interval.low for rate, interval in pairs)) / len(rates)
    above = math.hypot(*(interval.high - rate for rate, interval in pairs)) / len(rates)
    return Interval(mean - below, mean + above)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test on the episodes that only one policy solved.

    Raises:
        ValueError: If a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"expected counts of at least 0, got {only_first} and {only_second}")
    disagreements = only_first + only_second
    return float(binomtest(only_first, disagreements).pvalue) if disagreements else 1.0


def sign_flip_exact(differences: np.ndarray) -> float:
    """Return the exact two-sided p-value of the paired randomisation test on a sum of integer differences.

    They are by state [n]: episodes that the first policy solved minus those of the second. Under the null
    hypothesis the two may be swapped at each initial state (Fisher, The Design of Experiments, 1935, section
    21). With one episode a state this is McNemar's exact test; with several, the episodes of a state are
    swapped together. scipy's `permutation_test` enumerates the 2^n swaps; this convolves the distribution of
    the sum, which is exact for hundreds of states.
    """
    distribution = np.ones(1)  # of the sum, from -total to total
    for size, count in zip(
        *np.unique(np.abs(differences[differences != 0]), return_counts=True), strict=True
    ):
        flips = np.zeros(2 * int(size * count) + 1)
        flips[:: 2 * int(size)] = [math.comb(int(count), j) / 2 ** int(count) for j in range(count + 1)]
        distribution = np.convolve(distribution, flips)
    total = len(distribution) // 2
    extreme = np.abs(np.arange(-total, total + 1)) >= abs(int(differences.sum()))
    return min(1.0, float(distribution[extreme].sum()))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Compare the successes of two policies on the same episodes, first minus second.

    Returns success rates, their `difference` with its paired 95% interval, the counts of episodes that only
    one of the two solved, and the p-value of McNemar's exact test.
    """
    changes = np.subtract(first, second, dtype=float)
    only_first, only_second = int((changes > 0).sum()), int((changes < 0).sum())
    interval = paired_interval(changes)
    return {
        "episodes": len(first),
        "first_success_rate": sum(first) / len(first),
        "second_success_rate": sum(second) / len(second),
        "difference": (only_first - only_second) / len(first),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar_exact(only_first, only_second),
    }


def mean_of_tasks(rates: Mapping[str, float]) -> float:
    """Return the unweighted mean of the tasks' success rates.

    Raises:
        ValueError: If there is no task.
    """
    if not rates:
        raise ValueError("expected the success rate of at least one task, got none")
    return math.fsum(rates.values()) / len(rates)


def mean_of_groups(rates: Mapping[str, float], groups: Mapping[str, str]) -> float:
    """Return the mean over groups of the mean over each group's tasks.

    Papers on Meta-World MT50 often report this as "average": four difficulty groups of 28, 11, 6 and 5 tasks.

    Raises:
        ValueError: If there is no task, or a task has no group.
    """
    if ungrouped := sorted(set(rates) - set(groups)):
        raise ValueError(f"these tasks belong to no group: {ungrouped}")
    members: dict[str, dict[str, float]] = {}
    for task, rate in rates.items():
        members.setdefault(groups[task], {})[task] = rate
    return mean_of_tasks({group: mean_of_tasks(tasks) for group, tasks in members.items()})


def _wilson(rate: float, trials: float, confidence: float) -> Interval:
    """Return Wilson's interval for a possibly fractional number of trials, which scipy does not take."""
    z = _quantile(confidence)
    center = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    margin = math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) * z / (1 + z**2 / trials)
    # Rounding alone could leave 1e-17 where the formula gives exactly 0 or 1.
    low = 0.0 if rate == 0 else max(0.0, center - margin)
    high = 1.0 if rate == 1 else min(1.0, center + margin)
    return Interval(low, high)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
