"""Paired comparison of evaluations of the same episodes: two evaluations by task, or policies by suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from vega_policy.evaluation.episodes import (
    EPISODES_FILE,
    SHARD_FOLDER,
    EpisodeResult,
    read_conditions,
    read_episodes,
)
from vega_policy.evaluation.stats import (
    TaskDifference,
    difference_over_tasks,
    interval_of_mean,
    mean_of_tasks,
    paired_difference,
    paired_interval,
    repeated_wilson_interval,
    sign_flip_exact,
    student_interval,
)
from vega_policy.run_dir import SETTINGS, read_json

OPEN_LOOP_REPORT = "open_loop.json"  # of an evaluation on recorded frames

CONDITIONS = ("frame_size", "rendering", "action_steps", "perturbation", "perturbation_strength")
"""Settings that change what a policy observes or how often it is called, but no initial state."""

FRAMES = ("frame_size", "rendering")
"""Conditions that must be equal where start states are not."""

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
AVERAGES = {
    "LIBERO average" + kind.replace("_", " "): tuple(suite + kind for suite in LIBERO)
    for kind in ("", "_swap", "_object", "_lan", "_task")
}
"""Means of suites that are reported: the four of LIBERO, and of each way in which LIBERO-PRO varies them."""

POOLED = {name.replace("average", "pooled"): suites for name, suites in AVERAGES.items()}
"""Differences over the states of at least two suites of a mean as one sample."""

Settings = Mapping[str, Any]

RunKey = tuple[str, str]
"""Seed folder ("." where there is none) and suite of an evaluation."""


class UnpairedRunsError(ValueError):
    """Two evaluations are not of the same episodes; the message names the first difference."""


@dataclass(frozen=True)
class Pairing:
    """The episodes that are compared of two evaluations, and what the comparison says of the others."""

    first: Sequence[EpisodeResult]  # sorted by key; the episode at a position is that of `second`
    second: Sequence[EpisodeResult]
    totals: tuple[int, int]  # episodes of each evaluation
    planned: tuple[int, int] | None  # by the settings; None where they are not known
    unequal_starts: int  # pairs of one official state that start from states of different hashes


def compare_runs(
    first: Path, second: Path, *, first_ablation: str = "none", second_ablation: str = "none"
) -> dict[str, dict[str, Any]]:
    """Compare two evaluations, or two ablations of one, episode by episode.

    Returns `stats.paired_difference` of each task, and under `all` of all of them, there also `over_tasks`:
    `stats.difference_over_tasks`, or None; see `pair_episodes`.

    Raises:
        FileNotFoundError: If a folder holds no finished episode.
        UnpairedRunsError: If their episodes cannot be paired.
        ValueError: If both are one folder under one ablation.
    """
    _require_distinct([first, second], [first_ablation, second_ablation])
    pairing = _read_pairing(first, second, first_ablation, second_ablation)
    rows: dict[str, list[tuple[bool, bool]]] = {}
    for a, b in zip(pairing.first, pairing.second, strict=True):
        rows.setdefault(a.task, []).append((a.success, b.success))
    rows["all"] = [pair for pairs in rows.values() for pair in pairs]
    comparison = {task: paired_difference(*zip(*pairs, strict=True)) for task, pairs in rows.items()}
    changes = [a.success - b.success for a, b in zip(pairing.first, pairing.second, strict=True)]
    over_tasks = difference_over_tasks(np.array([changes]), [result.task for result in pairing.first])
    comparison["all"]["over_tasks"] = over_tasks and asdict(over_tasks)
    return comparison


def comparison_notes(
    first: Path, second: Path, *, first_ablation: str = "none", second_ablation: str = "none"
) -> list[str]:
    """Return the notes of a comparison of two evaluations: folders, method, pairs, conditions that differ."""
    sides = (("first", first, first_ablation), ("second", second, second_ablation))
    named = [f"{side}: {path}{'' if name == 'none' else f' ({name})'}" for side, path, name in sides]
    settings = (read_conditions(first), read_conditions(second))
    differing = _differing_conditions(("first", "second"), {f"{first} and {second}": settings})
    method = (
        "difference: first minus second, paired, with Bonett and Price's interval; McNemar: exact p "
        "(episodes that only the first solved : only the second)"
    )
    pairing = _read_pairing(first, second, first_ablation, second_ablation)
    return [
        *named,
        method,
        *_pairing_notes(("first", "second"), {pairing.first[0].suite: pairing}),
        *differing,
    ]


def comparison_table(comparison: dict[str, dict[str, Any]], *, markdown: bool = False) -> str:
    """Return a comparison of two evaluations as text or Markdown, a line for each task and one for all."""
    over_tasks = comparison["all"]["over_tasks"]
    notes = [TaskDifference(**over_tasks).describe("all"), _TASKS] if over_tasks else []
    chosen = comparison if len(comparison) > 2 else {"all": comparison["all"]}
    rows = [
        (
            task,
            str(row["episodes"]),
            f"{100 * row['first_success_rate']:.1f}",
            f"{100 * row['second_success_rate']:.1f}",
            f"{100 * row['difference']:+.1f}",
            f"[{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]",
            f"{row['mcnemar_p']:.3g} ({row['only_first']}:{row['only_second']})",
        )
        for task, row in chosen.items()
    ]
    if markdown:
        head = ("task", "episodes", "first, %", "second, %", "difference [95% interval]", "McNemar p")
        table = _markdown_table([head, *((*row[:4], f"{row[4]} {row[5]}", row[6]) for row in rows)])
        return "\n\n".join([table, *notes])
    width = max(len(task) for task in ("task", *chosen))
    head = ("task", "episodes", "first", "second", "difference", "95% interval", "McNemar p")
    lines = [head, *((*row[:2], *(f"{percent}%" for percent in row[2:5]), *row[5:]) for row in rows)]
    table = (
        f"{task:<{width}} {n:>8} {one:>7} {two:>7} {change:>11}   {interval:<16} {p}"
        for task, n, one, two, change, interval, p in lines
    )
    return "\n".join([*table, *notes])


def _differing_conditions(
    names: tuple[str, str], pairs: Mapping[str, tuple[Settings, Settings]]
) -> list[str]:
    """Return one sentence for each condition that the first and the second settings of a place differ in."""
    found: dict[str, list[str]] = {}
    for place, settings in pairs.items():
        for name in CONDITIONS if all(settings) else ():
            missing = "none" if name.startswith("perturbation") else "not recorded"
            values = [missing if of.get(name) is None else of[name] for of in settings]
            if values[0] != values[1]:
                sides = ", ".join(f"{side} {value}" for side, value in zip(names, values, strict=True))
                found.setdefault(f"Evaluated differently, {name}: {sides}", []).append(place)
    for side, name in enumerate(names):
        if unknown := [place for place, settings in pairs.items() if not settings[side]]:
            found[f"Conditions unknown: {name} has no {SETTINGS}"] = unknown
    return [f"{what} ({', '.join(places)})." for what, places in found.items()]


def _require_distinct(folders: Sequence[Path], ablations: Sequence[str]) -> None:
    known: dict[tuple[Path, str], Path] = {}
    for folder, ablation in zip(folders, ablations, strict=True):
        place = (folder.resolve(), ablation)
        if twin := known.get(place):
            raise ValueError(
                f"{twin} and {folder} are one folder under one ablation ({ablation}): every difference would "
                "be zero; give other folders, or other ablations (--first-ablation, --second-ablation)"
            )
        known[place] = folder


def _read_ablation(folder: Path, ablation: str) -> list[EpisodeResult]:
    episodes = read_episodes(folder)
    chosen = [result for result in episodes if result.ablation == ablation]
    if not chosen:
        present = sorted({result.ablation for result in episodes})
        raise UnpairedRunsError(f"{folder} has no episodes under the ablation {ablation!r}; it has {present}")
    return sorted(chosen, key=lambda result: result.key)


def _read_pairing(first: Path, second: Path, first_ablation: str, second_ablation: str) -> Pairing:
    one, two = _read_ablation(first, first_ablation), _read_ablation(second, second_ablation)
    return pair_episodes(one, two, (read_conditions(first), read_conditions(second)))


def pair_episodes(
    one: Sequence[EpisodeResult],
    two: Sequence[EpisodeResult],
    settings: tuple[Settings, Settings],
    place: str = "",
) -> Pairing:
    """Pair the episodes of two evaluations of a suite, both sorted by key; `place` begins a message.

    Evaluations from official initial states are paired on the states that both have. Those without a
    perturbation, of one frame size and rendering, may start from unequal states: after a state is restored
    the simulator takes some idle steps, which another CPU rounds otherwise (by about 1e-16), and a hash does
    not say how far two states are apart. All others must have the same episodes, from equal start states.

    Raises:
        UnpairedRunsError: If that does not hold, or the seeds or tasks differ.
    """
    first, second = ({(r.suite, *r.key): r for r in results} for results in (one, two))
    common = [key for key in first if key in second]
    is_official = all(of.get("official_states") for of in settings)
    if not common or not (is_official or len(common) == len(one) == len(two)):
        raise UnpairedRunsError(
            f"{place}the runs are not of the same episodes: {len(one) - len(common)} only in the first, "
            f"{len(two) - len(common)} only in the second, {len(common)} in both. Evaluate both with "
            "the same suite, tasks and episodes_per_task, to the end"
        )
    is_numbered = is_official and all(settings[0].get(n) == settings[1].get(n) for n in FRAMES)
    unequal = 0
    for a, b in ((first[key], second[key]) for key in common):
        alike = a.initial_hash == b.initial_hash or a.perturbation != b.perturbation  # some move what starts
        unequal += not alike
        alike = alike or (is_numbered and a.perturbation == "none")
        if (a.seed, a.task) != (b.seed, b.task) or not alike:
            raise UnpairedRunsError(
                f"{place}episode {a.index} of {a.task} did not start alike: seed {a.seed}, state "
                f"{a.initial_hash} in the first run, seed {b.seed}, state {b.initial_hash} in the second"
                f"{'' if a.task == b.task else f' (of {b.task})'}; evaluate both with the same seed and the "
                "same simulator versions. Only unperturbed evaluations from official initial states, of one "
                "frame_size and rendering, are paired by number where start states differ"
            )
    return Pairing(
        [first[key] for key in common],
        [second[key] for key in common],
        (len(one), len(two)),
        _planned_episodes(one, two, settings),
        unequal,
    )


def _planned_episodes(
    one: Sequence[EpisodeResult], two: Sequence[EpisodeResult], settings: tuple[Settings, Settings]
) -> tuple[int, int] | None:
    """Return how many episodes each evaluation has when it is finished; None where that is not recorded."""
    if not all("episodes_per_task" in of for of in settings):
        return None
    tasks = {result.task_index for result in (*one, *two)}  # null in the settings: all of the suite
    first, second = (len(of.get("tasks") or tasks) * of["episodes_per_task"] for of in settings)
    return first, second


def _pairing_notes(names: tuple[str, str], pairings: Mapping[str, Pairing]) -> list[str]:
    """Return what was paired otherwise than by equal start states, and what was left out, by place."""
    notes = []
    if found := [
        f"{k} {p.unequal_starts} of {len(p.first)}" for k, p in pairings.items() if p.unequal_starts
    ]:
        notes.append(
            f"Start states of {names[0]} and {names[1]} differ in the last bits or more (their hashes do not "
            f"say how far): paired by number of the official state ({', '.join(found)})."
        )
    for side, name in enumerate(names):
        rest = {place: (p.totals[side] - len(p.first), p.totals[side]) for place, p in pairings.items()}
        if found := [f"{place} {n} of {total}" for place, (n, total) in rest.items() if n]:
            notes.append(
                f"Left out, states of {name} that {names[1 - side]} does not have: {', '.join(found)}."
            )
        ends = {place: (p.totals[side], p.planned[side]) for place, p in pairings.items() if p.planned}
        if found := [f"{place} {n} of {planned}" for place, (n, planned) in ends.items() if n < planned]:
            notes.append(
                f"Not evaluated to the end: {name} ({', '.join(found)} episodes). Long episodes, which often "
                "fail, end last and may be missing."
            )
    return notes


@dataclass(frozen=True)
class PolicyRuns:
    """All evaluations of one policy under one ablation."""

    name: str  # in tables
    folder: str
    ablation: str
    runs: Mapping[RunKey, Sequence[EpisodeResult]]  # sorted by key
    settings: Mapping[RunKey, Settings]  # empty where unknown


def evaluations_below(folder: Path) -> list[Path]:
    """Return the evaluations in a folder that is none itself; the shards of an evaluation are not listed."""
    if (folder / EPISODES_FILE).is_file():
        return []
    files = sorted(folder.rglob(EPISODES_FILE))
    return [file.parent for file in files if SHARD_FOLDER not in file.relative_to(folder).parts]


def read_policies(folders: Sequence[Path], ablations: Sequence[str]) -> list[PolicyRuns]:
    """Read several policies, named by their folders' names, or by the paths where two have the same name.

    Raises:
        FileNotFoundError: If a folder holds no evaluation.
        ValueError: If two are one folder under one ablation; see `read_policy`.
    """
    _require_distinct(folders, ablations)
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    names = [str(folder) for folder in folders] if len(set(names)) < len(set(paths)) else names
    names = [n if of == "none" else f"{n} ({of})" for n, of in zip(names, ablations, strict=True)]
    return [read_policy(*policy) for policy in zip(folders, ablations, names, strict=True)]


def read_policy(folder: Path, ablation: str, name: str) -> PolicyRuns:
    """Read all evaluations of a policy that have episodes under an ablation.

    They lie in `<folder>/<seed>/<suite>/episodes.parquet`, or `<folder>/<suite>` for a single seed.

    Raises:
        FileNotFoundError: If it holds no evaluation.
        ValueError: If an evaluation lies elsewhere, cannot be read or is of another suite than its folder's
            name, if two seeds are one and the same evaluation or of one checkpoint, or none has the ablation.
    """
    evaluations = evaluations_below(folder)
    if not evaluations:
        kind = "is one evaluation itself" if (folder / EPISODES_FILE).is_file() else "holds no evaluation"
        raise FileNotFoundError(
            f"{folder} {kind}; expected the folder of a policy, with <seed>/<suite>/{EPISODES_FILE} in it"
        )
    runs: dict[RunKey, list[EpisodeResult]] = {}
    settings: dict[RunKey, Settings] = {}
    present: set[str] = set()
    for evaluation in evaluations:
        key, episodes = _read_evaluation(folder, evaluation)
        present |= {result.ablation for result in episodes}
        if chosen := [result for result in episodes if result.ablation == ablation]:
            runs[key], settings[key] = sorted(chosen, key=lambda r: r.key), read_conditions(evaluation)
    if not runs:
        raise ValueError(
            f"{folder} has no episodes under the ablation {ablation!r}; it has {', '.join(sorted(present))}"
        )
    policy = PolicyRuns(name, str(folder), ablation, runs, settings)
    _require_separate_trainings(policy)
    return policy


def _read_evaluation(folder: Path, evaluation: Path) -> tuple[RunKey, list[EpisodeResult]]:
    place = evaluation.relative_to(folder)
    if len(place.parts) > 2:
        raise ValueError(
            f"{evaluation} lies too deep in {folder}: expected <seed>/<suite>; give the folder of one policy"
        )
    try:
        episodes = read_episodes(evaluation)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{evaluation / EPISODES_FILE} cannot be read: {error}; copy it again") from error
    suites = sorted({result.suite for result in episodes})
    if suites != [place.name]:
        raise ValueError(
            f"{evaluation} holds episodes of {', '.join(suites) or 'no suite'}; "
            "expected the folder to be named as its suite"
        )
    return (str(place.parent), place.name), episodes


def _require_separate_trainings(policy: PolicyRuns) -> None:
    for one, other in combinations(policy.runs, 2):
        if one[1] != other[1]:
            continue  # one training run may have evaluations in many suites
        places = " and ".join(f"{policy.folder}/{'/'.join(key)}" for key in (one, other))
        hashes = [policy.settings[key].get("checkpoint_sha256") for key in (one, other)]
        # Equal episodes are equal down to the last simulator state: no two training runs act like that.
        is_copy = policy.runs[one] == policy.runs[other]
        if is_copy or (hashes[0] is not None and hashes[0] == hashes[1]):
            found = "the same episodes" if is_copy else f"of one checkpoint ({hashes[0]})"
            raise ValueError(
                f"{places} are {found}; expected one training run in each seed's folder: move one away"
            )


@dataclass(frozen=True)
class Success:
    """Success rate of a policy on a suite, or the mean of several suites' rates; rates in [0, 1]."""

    rate: float
    low: float  # of the 95% interval
    high: float
    episodes: int  # over all seeds
    by_seed: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference in success rate, first minus second, on a suite or in the mean of several."""

    first: Success  # on the episodes of both
    second: Success
    difference: float  # in [-1, 1]
    low: float  # of the 95% interval
    high: float
    only_first: int  # episodes that only the first policy solved
    only_second: int
    p: float | None  # exact, a state's episodes of all seeds kept together; None for a mean of suites
    by_seed: dict[str, float]
    seed_deviation: float | None  # standard deviation of `by_seed`; None for a single seed
    over_tasks: TaskDifference | None  # None for few tasks, and for a mean of suites


def success(policy: PolicyRuns, row: str) -> Success | None:
    """Return a policy's success on a suite or in one of `AVERAGES`; None if it has no such evaluation.

    Raises:
        UnpairedRunsError: If its seeds are not of the same episodes.
    """
    suites = AVERAGES.get(row, (row,))
    seeds = _common_seeds([policy], suites)
    if not seeds:
        return None
    runs = ({seed: policy.runs[seed, suite] for seed in seeds} for suite in suites)
    return _success([_solved(policy, suite, of) for suite, of in zip(suites, runs, strict=True)], seeds)


def difference(first: PolicyRuns, second: PolicyRuns, row: str) -> Difference | None:
    """Compare two policies on a suite, in one of `AVERAGES` or of `POOLED`, on their common seeds.

    None without a common seed, and for one of `POOLED` without two suites that both have.

    Raises:
        UnpairedRunsError: If their episodes cannot be paired, or the seeds of one are of other episodes.
    """
    suites = AVERAGES.get(row) or POOLED.get(row) or (row,)
    if row in POOLED:
        both = {suite for _, suite in first.runs.keys() & second.runs.keys()}
        suites = tuple(suite for suite in suites if suite in both)
    seeds = _common_seeds([first, second], suites)
    if not seeds or (row in POOLED and len(suites) < 2):
        return None
    one, two, tasks = [], [], []
    for suite in suites:
        pairings = [_pair_policies(first, second, (seed, suite)) for seed in seeds]
        one.append(_solved(first, suite, {seed: p.first for seed, p in zip(seeds, pairings, strict=True)}))
        two.append(_solved(second, suite, {seed: p.second for seed, p in zip(seeds, pairings, strict=True)}))
        tasks += [f"{suite}/{result.task}" for result in pairings[0].first]
    if row in POOLED:
        one, two = [np.concatenate(one, axis=1)], [np.concatenate(two, axis=1)]
    changes = [a.astype(int) - b.astype(int) for a, b in zip(one, two, strict=True)]  # each [k n]
    by_state = [change.mean(axis=0) for change in changes]
    interval = interval_of_mean(
        [float(values.mean()) for values in by_state], [paired_interval(values) for values in by_state]
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
        p=sign_flip_exact(changes[0].sum(axis=0)) if len(changes) == 1 else None,
        by_seed=by_seed,
        seed_deviation=float(np.std(list(by_seed.values()), ddof=1)) if len(seeds) > 1 else None,
        over_tasks=difference_over_tasks(changes[0], tasks) if len(changes) == 1 else None,
    )


def _pair_policies(first: PolicyRuns, second: PolicyRuns, key: RunKey) -> Pairing:
    place = f"{'/'.join(key)} of {first.name} (first) and {second.name} (second): "
    settings = first.settings[key], second.settings[key]
    return pair_episodes(first.runs[key], second.runs[key], settings, place)


def _common_seeds(policies: Sequence[PolicyRuns], suites: Sequence[str]) -> list[str]:
    """Return the seeds in which all policies have evaluations of all suites."""
    seeds = dict.fromkeys(seed for seed, _ in policies[0].runs)
    return [s for s in seeds if all((s, suite) in policy.runs for suite in suites for policy in policies)]


def _solved(policy: PolicyRuns, suite: str, runs: Mapping[str, Sequence[EpisodeResult]]) -> np.ndarray:
    """Return the success of each episode of a suite, bool [k n], a row for each seed of `runs`."""
    (first, reference), *others = runs.items()
    for seed, results in others:
        if [result.key for result in results] != [result.key for result in reference]:
            raise UnpairedRunsError(
                f"{policy.name}: {seed}/{suite} has other episodes ({len(results)}) than "
                f"{first}/{suite} ({len(reference)}); evaluate every seed with the same tasks and "
                "episodes_per_task, to the end"
            )
    return np.array([[result.success for result in results] for results in runs.values()])


def _success(solved: Sequence[np.ndarray], seeds: Sequence[str]) -> Success:
    rates = [float(suite.mean()) for suite in solved]
    interval = interval_of_mean(rates, [repeated_wilson_interval(suite) for suite in solved])
    by_seed = {seed: float(np.mean([suite[k].mean() for suite in solved])) for k, seed in enumerate(seeds)}
    episodes = sum(suite.size for suite in solved)
    return Success(float(np.mean(rates)), interval.low, interval.high, episodes, by_seed)


@dataclass(frozen=True)
class Comparison:
    """Several policies, each against the last, their reference."""

    policies: Sequence[PolicyRuns]  # the reference last
    rows: Sequence[str]  # suites and averages in the order of display
    successes: dict[str, dict[str, Success]]  # by policy and row, over all evaluations of the policy
    differences: dict[str, dict[str, Difference]]  # to the reference, by other policy and row, also pooled

    def numbers(self) -> dict[str, Any]:
        """Return everything as JSON values: rates in [0, 1], not in percent."""
        *others, reference = self.policies

        def plain(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
            return {name: {row: asdict(one) for row, one in rows.items()} for name, rows in values.items()}

        return {
            "reference": reference.name,
            "policies": {p.name: {"folder": p.folder, "ablation": p.ablation} for p in self.policies},
            "success": plain(self.successes),
            "difference_to_reference": plain(self.differences),
            "unpaired": {
                p.name: {"only_here": _missing(p, reference), "only_in_reference": _missing(reference, p)}
                for p in others
            },
            "notes": _notes(self),
        }


def compare_policies(policies: Sequence[PolicyRuns]) -> Comparison:
    """Compare policies of different names with the last one, on evaluations at the same <seed>/<suite>.

    Raises:
        UnpairedRunsError: If one has no evaluation in common with the reference, or they are not of the same
            episodes.
    """
    *others, reference = policies
    for policy in others:
        if not policy.runs.keys() & reference.runs.keys():
            first, second = (", ".join(map("/".join, of.runs)) for of in (policy, reference))
            raise UnpairedRunsError(
                f"{policy.folder} and {reference.folder} have no <seed>/<suite> in common: the first has "
                f"{first}; the second has {second}"
            )
    present = {suite for policy in policies for _, suite in policy.runs}
    known = [suite for suites in AVERAGES.values() for suite in suites if suite in present]
    averages = [name for name, suites in AVERAGES.items() if present.issuperset(suites)]
    rows = known + sorted(present - set(known)) + averages
    successes = {p.name: {row: value for row in rows if (value := success(p, row))} for p in policies}
    differences = {
        p.name: {row: value for row in [*rows, *POOLED] if (value := difference(p, reference, row))}
        for p in others
    }
    return Comparison(policies, rows, successes, differences)


_METHOD = (
    "Success and differences in %, with 95% intervals over episodes: Wilson's for success; for differences "
    "Bonett and Price's for pairs, an initial state's episodes of all seeds kept together. "
    "Averages weigh their suites alike; theirs are Zou and Donner's. Pooled: the states of all suites that "
    "both policies have, as one sample."
)
_TASKS = (
    "An interval over episodes is for these tasks again, from states like these; one over tasks is for other "
    "tasks of the kind (Student's, of the tasks' mean differences, which weigh alike)."
)
_MCNEMAR = "McNemar: exact p (episodes that only the first solved : only the second)."
_OWN_SEEDS = "Success is over all seeds of a policy, a difference over the seeds that both policies have."
_ONE_SEED = "With one training seed the intervals do not cover how another training run would come out."
_SEEDS = (
    "The intervals hold for these training runs; they do not contain the spread over training seeds (sd: "
    "standard deviation), which estimates how another training run would come out."
)


def results_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Return a comparison as text or Markdown: of two policies a line a suite, of more a line a policy."""
    two = len(comparison.policies) == 2
    tables = [_rows_by_suite(comparison)] if two else _rows_by_policy(comparison)
    pieces = [_markdown_table(cells) if markdown else _text_table(cells) for cells in tables]
    return "\n\n".join([*pieces, ("\n\n" if markdown else "\n").join(_notes(comparison))])


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rows])


