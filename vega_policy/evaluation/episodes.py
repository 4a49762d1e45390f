"""What is played, in which slot, and what is kept of it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow
import pyarrow.parquet

from vega_policy.evaluation.env_worker import EpisodeSpec

FIRST_SEED = 1_000_000
"""Evaluation episodes are reset with seeds from here on; demonstrations use the seeds below."""

EPISODES_PER_SEED = 10_000
"""Seed k of an evaluation owns the episode seeds FIRST_SEED + k * EPISODES_PER_SEED and following."""


class TaskDescription(Protocol):
    """What an evaluation has to know of a task; `envs.base.Task` satisfies it."""

    @property
    def suite(self) -> str:
        """Name of the suite."""
        ...

    @property
    def index(self) -> int:
        """Position in the suite, from 0."""
        ...

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def official_states(self) -> int:
        """Number of official initial states; 0 where there are none."""
        ...

    @property
    def group(self) -> str:
        """Group of the task where the suite has some, else empty."""
        ...


EpisodeKey = tuple[int, int]
"""Index of the task and index of the episode within it: unique in one evaluation of one suite."""


@dataclass(frozen=True)
class Episode:
    """One episode to be played.

    Attributes:
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        index: Index of the episode within the task, from 0.
        seed: Seed of the reset.
        initial_state: Official initial state, or None where the seed alone decides.
    """

    suite: str
    task: str
    task_index: int
    index: int
    seed: int
    initial_state: int | None

    @property
    def key(self) -> EpisodeKey:
        """What identifies the episode within its evaluation."""
        return self.task_index, self.index

    def order(self) -> EpisodeSpec:
        """Return the episode as a worker is told of it."""
        return {
            "suite": self.suite,
            "task_index": self.task_index,
            "seed": self.seed,
            "initial_state": self.initial_state,
        }


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went: a row of episodes.parquet.

    Attributes:
        ablation: Name of the ablation it was played under.
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        index: Index of the episode within the task.
        seed: Seed of the reset.
        success: Whether the simulator's own check was satisfied.
        length: Number of executed actions.
        policy_calls: Number of chunks predicted.
        initial_hash: Short SHA-256 of the simulator state after the reset.
        final_hash: Short SHA-256 of the last simulator state.
    """

    ablation: str
    suite: str
    task: str
    task_index: int
    index: int
    seed: int
    success: bool
    length: int
    policy_calls: int
    initial_hash: str
    final_hash: str

    @property
    def key(self) -> EpisodeKey:
        """What identifies the episode within its evaluation and ablation."""
        return self.task_index, self.index


def plan_episodes(
    tasks: Sequence[TaskDescription], episodes_per_task: int, seed: int, *, official_states: bool
) -> list[Episode]:
    """List all episodes of an evaluation, task by task.

    Args:
        tasks: The tasks to evaluate on.
        episodes_per_task: Episodes of each task, 1 to `EPISODES_PER_SEED`.
        seed: Seed of the evaluation, at least 0; different seeds share no episode.
        official_states: Whether episode i starts from the suite's official initial state i.

    Raises:
        ValueError: If there is no task, a number is out of range, or official states are missing.
    """
    if not tasks:
        raise ValueError("expected at least one task to evaluate on, got none")
    if not 1 <= episodes_per_task <= EPISODES_PER_SEED:
        raise ValueError(
            f"expected episodes_per_task in [1, {EPISODES_PER_SEED}], got {episodes_per_task}; "
            "use several seeds for more"
        )
    if seed < 0:
        raise ValueError(
            f"expected a seed of at least 0, got {seed}; lower seeds belong to the demonstrations"
        )
    if official_states:
        _require_official_states(tasks, episodes_per_task)
    first = FIRST_SEED + seed * EPISODES_PER_SEED
    return [
        Episode(task.suite, task.name, task.index, index, first + index, index if official_states else None)
        for task in tasks
        for index in range(episodes_per_task)
    ]


