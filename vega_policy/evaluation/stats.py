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
    return _wilson(successes / trials, trials, confidence)


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


def paired_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the adjusted Wald interval of a mean difference in success between paired episodes.

    One state that only the first policy solves and one that only the second solves are added before mean and
    variance are taken (Bonett and Price, Journal of Educational and Behavioral Statistics 37, 2012; there for
    one episode a state). Unlike a bootstrap of the pairs it keeps a width where the policies never or hardly
    ever disagree: with 50 pairs, where the first policy alone solves one state in a hundred and the second
    alone none, a percentile bootstrap holds the truth in 39% of the cases.

    Args:
        differences: Success of the first policy minus that of the second [n], in [-1, 1], by initial state:
            the mean over repetitions where a state was played several times.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: If there is no difference, or one lies outside [-1, 1].
    """
    if differences.ndim != 1 or len(differences) == 0:
        raise ValueError(f"expected differences [n] with n >= 1, got shape {list(differences.shape)}")
    if not (np.abs(differences) <= 1).all():  # also where one is NaN
        wrong = differences[~(np.abs(differences) <= 1)]
        raise ValueError(f"expected differences in [-1, 1], got {wrong[0]}")
    padded = np.append(differences, [1.0, -1.0])
    centre, spread = (
        float(padded.mean()),
        _quantile(confidence) * float(padded.std()) / math.sqrt(len(padded)),
    )
    return Interval(max(-1.0, centre - spread), min(1.0, centre + spread))


def repeated_wilson_interval(successes: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of a success probability where each initial state was played several times.

    Episodes from one state resemble one another, so they count as p (1 - p) / var trials, var being the
    variance of the mean over states: the effective sample size of surveys (Franco, Little, Louis and Slud,
    Journal of Survey Statistics and Methodology 7, 2019). It is kept between the number of states
    (repetitions tell nothing new; also taken at rates of 0 and 1) and that of episodes (they are
    independent).

    Args:
        successes: Booleans [k n], k repetitions of n states; k = 1 gives Wilson's interval itself.
        confidence: Coverage in (0, 1).

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


def interval_of_mean(rates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of independent estimates, from the interval of each.

    Each limit is recovered from the distances of the estimates to their own limits, added in squares, so
    that the result is as lopsided near 0 and 1 as they are (MOVER: Zou and Donner, Statistics in Medicine 27,
    2008).

    Args:
        rates: The estimates.
        intervals: Their intervals, all of the same confidence.

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


def sign_flip_exact(differences: np.ndarray) -> float:
    """Return the exact two-sided p-value of the paired randomisation test on a sum of whole differences.

    Under the null hypothesis the two policies may be swapped at each initial state (Fisher, The Design of
    Experiments, 1935, section 21). With one episode a state this is McNemar's exact test; with several, the
    episodes of a state are swapped together, because they are no independent evidence.

    Args:
        differences: Integers [n], by state: episodes that the first policy solved minus those of the second.
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


def _wilson(rate: float, trials: float, confidence: float) -> Interval:
    z = _quantile(confidence)
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) * z / (1 + z**2 / trials)
    # Rounding alone could leave 1e-17 where the formula gives exactly 0 or 1.
    low = 0.0 if rate == 0 else max(0.0, centre - spread)
    high = 1.0 if rate == 1 else min(1.0, centre + spread)
    return Interval(low, high)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
