"""What may be said about success counts: intervals, paired tests, and the two averages that papers mix up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a success probability, without continuity correction.

    Args:
        successes: Number of successes, 0 to `trials`.
        trials: Number of independent episodes, at least 1.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: If the counts are impossible or the confidence lies outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    z = _quantile(confidence)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) * z / (1 + z**2 / trials)
    # Rounding alone could leave 1e-17 where the formula gives exactly 0 or 1.
    low = 0.0 if successes == 0 else max(0.0, centre - spread)
    high = 1.0 if successes == trials else min(1.0, centre + spread)
    return Interval(low, high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test on paired successes.

    Under the null hypothesis each episode on which two policies disagree is a fair coin.

    Args:
        only_first: Episodes that only the first policy solved, at least 0.
        only_second: Episodes that only the second policy solved, at least 0.

    Raises:
        ValueError: If a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"expected counts of at least 0, got {only_first} and {only_second}")
    disagreements = only_first + only_second
    tail = term = 1
    for count in range(min(only_first, only_second)):
        term = term * (disagreements - count) // (count + 1)  # from one binomial coefficient to the next
        tail += term
    return min(1.0, 2 * tail / 2**disagreements)


def paired_bootstrap(
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Return the percentile bootstrap interval of the paired difference in success rate, first minus second.

    Args:
        first: Success of the first policy, episode by episode.
        second: Success of the second policy on the same episodes, in the same order.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: If the sequences differ in length or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected two paired sequences of equal length, got {len(first)} and {len(second)}")
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    difference = np.asarray(first, dtype=int) - np.asarray(second, dtype=int)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    # Drawing n pairs with replacement is one multinomial draw of how often each difference appears.
    counts = np.random.default_rng(seed).multinomial(len(difference), shares, size=resamples)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / len(difference), tails)
    return Interval(float(low), float(high))


def mean_of_tasks(rates: Mapping[str, float]) -> float:
    """Return the mean of the tasks' success rates, every task with the same weight.

    Raises:
        ValueError: If there is no task.
    """
    if not rates:
        raise ValueError("expected the success rate of at least one task, got none")
    return math.fsum(rates.values()) / len(rates)


def mean_of_groups(rates: Mapping[str, float], groups: Mapping[str, str]) -> float:
    """Return the mean over groups of the mean over each group's tasks.

    Papers on Meta-World MT50 often report this as "average": four difficulty groups of 28, 11, 6 and 5 tasks.

    Args:
        rates: Success rate by task.
        groups: Group of each task.

    Raises:
        ValueError: If there is no task, or a task has no group.
    """
    homeless = sorted(set(rates) - set(groups))
    if homeless:
        raise ValueError(f"these tasks belong to no group: {homeless}")
    members: dict[str, dict[str, float]] = {}
    for task, rate in rates.items():
        members.setdefault(groups[task], {})[task] = rate
    return mean_of_tasks({group: mean_of_tasks(tasks) for group, tasks in members.items()})


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
