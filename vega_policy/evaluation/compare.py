"""The paired comparison of two evaluations that played the same episodes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from vega_policy.evaluation.episodes import (
    EPISODES_FILE,
    SETTINGS_FILE,
    SHARD_FOLDER,
    SUMMARY_FILE,
    EpisodeResult,
    read_episodes,
)
from vega_policy.evaluation.report import paired_difference
from vega_policy.evaluation.stats import (
    interval_of_mean,
    mean_of_tasks,
    paired_interval,
    repeated_wilson_interval,
    sign_flip_exact,
)

SHOWN = ("frame_size", "rendering", "action_steps")
"""Settings that change what a policy is shown or how often it is asked, and no initial state."""

Settings = Mapping[str, Any]


def read_conditions(folder: Path) -> dict[str, Any]:
    """Return the settings of an evaluation; none where its folder holds episodes alone.

    `action_steps` are those that were executed, where the summary tells: the settings say null for the
    policy's own number.

    Raises:
        ValueError: If a file cannot be read.
    """
    settings, summary = (_read(folder / name) for name in (SETTINGS_FILE, SUMMARY_FILE))
    return {**settings, **{name: summary[name] for name in ("action_steps",) if name in summary}}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} cannot be read: expected an object, got {type(values).__name__}; copy it again"
        )
    return values


def require_two(folders: Sequence[Path], ablations: Sequence[str]) -> None:
    """Refuse to compare a folder with itself.

    Raises:
        ValueError: If two of the folders are one and the same, under the same ablation.
    """
    seen: dict[tuple[Path, str], Path] = {}
    for folder, ablation in zip(folders, ablations, strict=True):
        place = (folder.resolve(), ablation)
        if twin := seen.get(place):
            raise ValueError(
                f"{twin} and {folder} are one folder under one ablation ({ablation}): every difference would "
                "be zero; give other folders, or other ablations (--first-ablation, --second-ablation)"
            )
        seen[place] = folder


def same_checkpoint(first: Settings, second: Settings) -> bool:
    """Tell whether two evaluations are known to be of one and the same checkpoint."""
    known = first.get("checkpoint_sha256")
    return known is not None and known == second.get("checkpoint_sha256")


def unlike_conditions(names: tuple[str, str], pairs: Mapping[str, tuple[Settings, Settings]]) -> list[str]:
    """Return one sentence for each setting that the two sides of a comparison do not share.

    Args:
        names: What the first and the second side are called.
        pairs: Settings of the first and of the second evaluation, by the place where they lie.
    """
    unlike: dict[str, list[str]] = {}
    for place, settings in pairs.items():
        for name in SHOWN if all(settings) else ():
            shown = ["not recorded" if of.get(name) is None else of[name] for of in settings]
            if shown[0] != shown[1]:
                sides = ", ".join(f"{side} {value}" for side, value in zip(names, shown, strict=True))
                unlike.setdefault(f"Not played alike, {name}: {sides}", []).append(place)
    for side, name in enumerate(names):
        if unknown := [place for place, settings in pairs.items() if not settings[side]]:
            unlike[f"Whether it was played alike is not known: {name} lacks {SETTINGS_FILE}"] = unknown
    return [f"{what} ({', '.join(places)})." for what, places in unlike.items()]


class UnpairedRunsError(ValueError):
    """Two evaluations did not play the same episodes; the message says where they part."""


def compare_runs(
    first: Path, second: Path, *, first_ablation: str = "none", second_ablation: str = "none"
) -> dict[str, dict[str, Any]]:
    """Compare two evaluations episode by episode.

    Args:
        first: Folder of the first evaluation.
        second: Folder of the second evaluation; may be the same one, under another ablation.
        first_ablation: Ablation of the first evaluation.
        second_ablation: Ablation of the second evaluation.

    Returns:
        `summary.paired_difference` for each task, and under `all` for all of them.

    Raises:
        FileNotFoundError: If a folder holds no finished episode.
        UnpairedRunsError: If they did not play the same episodes from the same initial states.
        ValueError: If both are one folder under one ablation.
    """
    require_two([first, second], [first_ablation, second_ablation])
    one, two = _episodes(first, first_ablation), _episodes(second, second_ablation)
    require_same_episodes(one, two)
    tasks = dict.fromkeys(result.task for result in one)
    comparison = {
        task: paired_difference([r for r in one if r.task == task], [r for r in two if r.task == task])
        for task in tasks
    }
    return {**comparison, "all": paired_difference(one, two)}


def comparison_notes(
    first: Path, second: Path, *, first_ablation: str = "none", second_ablation: str = "none"
) -> list[str]:
    """Return what a reader of a comparison must know: which is which, and what was not alike.

    Args:
        first: Folder of the first evaluation.
        second: Folder of the second evaluation.
        first_ablation: Ablation of the first evaluation.
        second_ablation: Ablation of the second evaluation.
    """
    sides = (("first", first, first_ablation), ("second", second, second_ablation))
    named = [f"{side}: {place}{'' if of == 'none' else f' ({of})'}" for side, place, of in sides]
    settings = (read_conditions(first), read_conditions(second))
    alike = unlike_conditions(("first", "second"), {f"{first} and {second}": settings})
    method = (
        "difference: first minus second, paired, with Bonett and Price's interval; McNemar: exact p "
        "(episodes that only the first solved : only the second)"
    )
    return [*named, method, *alike]


def comparison_table(comparison: dict[str, dict[str, Any]], *, markdown: bool = False) -> str:
    """Return a comparison as text or Markdown, a line for each task and one for all."""
    shown = comparison if len(comparison) > 2 else {"all": comparison["all"]}
    if markdown:
        return _markdown(shown)
    width = max(len(task) for task in ("task", *shown))
    lines = [
        f"{'task':<{width}} {'episodes':>8} {'first':>7} {'second':>7} {'difference':>11}   "
        f"{'95% interval':<16} McNemar p"
    ]
    for task, row in shown.items():
        interval = f"[{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"
        lines.append(
            f"{task:<{width}} {row['episodes']:>8} {100 * row['first_success_rate']:>6.1f}% "
            f"{100 * row['second_success_rate']:>6.1f}% {100 * row['difference']:>+10.1f}%   {interval:<16} "
            f"{row['mcnemar_p']:.3g} ({row['only_first']}:{row['only_second']})"
        )
    return "\n".join(lines)


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a Markdown table; the first row is the head."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rows])


def _markdown(shown: dict[str, dict[str, Any]]) -> str:
    cells = [["task", "episodes", "first, %", "second, %", "difference [95% interval]", "McNemar p"]]
    cells += [
        [
            task,
            str(row["episodes"]),
            f"{100 * row['first_success_rate']:.1f}",
            f"{100 * row['second_success_rate']:.1f}",
            f"{100 * row['difference']:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]",
            f"{row['mcnemar_p']:.3g} ({row['only_first']}:{row['only_second']})",
        ]
        for task, row in shown.items()
    ]
    return markdown_table(cells)


def _episodes(folder: Path, ablation: str) -> list[EpisodeResult]:
    episodes = read_episodes(folder)
    chosen = [result for result in episodes if result.ablation == ablation]
    if not chosen:
        played = sorted({result.ablation for result in episodes})
        raise UnpairedRunsError(f"{folder} has no episodes under the ablation {ablation!r}; it has {played}")
    return sorted(chosen, key=lambda result: result.key)


def require_same_episodes(one: Sequence[EpisodeResult], two: Sequence[EpisodeResult]) -> None:
    """Refuse to pair episodes that are not the same ones.

    Args:
        one: Episodes of the first run, sorted by their keys.
        two: Episodes of the second run, sorted likewise.

    Raises:
        UnpairedRunsError: Naming what differs.
    """
    first, second = ({(r.suite, *r.key) for r in results} for results in (one, two))
    if first != second:
        raise UnpairedRunsError(
            f"the runs did not play the same episodes: {len(first - second)} only in the first, "
            f"{len(second - first)} only in the second, {len(first & second)} in both. Evaluate both with "
            "the same suite, tasks and episodes_per_task, to the end"
        )
    for a, b in zip(one, two, strict=True):
        if (a.seed, a.initial_hash) != (b.seed, b.initial_hash):
            raise UnpairedRunsError(
                f"episode {a.index} of {a.task} did not start alike: seed {a.seed}, state {a.initial_hash} "
                f"in the first run, seed {b.seed}, state {b.initial_hash} in the second; evaluate both with "
                "the same seed and the same simulator versions"
            )


RunKey = tuple[str, str]
"""Seed folder ("." where there is none) and suite of an evaluation."""


@dataclass(frozen=True)
class PolicyRuns:
    """All evaluations of one policy.

    Attributes:
        name: How the policy is called in tables.
        folder: Where its evaluations lie.
        ablation: Ablation under which they were played.
        runs: Episodes of each evaluation, sorted by their keys.
        settings: Settings of each evaluation, empty where they are not known.
    """

    name: str
    folder: str
    ablation: str
    runs: Mapping[RunKey, Sequence[EpisodeResult]]
    settings: Mapping[RunKey, Settings]


def is_evaluation(folder: Path) -> bool:
    """Tell whether a folder is one evaluation itself."""
    return (folder / EPISODES_FILE).is_file()


def evaluations_below(folder: Path) -> list[Path]:
    """Return the evaluations in a folder that is none itself; the shards of an evaluation are not listed."""
    if is_evaluation(folder):
        return []
    files = sorted(folder.rglob(EPISODES_FILE))
    return [file.parent for file in files if SHARD_FOLDER not in file.relative_to(folder).parts]


def read_policies(folders: Sequence[Path], ablations: Sequence[str]) -> list[PolicyRuns]:
    """Read several policies, called by their folders' names, or by the paths where two names are the same.

    Args:
        folders: Folder of each policy.
        ablations: Ablation of each policy; named where it is not `none`.

    Raises:
        FileNotFoundError: If a folder holds no evaluation.
        ValueError: If two are one folder under one ablation, and as `read_policy` says.
    """
    require_two(folders, ablations)
    of = ["" if ablation == "none" else f" ({ablation})" for ablation in ablations]
    names = [folder.resolve().name + ablation for folder, ablation in zip(folders, of, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{folder}{ablation}" for folder, ablation in zip(folders, of, strict=True)]
    return [read_policy(*policy) for policy in zip(folders, ablations, names, strict=True)]


def read_policy(folder: Path, ablation: str, name: str) -> PolicyRuns:
    """Read all evaluations of a policy.

    Args:
        folder: Holds `<seed>/<suite>/episodes.parquet`, or `<suite>/episodes.parquet` for a single seed.
        ablation: The ablation whose episodes are taken; evaluations without it are passed over.
        name: How the policy is called in tables.

    Raises:
        FileNotFoundError: If it holds no evaluation.
        ValueError: If an evaluation lies elsewhere, cannot be read or is of another suite than its folder's
            name, if two seeds are one and the same evaluation or of one checkpoint, or none has the ablation.
    """
    evaluations = evaluations_below(folder)
    if not evaluations:
        kind = "is one evaluation itself" if is_evaluation(folder) else "holds no evaluation"
        raise FileNotFoundError(
            f"{folder} {kind}; expected the folder of a policy, with <seed>/<suite>/{EPISODES_FILE} in it"
        )
    runs: dict[RunKey, list[EpisodeResult]] = {}
    settings: dict[RunKey, Settings] = {}
    played: set[str] = set()
    for evaluation in evaluations:
        key, episodes = _read_evaluation(folder, evaluation)
        played |= {result.ablation for result in episodes}
        if chosen := [result for result in episodes if result.ablation == ablation]:
            runs[key], settings[key] = sorted(chosen, key=lambda r: r.key), read_conditions(evaluation)
    if not runs:
        raise ValueError(
            f"{folder} has no episodes under the ablation {ablation!r}; it has {', '.join(sorted(played))}"
        )
    policy = PolicyRuns(name, str(folder), ablation, runs, settings)
    _require_own_trainings(policy)
    return policy


def _require_own_trainings(policy: PolicyRuns) -> None:
    for one, other in combinations(policy.runs, 2):
        if one[1] != other[1]:
            continue  # one training may play many suites
        places = " and ".join(f"{policy.folder}/{'/'.join(key)}" for key in (one, other))
        # To the last simulator state, as no two trainings act.
        if policy.runs[one] == policy.runs[other]:
            raise ValueError(
                f"{places} are the same episodes to the last; expected one training in each seed's folder"
            )
        if same_checkpoint(policy.settings[one], policy.settings[other]):
            raise ValueError(
                f"{places} are of one checkpoint ({policy.settings[one]['checkpoint_sha256']}); expected one "
                "training in each seed's folder: move one of them away"
            )


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


_METHOD = (
    "Success and differences in %, with 95% intervals over episodes: Wilson's for success; for differences "
    "Bonett and Price's for pairs, an initial state's episodes of all seeds kept together. "
    "Averages weigh their suites alike; theirs are Zou and Donner's."
)
_MCNEMAR = "McNemar: exact p (episodes that only the first solved : only the second)."
_OWN_SEEDS = "Success is over all seeds of a policy, a difference over those that both policies played."
_ONE_SEED = "Of one training seed the intervals cannot say how another training would come out."
_SEEDS = (
    "The intervals are for the trainings at hand; how another training would come out is told by the spread "
    "over training seeds (sd: standard deviation), which they do not contain."
)


@dataclass(frozen=True)
class Comparison:
    """Several policies, each against the last, their reference.

    Attributes:
        policies: The policies, the reference last.
        rows: Suites and averages, in the order of display.
        successes: Success of each policy by row, over all that it played.
        differences: Paired difference to the reference by row, of every other policy.
    """

    policies: Sequence[PolicyRuns]
    rows: Sequence[str]
    successes: dict[str, dict[str, Success]]
    differences: dict[str, dict[str, Difference]]

    def numbers(self) -> dict[str, Any]:
        """Return everything as JSON values: rates in [0, 1], not in percent."""
        *others, reference = self.policies
        return {
            "reference": reference.name,
            "policies": {p.name: {"folder": p.folder, "ablation": p.ablation} for p in self.policies},
            "success": {
                name: {row: asdict(value) for row, value in rows.items()}
                for name, rows in self.successes.items()
            },
            "difference_to_reference": {
                name: {row: asdict(value) for row, value in rows.items()}
                for name, rows in self.differences.items()
            },
            "unpaired": {
                p.name: {"only_here": _missing(p, reference), "only_in_reference": _missing(reference, p)}
                for p in others
            },
            "notes": _notes(self),
        }


def compare_policies(policies: Sequence[PolicyRuns]) -> Comparison:
    """Compare policies on every evaluation that has the same place below both folders.

    Args:
        policies: At least two, with different names; the last is the reference.

    Raises:
        UnpairedRunsError: If one has no evaluation in common with the reference, or they did not play the
            same episodes.
    """
    *others, reference = policies
    for policy in others:
        if not policy.runs.keys() & reference.runs.keys():
            raise UnpairedRunsError(
                f"{policy.folder} and {reference.folder} have no <seed>/<suite> in common: the first has "
                f"{_places(policy.runs)}; the second has {_places(reference.runs)}"
            )
    rows = rows_of(policies)
    successes = {p.name: {row: value for row in rows if (value := success(p, row))} for p in policies}
    differences = {
        p.name: {row: value for row in rows if (value := difference(p, reference, row))} for p in others
    }
    return Comparison(policies, rows, successes, differences)


def results_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Return a comparison as text.

    Args:
        comparison: Of two policies, a line for each suite; of more, a line for each policy.
        markdown: Whether the tables are written as Markdown.
    """
    two = len(comparison.policies) == 2
    tables = [_by_suite(comparison)] if two else _by_policy(comparison)
    pieces = [markdown_table(cells) if markdown else _text_table(cells) for cells in tables]
    return "\n\n".join([*pieces, ("\n\n" if markdown else "\n").join(_notes(comparison))])


