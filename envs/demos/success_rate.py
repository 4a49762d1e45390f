"""How often demonstrators succeed: played without a picture, on fresh resets or official initial states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import envs
from envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEED, Task
from envs.demos.collect import context
from envs.demos.shards import Demonstrator, record

FIRST_SEED = DEMONSTRATION_SEEDS.stop - 10_000  # collections begin at the other end
PLAYED_BY = ("base.py", "libero.py", "metaworld.py", "robosuite.py")
"""Modules that decide what comes of an episode, besides the demonstrators."""


@dataclass(frozen=True)
class TaskSuccess:
    """What came of the episodes of one task.

    Attributes:
        task: What was demonstrated.
        official: Whether from official initial states, else from fresh resets.
        lengths: Steps of each success, 0 for a failure, in order of episodes.
    """

    task: Task
    official: bool
    lengths: tuple[int, ...]

    @property
    def successes(self) -> int:
        """Number of successes."""
        return sum(length > 0 for length in self.lengths)


def measure_task(task: Task, episodes: Sequence[int], official: bool) -> TaskSuccess:
    """Play episodes of one task in this process.

    Args:
        task: What is demonstrated.
        episodes: Indices of the episodes: of the official states, or counting the seeds of fresh resets.
        official: Whether to start from official initial states.
    """
    env = envs.make(task.suite, task.index, render=False)
    lengths = []
    for index in episodes:
        seed = EVALUATION_SEED + index if official else FIRST_SEED + index
        recording = record(env, seed, Demonstrator(), initial_state=index if official else None)
        lengths.append(0 if recording is None else len(recording.actions))
    env.close()
    return TaskSuccess(task, official, tuple(lengths))


def measure(
    suites: Sequence[str],
    *,
    episodes: int,
    official: bool,
    processes: int,
    only: Sequence[int] | None = None,
    known: Sequence[TaskSuccess] = (),
) -> Iterator[TaskSuccess]:
    """Play episodes of all tasks of suites in parallel, a task a process.

    Args:
        suites: Names of suites.
        episodes: Episodes of each task.
        official: Whether to start from official initial states.
        processes: Worker processes.
        only: Indices of the tasks; None takes all.
        known: Results so far, whose episodes are not played again.

    Yields:
        Each task as it ends, its known episodes among the others.

    Raises:
        ValueError: If a suite has too few official states.
    """
    tasks = [task for suite in suites for task in envs.tasks(suite) if only is None or task.index in only]
    poor = [task.suite for task in tasks if official and task.official_states < episodes]
    if poor:
        raise ValueError(f"{sorted(set(poor))} have fewer than {episodes} official initial states a task")
    lengths = {(r.task.suite, r.task.index): r.lengths for r in known if r.official == official}
    with ProcessPoolExecutor(processes, context()) as pool:
        running = {}
        for task in tasks:
            played = lengths.get((task.suite, task.index), ())
            missing = range(len(played), episodes)
            if missing:
                running[pool.submit(measure_task, task, missing, official)] = played
            else:
                yield TaskSuccess(task, official, played[:episodes])
        for future in as_completed(running):
            result = future.result()
            yield replace(result, lengths=running[future] + result.lengths)


def code_version() -> str:
    """Return a hash over the code that plays; other versions of the simulators are refused anyway."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted([*package.glob("demos/*.py"), *(package / name for name in PLAYED_BY)]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def save_results(path: Path, results: Sequence[TaskSuccess]) -> None:
    """Write results and the code's version as JSON, in one piece even if the process is killed meanwhile."""
    aside = path.with_name(f"{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"version": code_version(), "results": [asdict(result) for result in results]}
    aside.write_text(json.dumps(stored, indent=1) + "\n")
    aside.replace(path)


def load_results(path: Path) -> list[TaskSuccess]:
    """Read what `save_results` wrote; nothing if there is no such file.

    Raises:
        ValueError: If the file holds something else, or results of other code.
    """
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        version, results = stored["version"], [_result(entry) for entry in stored["results"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of this script ({error!r}); name another file") from None
    if version != code_version():
        raise ValueError(
            f"{path} holds results of other code: {version}, now {code_version()}; one table mixes no "
            "versions, so name another file"
        )
    return results


def _result(stored: dict[str, Any]) -> TaskSuccess:
    return TaskSuccess(Task(**stored["task"]), stored["official"], tuple(stored["lengths"]))


def merged(known: Sequence[TaskSuccess], result: TaskSuccess) -> list[TaskSuccess]:
    """Return `known` with `result` in place of what was known of its task from the same kind of start."""
    same = (result.task.suite, result.task.index, result.official)
    return [r for r in known if (r.task.suite, r.task.index, r.official) != same] + [result]


def success_table(results: Sequence[TaskSuccess]) -> str:
    """Return results as a table in Markdown: a line a suite, successes by task, mean length of successes."""
    lines = ["| suite | start | success | by task | mean steps |", "|---|---|---|---|---|"]
    for suite, official in dict.fromkeys((result.task.suite, result.official) for result in results):
        chosen = [r for r in results if (r.task.suite, r.official) == (suite, official)]
        chosen.sort(key=lambda result: result.task.index)
        won, played = sum(r.successes for r in chosen), sum(len(r.lengths) for r in chosen)
        lengths = [length for r in chosen for length in r.lengths if length]
        by_task = " ".join(str(r.successes) for r in chosen)
        steps = f"{sum(lengths) / len(lengths):.0f}" if lengths else "-"
        start = "official" if official else "fresh"
        lines.append(f"| {suite} | {start} | {won}/{played} ({won / played:.1%}) | {by_task} | {steps} |")
    return "\n".join(lines)