def _require_official_states(tasks: Sequence[TaskDescription], episodes_per_task: int) -> None:
    for task in tasks:
        if task.official_states == 0:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has no official initial states; set "
                "official_states=false, and seeds draw its episodes"
            )
        if episodes_per_task > task.official_states:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has {task.official_states} official initial states, "
                f"but episodes_per_task is {episodes_per_task}; lower it, or set official_states=false"
            )


def slot_queues(
    episodes: Sequence[Episode], num_envs: int, finished: Collection[EpisodeKey]
) -> list[deque[Episode]]:
    """Return each slot's episodes in the order of play.

    Where an episode belongs depends on nothing that is finished: that is what makes a resumed evaluation
    equal to an uninterrupted one.

    Args:
        episodes: All episodes of the evaluation.
        num_envs: Number of slots.
        finished: Keys of the episodes that need not be played again.
    """
    queues: list[deque[Episode]] = [deque() for _ in range(num_envs)]
    for number, episode in enumerate(episodes):
        if episode.key not in finished:
            queues[slot_of(number, len(episodes), num_envs)].append(episode)
    return queues


def slot_of(number: int, episodes: int, num_envs: int) -> int:
    """Return the slot of one of all episodes: each slot plays a stretch of them.

    So a slot stays with one task for as long as it can; building another one's scene costs a LIBERO
    environment as long as an episode.
    """
    return number * num_envs // episodes


SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
EPISODES_FILE = "episodes.parquet"
PROGRESS_FILE = "progress.json"
LOCK_FILE = "lock"
TRAJECTORY_FOLDER = "trajectories"
SHARD_FOLDER = "shards"
_ARROW_TYPES = {"str": pyarrow.string(), "int": pyarrow.int64(), "bool": pyarrow.bool_()}
_SCHEMA = pyarrow.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in fields(EpisodeResult)])


class FolderInUseError(RuntimeError):
    """Another process evaluates into the same folder."""


