"""The paired comparison of two evaluations that played the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vega_policy.evaluation.conditions import read_conditions, require_two, unlike_conditions
from vega_policy.evaluation.episodes import EpisodeResult
from vega_policy.evaluation.run_folder import read_episodes
from vega_policy.evaluation.summary import paired_difference


class UnpairedRunsError(ValueError):
    """Two evaluations did not play the same episodes; the message says where they part."""


def compare_runs(
    first: Path, second: Path, *, first_control: str = "none", second_control: str = "none"
) -> dict[str, dict[str, Any]]:
    """Compare two evaluations episode by episode.

    Args:
        first: Folder of the first evaluation.
        second: Folder of the second evaluation; may be the same one, under another control.
        first_control: Control of the first evaluation.
        second_control: Control of the second evaluation.

    Returns:
        `summary.paired_difference` for each task, and under `all` for all of them.

    Raises:
        FileNotFoundError: If a folder holds no finished episode.
        UnpairedRunsError: If they did not play the same episodes from the same initial states.
        ValueError: If both are one folder under one control.
    """
    require_two([first, second], [first_control, second_control])
    one, two = _episodes(first, first_control), _episodes(second, second_control)
    require_same_episodes(one, two)
    tasks = dict.fromkeys(result.task for result in one)
    comparison = {
        task: paired_difference([r for r in one if r.task == task], [r for r in two if r.task == task])
        for task in tasks
    }
    return {**comparison, "all": paired_difference(one, two)}


def comparison_notes(
    first: Path, second: Path, *, first_control: str = "none", second_control: str = "none"
) -> list[str]:
    """Return what a reader of a comparison must know: which is which, and what was not alike.

    Args:
        first: Folder of the first evaluation.
        second: Folder of the second evaluation.
        first_control: Control of the first evaluation.
        second_control: Control of the second evaluation.
    """
    sides = (("first", first, first_control), ("second", second, second_control))
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


def _episodes(folder: Path, control: str) -> list[EpisodeResult]:
    episodes = read_episodes(folder)
    chosen = [result for result in episodes if result.control == control]
    if not chosen:
        played = sorted({result.control for result in episodes})
        raise UnpairedRunsError(f"{folder} has no episodes under the control {control!r}; it has {played}")
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