def _text_table(cells: Sequence[Sequence[str]]) -> str:
    """Return cells as text, a line for each row, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _by_suite(comparison: Comparison) -> list[list[str]]:
    first, second = comparison.policies
    head = ["suite", "seeds x episodes", first.name, second.name, "difference", "McNemar", "by seed"]
    cells = [
        [
            row,
            _count(value.first),
            _rate(value.first),
            _rate(value.second),
            _change(value),
            "-" if value.p is None else f"{value.p:.3g} ({value.only_first}:{value.only_second})",
            ", ".join(f"{100 * seed:+.1f}" for seed in value.by_seed.values()) + _deviation(value),
        ]
        for row, value in comparison.differences[first.name].items()
    ]
    return [head, *cells]


def _by_policy(comparison: Comparison) -> list[list[list[str]]]:
    """The table of success, and that of differences to the reference."""
    rows, reference = comparison.rows, comparison.policies[-1].name
    rates = [
        [name, *(f"{_rate(of[row])} ({_count(of[row])})" if row in of else "-" for row in rows)]
        for name, of in comparison.successes.items()
    ]
    changes = [
        [name, *(_change(of[row]) + _deviation(of[row]) if row in of else "-" for row in rows)]
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
    notes = [f"{_METHOD} {_MCNEMAR if len(others) == 1 else _OWN_SEEDS}", _SEEDS if repeated else _ONE_SEED]
    for policy in others:
        for here, there in ((policy, reference), (reference, policy)):
            if missing := _missing(here, there):
                notes.append(f"Not compared, in {here.name} but not in {there.name}: {', '.join(missing)}.")
        common = [key for key in policy.runs if key in reference.runs]
        notes += unlike_conditions(
            (policy.name, reference.name),
            {"/".join(key): (policy.settings[key], reference.settings[key]) for key in common},
        )
        notes += _notes_on_averages(comparison, policy)
    return notes


def _notes_on_averages(comparison: Comparison, policy: PolicyRuns) -> list[str]:
    """Which averages, or seeds of them, are left out because a suite is missing."""
    notes, reference = [], comparison.policies[-1]
    common = policy.runs.keys() & reference.runs.keys()
    for row, suites in AVERAGES.items():
        value = comparison.differences[policy.name].get(row)
        seeds = sorted({seed for seed, suite in common if suite in suites})
        left_out = [seed for seed in seeds if value is None or seed not in value.by_seed]
        # With less than the four in all there is no average to speak of.
        if left_out and {suite for _, suite in common}.issuperset(suites):
            notes.append(
                f"{row}, {policy.name} against {reference.name}: without {', '.join(left_out)}, where not "
                "all four suites are there for both."
            )
    return notes


def _missing(here: PolicyRuns, there: PolicyRuns) -> list[str]:
    return ["/".join(key) for key in here.runs if key not in there.runs]


def _places(runs: Iterable[RunKey]) -> str:
    return ", ".join("/".join(key) for key in runs)


def _count(value: Success) -> str:
    return f"{len(value.by_seed)} x {value.episodes // len(value.by_seed)}"


def _rate(value: Success) -> str:
    return f"{100 * value.rate:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _change(value: Difference) -> str:
    return f"{100 * value.difference:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _deviation(value: Difference) -> str:
    return "" if value.seed_deviation is None else f" (sd {100 * value.seed_deviation:.1f})"