class OtherRunError(ValueError):
    """The output folder belongs to something else; the message names the differing settings."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves either the old or the new content.

    Args:
        path: The file; its folder is made if needed.
        content: All of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


class RunFolder:
    """One evaluation on disk; opening it again with the same settings goes on where it stopped."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open or begin an evaluation.

        Args:
            path: The folder.
            settings: Everything that decides the results, as JSON values.

        Raises:
            OtherRunError: If the folder holds an evaluation with other settings, or other files.
            FolderInUseError: If another process evaluates into it.
        """
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        with contextlib.ExitStack() as claim:
            claim.enter_context(_claimed(path))
            self._begin()
            self._results = read_episodes(path) if (path / EPISODES_FILE).is_file() else []
            self.progress = Progress(path / PROGRESS_FILE)
            self._claim = claim.pop_all()

    def _begin(self) -> None:
        path = self.path
        if (path / SETTINGS_FILE).is_file():
            require_equal(path, json.loads((path / SETTINGS_FILE).read_text()), self.settings)
        elif any(entry.name not in (LOCK_FILE, SHARD_FOLDER) for entry in path.iterdir()):
            raise OtherRunError(
                f"{path} holds files but no {SETTINGS_FILE}, so it is no evaluation; choose another folder"
            )
        else:
            write_json(path / SETTINGS_FILE, self.settings)

    def has(self, result: EpisodeResult) -> bool:
        """Tell whether an episode is on record under its ablation."""
        return any((known.ablation, known.key) == (result.ablation, result.key) for known in self._results)

    def results(self, ablation: str) -> list[EpisodeResult]:
        """Return the finished episodes under an ablation, in order of task and episode."""
        return sorted((r for r in self._results if r.ablation == ablation), key=lambda result: result.key)

    def forget(self, ablation: str) -> None:
        """Drop the finished episodes under an ablation, because it can only be played as a whole."""
        self._results = [result for result in self._results if result.ablation != ablation]

    def close(self) -> None:
        """Let other processes evaluate into the folder; without, the end of the process does."""
        self._claim.close()

    def add(self, results: Iterable[EpisodeResult]) -> None:
        """Record finished episodes; they are on disk when this returns."""
        self._results += results
        ordered = sorted(self._results, key=lambda result: (result.ablation, result.key))
        table = pyarrow.Table.from_pylist([asdict(result) for result in ordered], schema=_SCHEMA)
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        write_atomically(self.path / EPISODES_FILE, buffer.getvalue())


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a folder for this process."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(
                f"another process is evaluating into {path}; wait for it, stop it, or choose another "
                "output_dir"
            ) from None
        yield


class Progress:
    """What an evaluation cost: seconds and policy-call durations, summed over its starts."""

    def __init__(self, path: Path) -> None:
        """Read what earlier starts recorded, if anything."""
        self._path = path
        self.seconds: float = 0.0
        self.call_seconds: dict[str, list[float]] = {}
        self.single_call_seconds: list[float] = []
        if path.is_file():
            stored = json.loads(path.read_text())
            self.seconds = stored["seconds"]
            self.call_seconds = stored["call_seconds"]
            self.single_call_seconds = stored["single_call_seconds"]

    def absorb(self, other: Progress) -> None:
        """Add what another part of the evaluation cost."""
        self.seconds += other.seconds
        for ablation, seconds in other.call_seconds.items():
            self.call_seconds.setdefault(ablation, []).extend(seconds)
        self.single_call_seconds = self.single_call_seconds or other.single_call_seconds
        self.save()

    def save(self) -> None:
        """Write it to disk."""
        value = {
            "seconds": self.seconds,
            "call_seconds": self.call_seconds,
            "single_call_seconds": self.single_call_seconds,
        }
        write_atomically(self._path, (json.dumps(value) + "\n").encode())


class Trajectories:
    """Simulator states of the first successes and failures, kept so that they can be filmed afterwards.

    "First" is by episode index across tasks, not by the time of finishing, so the choice is repeatable.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Open the folder.

        Args:
            folder: Where the states lie.
            keep: How many successes and how many failures are kept.
        """
        self._folder = folder
        self._keep = keep

    def offer(self, result: EpisodeResult, states: np.ndarray | None) -> None:
        """Keep the states [t n] of an episode if it is among the first of its kind so far."""
        if states is None or self._keep == 0:
            return
        buffer = io.BytesIO()
        np.save(buffer, states)
        write_atomically(self._folder / _trajectory_name(result), buffer.getvalue())
        for path in self._paths(result.success)[self._keep :]:
            path.unlink()

    def load(self, result: EpisodeResult) -> np.ndarray | None:
        """Return the states [t n] of an episode, or None if they were not kept."""
        path = self._folder / _trajectory_name(result)
        return np.load(path) if path.is_file() else None

    def _paths(self, success: bool) -> list[Path]:
        # Names begin with the episode's index, then the task's: their order is the order of choice.
        return sorted(self._folder.glob(f"*_{_outcome(success)}.npy"))


def read_episodes(folder: Path) -> list[EpisodeResult]:
    """Read the finished episodes of an evaluation.

    Args:
        folder: Folder of the evaluation.

    Raises:
        FileNotFoundError: If there is no evaluation, or none of its episodes finished.
    """
    path = folder / EPISODES_FILE
    if not path.is_file():
        holds = "holds no evaluation with a finished episode" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{path} does not exist: {folder} {holds}; evaluate first: "
            f"scripts/eval_policy.py checkpoint=... output_dir={folder}"
        )
    return [EpisodeResult(**row) for row in pyarrow.parquet.read_table(path, schema=_SCHEMA).to_pylist()]


def _outcome(success: bool) -> str:
    return "success" if success else "failure"


def _trajectory_name(result: EpisodeResult) -> str:
    return f"{result.index:05d}_{result.task_index:03d}_{_outcome(result.success)}.npy"


def require_equal(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        OtherRunError: Naming each setting that differs.
    """
    names = sorted(stored.keys() | settings.keys())
    missing = "(not set)"
    lines = [
        f"  {name}: {stored.get(name, missing)!r} there, {settings.get(name, missing)!r} now"
        for name in names
        if stored.get(name, missing) != settings.get(name, missing)
    ]
    if lines:
        raise OtherRunError(
            f"{path} holds an evaluation with other settings; choose another folder, or delete this one:\n"
            + "\n".join(lines)
        )
