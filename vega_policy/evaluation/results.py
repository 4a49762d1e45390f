"""Policies compared over suites and training seeds: folders of evaluations, `<seed>/<suite>`, side by side.

What the intervals say. A seed folder is one training seed, and every training seed plays the same initial
states. Two or three trainings are too few to tell how the next one would come out: resampling them would give
an interval far too narrow, a t interval one too wide to be of use. So every interval here is over episodes,
for the trainings at hand, and the spread over seeds stands beside it: each seed's own value and their
standard deviation. Episodes of one initial state are kept together over seeds, because they are not
independent. A suite's states are taken as one sample, not task by task, which makes the intervals a little
wider than tasks that are fixed would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vega_policy.evaluation.comparison import UnpairedRunsError, require_same_episodes
from vega_policy.evaluation.policy_runs import PolicyRuns, RunKey
from vega_policy.evaluation.statistics import (
    interval_of_mean,
    mean_of_tasks,
    paired_interval,
    repeated_wilson_interval,
    sign_flip_exact,
)

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
AVERAGES = {
    "LIBERO average" + kind.replace("_", " "): tuple(suite + kind for suite in LIBERO)
    for kind in ("", "_swap", "_object", "_lan", "_task")
}
"""Means of suites that are reported: the four of LIBERO, and of each way in which LIBERO-PRO varies them."""


@dataclass(frozen=True)
class Success:
    """Success rate of a policy on a suite, or the mean of several suites' rates.

    Attributes:
        rate: Success rate in [0, 1].
        low: Lower end of its 95% interval.
        high: Upper end.
        episodes: Number of episodes, over all seeds.
        by_seed: Rate of each training seed.
    """

    rate: float
    low: float
    high: float
    episodes: int
    by_seed: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference in success rate, first minus second, on a suite or in the mean of several.

    Attributes:
        first: Success of the first policy on the episodes that both played.
        second: Success of the second policy on them.
        difference: First minus second, in [-1, 1].
        low: Lower end of its 95% interval.
        high: Upper end.
        only_first: Episodes that only the first policy solved.
        only_second: Episodes that only the second policy solved.
        p: Of McNemar's exact test, a state's episodes of all seeds kept together; None for a mean of suites.
        by_seed: Difference of each training seed.
        seed_deviation: Standard deviation of `by_seed`; None for a single seed.
    """

    first: Success
    second: Success
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p: float | None
    by_seed: dict[str, float]
    seed_deviation: float | None


def success(policy: PolicyRuns, row: str) -> Success | None:
    """Return how often a policy succeeds on a suite or in one of `AVERAGES`; None if it did not play it.

    Args:
        policy: The policy.
        row: Name of the suite or of the average.

    Raises:
        UnpairedRunsError: If its seeds did not play the same episodes.
    """
    suites = AVERAGES.get(row, (row,))
    seeds = _seeds([policy], suites)
    return _success([_solved(policy, suite, seeds) for suite in suites], seeds) if seeds else None


def difference(first: PolicyRuns, second: PolicyRuns, row: str) -> Difference | None:
    """Compare two policies on the seeds in which both played a suite, or all suites of an average.

    Args:
        first: The first policy.
        second: The second policy.
        row: Name of the suite or of the average.

    Returns:
        The comparison; None if there is no such seed.

    Raises:
        UnpairedRunsError: If they, or the seeds of one of them, did not play the same episodes.
    """
    suites = AVERAGES.get(row, (row,))
    seeds = _seeds([first, second], suites)
    if not seeds:
        return None
    for seed in seeds:
        for suite in suites:
            _require_paired(first, second, (seed, suite))
    one, two = ([_solved(policy, suite, seeds) for suite in suites] for policy in (first, second))
    changes = [a.astype(int) - b.astype(int) for a, b in zip(one, two, strict=True)]  # each [k n]
    of_states = [change.mean(axis=0) for change in changes]
    interval = interval_of_mean(
        [float(values.mean()) for values in of_states], [paired_interval(values) for values in of_states]
    )
    by_seed = {seed: float(np.mean([change[k].mean() for change in changes])) for k, seed in enumerate(seeds)}
    return Difference(
        first=_success(one, seeds),
        second=_success(two, seeds),
        difference=mean_of_tasks(by_seed),
        low=interval.low,
        high=interval.high,
        only_first=int(sum((change > 0).sum() for change in changes)),
        only_second=int(sum((change < 0).sum() for change in changes)),
        p=sign_flip_exact(changes[0].sum(axis=0)) if len(suites) == 1 else None,
        by_seed=by_seed,
        seed_deviation=float(np.std(list(by_seed.values()), ddof=1)) if len(seeds) > 1 else None,
    )


def rows_of(policies: Sequence[PolicyRuns]) -> list[str]:
    """Return all suites that were played, those of LIBERO first and in its order, then the averages."""
    played = {suite for policy in policies for _, suite in policy.runs}
    known = [suite for suites in AVERAGES.values() for suite in suites if suite in played]
    averages = [name for name, suites in AVERAGES.items() if played.issuperset(suites)]
    return known + sorted(played - set(known)) + averages


def _seeds(policies: Sequence[PolicyRuns], suites: Sequence[str]) -> list[str]:
    """The seeds in which all of the policies played all of the suites."""
    seeds = dict.fromkeys(seed for seed, _ in policies[0].runs)
    return [s for s in seeds if all((s, suite) in policy.runs for suite in suites for policy in policies)]


def _success(solved: Sequence[np.ndarray], seeds: Sequence[str]) -> Success:
    rates = [float(suite.mean()) for suite in solved]
    interval = interval_of_mean(rates, [repeated_wilson_interval(suite) for suite in solved])
    by_seed = {seed: float(np.mean([suite[k].mean() for suite in solved])) for k, seed in enumerate(seeds)}
    episodes = sum(suite.size for suite in solved)
    return Success(float(np.mean(rates)), interval.low, interval.high, episodes, by_seed)


def _solved(policy: PolicyRuns, suite: str, seeds: Sequence[str]) -> np.ndarray:
    """Which episodes of a suite were solved [k n], row by row the seeds."""
    keys = [[result.key for result in policy.runs[seed, suite]] for seed in seeds]
    for seed, played in zip(seeds, keys, strict=True):
        if played != keys[0]:
            raise UnpairedRunsError(
                f"{policy.name}: {seed}/{suite} has other episodes ({len(played)}) than {seeds[0]}/{suite} "
                f"({len(keys[0])}); evaluate every seed with the same tasks and episodes_per_task, to the end"
            )
    return np.array([[result.success for result in policy.runs[seed, suite]] for seed in seeds])


def _require_paired(first: PolicyRuns, second: PolicyRuns, key: RunKey) -> None:
    try:
        require_same_episodes(first.runs[key], second.runs[key])
    except UnpairedRunsError as error:
        raise UnpairedRunsError(
            f"{key[0]}/{key[1]} of {first.name} (first) and {second.name} (second): {error}"
        ) from error
