"""What a simulated robot's log says: how often it succeeded, and whether time was kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vega_policy.evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class Runs:
    """Episodes of one log.

    Attributes:
        name: What was run.
        episodes: Number of episodes.
        successes: Number of successes.
        low: Lower end of the 95% Wilson interval of the success rate.
        high: Upper end.
        seconds_to_success: Mean wall-clock seconds of the successes, or None without any.
        held_share: Share of the steps for which no command had come.
        late_share: Share of the steps that the simulator itself began late; above a few percent, the machine
            was too slow and the log says little.
    """

    name: str
    episodes: int
    successes: int
    low: float
    high: float
    seconds_to_success: float | None
    held_share: float
    late_share: float


def whole_episodes(path: Path) -> list[dict[str, Any]]:
    """Return the records of episodes that nobody cut short; none, if there is no log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "success" in line and not line["cut_short"]]


def read_runs(name: str, path: Path, episodes: int | None = None) -> Runs:
    """Read the log of a simulated robot (`vega_sim`).

    Args:
        name: What was run.
        path: Its JSON lines.
        episodes: Only so many episodes, the first ones; None takes all.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds fewer episodes.
    """
    if not path.exists():
        raise FileNotFoundError(f"no log of a simulated robot at {path}")
    played = whole_episodes(path)
    if not played or len(played) < (episodes or 1):
        raise ValueError(f"{path} holds {len(played)} whole episodes, expected {episodes or 'some'}")
    played = played[:episodes]
    if any("won_at" not in line for line in played if line["success"]):
        raise ValueError(f"{path} was written by an older version; name another file")
    won = [line for line in played if line["success"]]
    steps = sum(line["steps"] for line in played)
    interval = wilson_interval(len(won), len(played))
    return Runs(
        name,
        len(played),
        len(won),
        interval.low,
        interval.high,
        sum(line["won_at"] for line in won) / len(won) if won else None,
        sum(line["held_steps"] for line in played) / steps,
        sum(line["late_steps"] for line in played) / steps,
    )


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note in a folder what is played there.

    Args:
        folder: Of a comparison's logs; made if need be.
        settings: All that decides the episodes; plain values.

    Raises:
        ValueError: If something else was played there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, told = folder / "settings.json", json.dumps(settings, indent=1)
    if note.is_file() and note.read_text() != told:
        raise ValueError(f"{folder} holds episodes of {note.read_text()}, not of {told}; name another folder")
    note.write_text(told)


def table(runs: list[Runs]) -> str:
    """Return the logs as a Markdown table."""
    lines = [
        "| run | success | 95% interval | seconds to success | steps without command | late steps |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        share = f"{run.successes}/{run.episodes} | {100 * run.low:.0f} to {100 * run.high:.0f}%"
        seconds = "" if run.seconds_to_success is None else f"{run.seconds_to_success:.1f}"
        time_kept = f"{100 * run.held_share:.0f}% | {100 * run.late_share:.1f}%"
        lines.append(f"| {run.name} | {share} | {seconds} | {time_kept} |")
    return "\n".join(lines)