def _text_table(cells: Sequence[Sequence[str]]) -> str:
    """Return a line for each row, the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _rows_by_suite(comparison: Comparison) -> list[list[str]]:
    first, second = comparison.policies
    cells = [["suite", "seeds x episodes", first.name, second.name, "difference", "McNemar", "by seed"]]
    cells += [
        [
            row,
            _count(value.first),
            _rate(value.first),
            _rate(value.second),
            _signed(value.difference, value.low, value.high),
            "-" if value.p is None else f"{value.p:.3g} ({value.only_first}:{value.only_second})",
            ", ".join(f"{100 * seed:+.1f}" for seed in value.by_seed.values()) + _deviation(value),
        ]
        for row, value in comparison.differences[first.name].items()
    ]
    return cells


def _rows_by_policy(comparison: Comparison) -> list[list[list[str]]]:
    """Return the table of success, and that of differences to the reference."""
    rows, reference = comparison.rows, comparison.policies[-1].name
    rates = [
        [name, *(f"{_rate(of[row])} ({_count(of[row])})" if row in of else "-" for row in rows)]
        for name, of in comparison.successes.items()
    ]
    changes = [
        [name, *(_change(of[row]) if row in of else "-" for row in rows)]
        for name, of in comparison.differences.items()
    ]
    return [
        [["success (seeds x episodes)", *rows], *rates],
        [[f"difference to {reference}", *rows], *changes],
    ]


def _notes(comparison: Comparison) -> list[str]:
    *others, reference = comparison.policies
    values = [value for rows in comparison.differences.values() for value in rows.values()]
    repeated = any(len(value.by_seed) > 1 for value in values)
    over_tasks = _lines_over_tasks(comparison)
    notes = [*over_tasks, f"{_METHOD} {_MCNEMAR if len(others) == 1 else _OWN_SEEDS}"]
    notes += [*([_TASKS] if over_tasks else []), _SEEDS if repeated else _ONE_SEED]
    for policy in others:
        for here, there in ((policy, reference), (reference, policy)):
            if missing := _missing(here, there):
                notes.append(f"Not compared, in {here.name} but not in {there.name}: {', '.join(missing)}.")
        common = [key for key in policy.runs if key in reference.runs]
        names, pairings = (policy.name, reference.name), {}
        for key in common:
            pairings["/".join(key)] = _pair_policies(policy, reference, key)
        notes += _pairing_notes(names, pairings)
        notes += _differing_conditions(
            names,
            {"/".join(key): (policy.settings[key], reference.settings[key]) for key in common},
        )
        notes += _notes_on_averages(comparison, policy)
    return notes


def _lines_over_tasks(comparison: Comparison) -> list[str]:
    """Return the difference over tasks of each pooled row, and of the suites that are pooled in none."""
    *others, reference = comparison.policies
    lines = []
    for name, rows in comparison.differences.items():
        versus = "" if len(others) == 1 else f", {name} against {reference.name}"
        pooled = {suite for row in POOLED.keys() & rows.keys() for suite in POOLED[row]}
        lines += [
            value.over_tasks.describe(row + versus)
            for row, value in rows.items()
            if value.over_tasks and row not in pooled
        ]
    return lines


def _notes_on_averages(comparison: Comparison, policy: PolicyRuns) -> list[str]:
    """Return which averages, or seeds of them, are left out because a suite is missing."""
    notes, reference = [], comparison.policies[-1]
    common = policy.runs.keys() & reference.runs.keys()
    for row, suites in AVERAGES.items():
        value = comparison.differences[policy.name].get(row)
        seeds = sorted({seed for seed, suite in common if suite in suites})
        left_out = [seed for seed in seeds if value is None or seed not in value.by_seed]
        # Unless all four suites are there in some seed, the average has no row at all.
        if left_out and {suite for _, suite in common}.issuperset(suites):
            notes.append(
                f"{row}, {policy.name} against {reference.name}: without {', '.join(left_out)}, where not "
                "all four suites are there for both."
            )
    return notes


def _missing(here: PolicyRuns, there: PolicyRuns) -> list[str]:
    return ["/".join(key) for key in here.runs if key not in there.runs]


def _count(value: Success) -> str:
    return f"{len(value.by_seed)} x {value.episodes // len(value.by_seed)}"


def _rate(value: Success) -> str:
    return f"{100 * value.rate:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _signed(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _change(value: Difference) -> str:
    return _signed(value.difference, value.low, value.high) + _deviation(value)


def _deviation(value: Difference) -> str:
    return "" if value.seed_deviation is None else f" (sd {100 * value.seed_deviation:.1f})"


def compare_open_loop(first: Path, second: Path) -> str:
    """Return a table of two evaluations of the same recorded frames: errors and paired differences.

    The interval of a difference is Student's over episodes, whose frames are not independent.

    Raises:
        ValueError: If the evaluations are of other frames or joints.
    """
    one, other = (read_json(folder / OPEN_LOOP_REPORT) for folder in (first, second))
    for field in ("joints", "chunks", "last_action", "mean_action"):
        if one[field] != other[field]:
            raise ValueError(
                f"{first} and {second} are of other recorded actions ({field} differs). Evaluate both with "
                "the same root and episodes, policies of one chunk_size: vega-eval-offline CHECKPOINT "
                "root=FOLDER 'episodes=[...]'"
            )
    pairs = [np.array(list(report["by_episode"].values())) for report in (one, other)]  # [e a] each
    width = max(len("joint"), *map(len, one["joints"]))
    lines = [f"{'joint':{width}}  {'first':>10}  {'second':>10}  {'difference':>10}  95% interval"]
    for entry, name in enumerate(one["joints"]):
        errors = one["policy"][entry], other["policy"][entry]
        row = f"{name:{width}}  {errors[0]:>10.4g}  {errors[1]:>10.4g}  {errors[0] - errors[1]:>+10.4g}"
        lines.append(f"{row}  {_describe_interval(pairs[0][:, entry] - pairs[1][:, entry])}")
    lines.append(
        f"mean absolute error over {one['chunks']} chunks of {len(pairs[0])} episodes; first: {first}, "
        f"second: {second}. The intervals know nothing of other training seeds."
    )
    return "\n".join(lines)


def _describe_interval(differences: np.ndarray) -> str:
    """Return the interval of the mean of differences [e], or why there is none."""
    if len(differences) < 2:
        return "(one episode)"
    interval = student_interval(differences)
    return f"[{interval.low:+.4g}, {interval.high:+.4g}]"
