"""Policies compared over suites and training seeds: folders of evaluations, `<seed>/<suite>`, side by side.

What the intervals say. A seed folder is one training seed, and every training seed plays the same initial
states. Two or three trainings are too few to tell how the next one would come out: resampling them would give
an interval far too narrow, a t interval one too wide to be of use. So every interval here is over episodes,
for the trainings at hand, and the spread over seeds stands beside it: each seed's own value and their
standard deviation. Episodes of one initial state are kept together over seeds, because they are not
independent, and suites are strata of their own. Tasks are not: episodes are resampled within a suite as a
whole, which makes the intervals a little wider than tasks that are fixed would need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from vega_policy.evaluation.comparison import UnpairedRunsError, require_same_episodes
from vega_policy.evaluation.episodes import EpisodeResult
from vega_policy.evaluation.run_folder import EPISODES_FILE, SHARD_FOLDER, read_episodes
from vega_policy.evaluation.statistics import (
    interval_of_mean,
    mean_of_tasks,
    repeated_wilson_interval,
    sign_flip_exact,
    stratified_bootstrap,
)
from vega_policy.evaluation.summary import BOOTSTRAP_SEED

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
AVERAGES = {
    "LIBERO average" + kind.replace("_", " "): tuple(suite + kind for suite in LIBERO)
    for kind in ("", "_swap", "_object", "_lan", "_task")
}
"""Means of suites that are reported: the four of LIBERO, and of each way in which LIBERO-PRO varies them."""

RunKey = tuple[str, str]
"""Seed folder ("." where there is none) and suite of an evaluation."""


@dataclass(frozen=True)
class PolicyRuns:
    """All evaluations of one policy.

    Attributes:
        name: How the policy is called in tables.
        folder: Where its evaluations lie.
        control: Control under which they were played.
        runs: Episodes of each evaluation, sorted by their keys.
    """

    name: str
    folder: str
    control: str
    runs: Mapping[RunKey, Sequence[EpisodeResult]]


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


def is_evaluation(folder: Path) -> bool:
    """Tell whether a folder is one evaluation itself."""
    return (folder / EPISODES_FILE).is_file()


def evaluations_below(folder: Path) -> list[Path]:
    """Return the evaluations in a folder that is none itself; the shards of an evaluation are not listed."""
    if is_evaluation(folder):
        return []
    files = sorted(folder.rglob(EPISODES_FILE))
    return [file.parent for file in files if SHARD_FOLDER not in file.relative_to(folder).parts]


def read_policies(folders: Sequence[Path], controls: Sequence[str]) -> list[PolicyRuns]:
    """Read several policies, called by their folders' names, or by the paths where two names are the same.

    Args:
        folders: Folder of each policy.
        controls: Control of each policy; named where it is not `none`.

    Raises:
        FileNotFoundError: If a folder holds no evaluation.
        ValueError: As `read_policy` says.
    """
    of = ["" if control == "none" else f" ({control})" for control in controls]
    names = [folder.resolve().name + control for folder, control in zip(folders, of, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{folder}{control}" for folder, control in zip(folders, of, strict=True)]
    return [read_policy(*policy) for policy in zip(folders, controls, names, strict=True)]


def read_policy(folder: Path, control: str, name: str) -> PolicyRuns:
    """Read all evaluations of a policy.

    Args:
        folder: Holds `<seed>/<suite>/episodes.parquet`, or `<suite>/episodes.parquet` for a single seed.
        control: The control whose episodes are taken; evaluations without it are passed over.
        name: How the policy is called in tables.

    Raises:
        FileNotFoundError: If it holds no evaluation.
        ValueError: If an evaluation lies elsewhere, cannot be read or is of another suite than its folder's
            name, if two seeds are one and the same evaluation, or none has the control.
    """
    evaluations = evaluations_below(folder)
    if not evaluations:
        kind = "is one evaluation itself" if is_evaluation(folder) else "holds no evaluation"
        raise FileNotFoundError(
            f"{folder} {kind}; expected the folder of a policy, with <seed>/<suite>/{EPISODES_FILE} in it"
        )
    runs: dict[RunKey, list[EpisodeResult]] = {}
    played: set[str] = set()
    for evaluation in evaluations:
        key, episodes = _read_evaluation(folder, evaluation)
        played |= {result.control for result in episodes}
        if chosen := [result for result in episodes if result.control == control]:
            runs[key] = sorted(chosen, key=lambda result: result.key)
            for twin in runs.keys() - {key}:
                if runs[twin] == runs[key]:  # to the last simulator state, as no two trainings act
                    raise ValueError(
                        f"{evaluation} and {folder / '/'.join(twin)} are the same episodes to the last; "
                        "expected one training in each seed's folder"
                    )
    if not runs:
        raise ValueError(
            f"{folder} has no episodes under the control {control!r}; it has {', '.join(sorted(played))}"
        )
    return PolicyRuns(name, str(folder), control, runs)


def _read_evaluation(folder: Path, evaluation: Path) -> tuple[RunKey, list[EpisodeResult]]:
    place = evaluation.relative_to(folder)
    if len(place.parts) > 2:
        raise ValueError(
            f"{evaluation} lies too deep in {folder}: expected <seed>/<suite>; give the folder of one policy"
        )
    try:
        episodes = read_episodes(evaluation)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{evaluation / EPISODES_FILE} cannot be read: {error}") from error
    suites = sorted({result.suite for result in episodes})
    if suites != [place.name]:
        raise ValueError(
            f"{evaluation} holds episodes of {', '.join(suites) or 'no suite'}; "
            "expected the folder to be named as its suite"
        )
    return (str(place.parent), place.name), episodes


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
    interval = stratified_bootstrap([change.mean(axis=0) for change in changes], seed=BOOTSTRAP_SEED)
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
