"""Success rates of demonstrators, without rendering, on fresh resets or official initial states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import envs
from envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEED, Task
from envs.demos.collect import context
from envs.demos.shards import Demonstrator, record
from vega_policy.run_dir import write_json

FIRST_SEED = DEMONSTRATION_SEEDS.stop - 10_000  # collections begin at the other end
DECISIVE_MODULES = ("base.py", "libero.py", "metaworld.py", "robosuite.py")
"""Modules that decide an episode's outcome, besides the demonstrators."""


@dataclass(frozen=True)
class TaskSuccess:
    """Outcomes of the episodes of one task."""

    task: Task
    official: bool  # from official initial states, else from fresh resets
    lengths: tuple[int, ...]  # steps of each success, 0 for a failure, in order of episodes

    @property
    def key(self) -> tuple[str, int, bool]:
        """Suite, index of the task, kind of start."""
        return self.task.suite, self.task.index, self.official

    @property
    def successes(self) -> int:
        """Number of successes."""
        return sum(length > 0 for length in self.lengths)


def measure_task(task: Task, episodes: Sequence[int], official: bool) -> TaskSuccess:
    """Roll out episodes of one task in this process.

    `episodes` are indices of official initial states, or count the seeds of fresh resets.
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
    """Roll out episodes of all tasks of suites (of the indices `only`) in parallel, a task a process.

    Episodes of `known` results are not repeated; each task is yielded as it ends, with its known episodes.

    Raises:
        ValueError: If a suite has fewer official initial states than episodes.
    """
    tasks = [task for suite in suites for task in envs.tasks(suite) if only is None or task.index in only]
    short = sorted({task.suite for task in tasks if official and task.official_states < episodes})
    if short:
        raise ValueError(f"{short} have fewer than {episodes} official initial states a task")
    lengths = {result.key: result.lengths for result in known}
    with ProcessPoolExecutor(processes, context()) as pool:
        running = {}
        for task in tasks:
            before = lengths.get((task.suite, task.index, official), ())
            missing = range(len(before), episodes)
            if missing:
                running[pool.submit(measure_task, task, missing, official)] = before
            else:
                yield TaskSuccess(task, official, before[:episodes])
        for future in as_completed(running):
            result = future.result()
            yield replace(result, lengths=running[future] + result.lengths)


def code_version() -> str:
    """Return a hash over the code that decides outcomes; the simulators' versions are fixed."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted([*package.glob("demos/*.py"), *(package / name for name in DECISIVE_MODULES)]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def save_results(path: Path, results: Sequence[TaskSuccess]) -> None:
    """Write results and the code's version as JSON, atomically."""
    write_json(path, {"version": code_version(), "results": [asdict(result) for result in results]})


def load_results(path: Path) -> list[TaskSuccess]:
    """Read what `save_results` wrote; an empty list if there is no such file.

    Raises:
        ValueError: If the file holds something else, or results of other code.
    """
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        version = stored["version"]
        results = [
            TaskSuccess(Task(**entry["task"]), entry["official"], tuple(entry["lengths"]))
            for entry in stored["results"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of this script ({error!r}); name another file") from None
    if version != code_version():
        raise ValueError(
            f"{path} holds results of other code: {version}, now {code_version()}; one table mixes no "
            "versions, so name another file"
        )
    return results


def merged(known: Sequence[TaskSuccess], result: TaskSuccess) -> list[TaskSuccess]:
    """Return `known` with `result` in place of the earlier result of its task and kind of start."""
    return [other for other in known if other.key != result.key] + [result]


def success_table(results: Sequence[TaskSuccess]) -> str:
    """Return a Markdown table, a line a suite: successes, by task, mean length of successes."""
    lines = ["| suite | start | success | by task | mean steps |", "|---|---|---|---|---|"]
    for suite, official in dict.fromkeys((result.task.suite, result.official) for result in results):
        chosen = [r for r in results if (r.task.suite, r.official) == (suite, official)]
        chosen.sort(key=lambda result: result.task.index)
        succeeded, total = sum(r.successes for r in chosen), sum(len(r.lengths) for r in chosen)
        lengths = [length for r in chosen for length in r.lengths if length]
        by_task = " ".join(str(r.successes) for r in chosen)
        steps = f"{sum(lengths) / len(lengths):.0f}" if lengths else "-"
        rate = f"{succeeded}/{total} ({succeeded / total:.1%})"
        lines.append(f"| {suite} | {'official' if official else 'fresh'} | {rate} | {by_task} | {steps} |")
    return "\n".join(lines)
