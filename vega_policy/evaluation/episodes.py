"""Episodes of an evaluation: the plan, the results on disk, and the shards of a distributed evaluation."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow
import pyarrow.parquet

from vega_policy.evaluation.env_worker import EpisodeSpec
from vega_policy.run_dir import SETTINGS, check_same_settings, open_run, read_json, write_bytes, write_text

FIRST_SEED = 1_000_000
"""Evaluation episodes are reset with seeds from here on; demonstrations use the seeds below."""

EPISODES_PER_SEED = 10_000
"""Seed k of an evaluation owns the episode seeds FIRST_SEED + k * EPISODES_PER_SEED and following."""

SUMMARY_FILE = "summary.json"
EPISODES_FILE = "episodes.parquet"
PROGRESS_FILE = "progress.json"
TRAJECTORY_FOLDER = "trajectories"
SHARD_FOLDER = "shards"


class TaskDescription(Protocol):
    """A task of a suite; `envs.base.Task` satisfies it."""

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
    def instruction(self) -> str:
        """The sentence that the policy receives."""
        ...

    @property
    def official_states(self) -> int:
        """Number of official initial states; 0 where there are none."""
        ...

    @property
    def group(self) -> str:
        """Group of the task (Meta-World's difficulty), else empty."""
        ...


EpisodeKey = tuple[int, int]
"""Index of the task and index of the episode within it: unique in one evaluation of one suite."""


@dataclass(frozen=True)
class Episode:
    """A planned episode."""

    suite: str
    task: str
    task_index: int
    index: int  # within the task, from 0
    seed: int  # of the reset
    initial_state: int | None  # index of an official initial state; None: the seed alone decides
    perturbation: str = "none"  # axis along which the environment changes it
    perturbation_strength: float = 0.5

    @property
    def key(self) -> EpisodeKey:
        """Identifies the episode within its evaluation."""
        return self.task_index, self.index

    @property
    def scene(self) -> tuple[str, int]:
        """Suite and task, for which a simulator is built."""
        return self.suite, self.task_index

    def row(self, batch_size: int) -> int:
        """Return the episode's row in every batch of the policy."""
        # The stride spreads the episodes that begin together, the first ones of every task, over the rows.
        return (self.index + 7 * self.task_index) % batch_size

    def spec(self) -> EpisodeSpec:
        """Return what a worker needs to run the episode."""
        spec: EpisodeSpec = {
            "suite": self.suite,
            "task_index": self.task_index,
            "seed": self.seed,
            "initial_state": self.initial_state,
        }
        if self.perturbation != "none":
            names = ("perturbation", "perturbation_strength")
            spec["options"] = {name: getattr(self, name) for name in names}
        return spec


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of an episode: a row of episodes.parquet."""

    ablation: str
    suite: str
    task: str
    task_index: int
    index: int  # within the task
    seed: int  # of the reset
    success: bool  # by the simulator's own check
    length: int  # executed actions
    policy_calls: int  # predicted chunks
    initial_hash: str  # short SHA-256 of the simulator state after the reset
    final_hash: str  # of the last simulator state
    perturbation: str = "none"  # axis along which the environment changed it

    @property
    def key(self) -> EpisodeKey:
        """Identifies the episode within its evaluation and ablation."""
        return self.task_index, self.index


_ARROW_TYPES = {"str": pyarrow.string(), "int": pyarrow.int64(), "bool": pyarrow.bool_()}
_SCHEMA = pyarrow.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in fields(EpisodeResult)])


def select_tasks(tasks: Sequence[TaskDescription], indices: Sequence[int] | None) -> list[TaskDescription]:
    """Return the tasks with the given indices, in the suite's order; all of them for None.

    Raises:
        ValueError: If an index does not exist; lists the tasks.
    """
    if indices is None:
        return list(tasks)
    if unknown := sorted(set(indices) - {task.index for task in tasks}):
        known = ", ".join(f"{task.index} {task.name}" for task in tasks)
        raise ValueError(f"no tasks with index {unknown}; the suite has: {known}")
    return [task for task in tasks if task.index in set(indices)]


def plan_episodes(
    tasks: Sequence[TaskDescription],
    episodes_per_task: int,
    seed: int,
    *,
    official_states: bool,
    perturbation: str = "none",
    perturbation_strength: float = 0.5,
) -> list[Episode]:
    """Return all episodes of an evaluation, task by task; different seeds share none.

    There are 1 to `EPISODES_PER_SEED` of each task. With `official_states` episode i starts from the suite's
    official initial state i. `perturbation` is the axis along which the environment changes every episode, by
    a strength in (0, 1].

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
        Episode(
            suite=task.suite,
            task=task.name,
            task_index=task.index,
            index=index,
            seed=first + index,
            initial_state=index if official_states else None,
            perturbation=perturbation,
            perturbation_strength=perturbation_strength,
        )
        for task in tasks
        for index in range(episodes_per_task)
    ]


def _require_official_states(tasks: Sequence[TaskDescription], episodes_per_task: int) -> None:
    for task in tasks:
        if task.official_states == 0:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has no official initial states; set "
                "official_states=false to draw its episodes by seed"
            )
        if episodes_per_task > task.official_states:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has {task.official_states} official initial states, "
                f"but episodes_per_task is {episodes_per_task}; lower it, or set official_states=false"
            )


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 0, of an evaluation in `count` parts.

    Raises:
        ValueError: If the index is not below the count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shards are counted from 0: expected shard in [0, {self.count - 1}] with "
                f"shards={self.count}, got {self.index}"
            )

    def folder(self, output_dir: Path) -> Path:
        """Return the shard's folder; a single shard is `output_dir` itself."""
        return output_dir if self.count == 1 else output_dir / SHARD_FOLDER / f"{self.index}_of_{self.count}"

    def part(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Return the episodes of the shard: a contiguous stretch, so that it has few tasks to build."""
        first, end = (len(episodes) * index // self.count for index in (self.index, self.index + 1))
        return list(episodes[first:end])


class EvaluationFolder:
    """An evaluation on disk, locked; opening it again with the same settings resumes it."""

    def __init__(self, path: Path, settings: dict[str, Any], *, kept: int | None = 0) -> None:
        """Open or begin an evaluation with these settings (JSON values, all that decides the results).

        Simulator states of `kept` successes and as many failures are kept; None keeps all.

        Raises:
            OtherRunError: If the folder holds an evaluation with other settings, or other files.
            FolderInUseError: If another process evaluates into it.
        """
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        with contextlib.ExitStack() as lock:
            lock.enter_context(open_run(path, self.settings, may_hold=[SHARD_FOLDER]))
            self._results = read_episodes(path) if (path / EPISODES_FILE).is_file() else []
            self.progress = Progress.read(path / PROGRESS_FILE)
            self.trajectories = Trajectories(path / TRAJECTORY_FOLDER, kept)
            self._lock = lock.pop_all()

    def results(self, ablation: str) -> list[EpisodeResult]:
        """Return the finished episodes under an ablation, in order of task and episode."""
        return sorted((r for r in self._results if r.ablation == ablation), key=lambda result: result.key)

    def discard(self, ablation: str) -> None:
        """Drop the finished episodes under an ablation, because it can only run as a whole."""
        self._results = [result for result in self._results if result.ablation != ablation]

    def add(self, results: Iterable[EpisodeResult]) -> None:
        """Record finished episodes; they are on disk when this returns."""
        ordered = sorted([*self._results, *results], key=lambda result: (result.ablation, result.key))
        table = pyarrow.Table.from_pylist([asdict(result) for result in ordered], schema=_SCHEMA)
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        write_bytes(self.path / EPISODES_FILE, buffer.getvalue())
        self._results = ordered  # after a failed write they may be added again

    def gather_shards(self, recorded_ablation: str) -> None:
        """Add the finished episodes of all shards, and the simulator states of those under one ablation.

        Raises:
            OtherRunError: If a shard has other settings.
        """
        known = {(result.ablation, result.key) for result in self._results}
        for path in sorted((self.path / SHARD_FOLDER).glob("*_of_*")):
            if not (path / EPISODES_FILE).is_file():
                continue
            check_same_settings(path, read_json(path / SETTINGS), self.settings)
            new = [result for result in read_episodes(path) if (result.ablation, result.key) not in known]
            if not new:
                continue
            states = Trajectories(path / TRAJECTORY_FOLDER, 0)
            for result in new:
                if result.ablation == recorded_ablation:
                    self.trajectories.offer(result, states.load(result))
            self.progress.add(Progress.read(path / PROGRESS_FILE))
            self.progress.write(self.path / PROGRESS_FILE)
            self.add(new)
            known |= {(result.ablation, result.key) for result in new}

    def add_seconds(self, seconds: float) -> None:
        """Add wall-clock time to the recorded cost and write it."""
        self.progress.seconds += seconds
        self.progress.write(self.path / PROGRESS_FILE)

    def close(self) -> None:
        """Free the lock; the end of the process does so too."""
        self._lock.close()


@dataclass
class Progress:
    """Cost of an evaluation over all its starts: wall-clock seconds and durations of policy calls."""

    seconds: float = 0.0
    call_seconds: dict[str, list[float]] = field(default_factory=dict)  # by ablation
    single_call_seconds: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Read what earlier starts recorded, if anything."""
        return cls(**read_json(path)) if path.is_file() else cls()

    def add(self, other: Progress) -> None:
        """Add the cost of another part of the evaluation."""
        self.seconds += other.seconds
        for ablation, seconds in other.call_seconds.items():
            self.call_seconds.setdefault(ablation, []).extend(seconds)
        self.single_call_seconds = self.single_call_seconds or other.single_call_seconds

    def write(self, path: Path) -> None:
        """Write it to disk."""
        write_text(path, json.dumps(asdict(self)) + "\n")


class Trajectories:
    """Simulator states of the first successes and failures, to render their videos afterwards, or of all.

    "First" is by episode index across tasks, not by time, so that the choice is repeatable.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        """Open the folder; of successes and of failures `keep` are kept each, all with None."""
        self._folder = folder
        self._keep = keep

    def offer(self, result: EpisodeResult, states: np.ndarray | None) -> None:
        """Keep the states [t n] of an episode if it is among the first of its kind so far."""
        if states is None or self._keep == 0:
            return
        buffer = io.BytesIO()
        np.save(buffer, states)
        write_bytes(self._path(result), buffer.getvalue())
        if self._keep is None:
            return
        # Names begin with the episode's index, then the task's: their order is the order of choice.
        kind = self._path(result).stem.rpartition("_")[-1]
        for path in sorted(self._folder.glob(f"*_{kind}.npy"))[self._keep :]:
            path.unlink()

    def load(self, result: EpisodeResult) -> np.ndarray | None:
        """Return the states [t n] of an episode, or None if they were not kept."""
        path = self._path(result)
        return np.load(path) if path.is_file() else None

    def _path(self, result: EpisodeResult) -> Path:
        kind = "success" if result.success else "failure"
        return self._folder / f"{result.index:05d}_{result.task_index:03d}_{kind}.npy"


def read_episodes(folder: Path) -> list[EpisodeResult]:
    """Return the finished episodes of an evaluation; FileNotFoundError if there are none."""
    path = folder / EPISODES_FILE
    if not path.is_file():
        found = "holds no evaluation with a finished episode" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{path} does not exist: {folder} {found}; evaluate first: "
            f"scripts/eval_policy.py checkpoint=... output_dir={folder}"
        )
    rows = pyarrow.parquet.read_table(path, schema=_SCHEMA).to_pylist()
    # Tables from before there were perturbations have no such column, which reads as null.
    return [EpisodeResult(**{**row, "perturbation": row["perturbation"] or "none"}) for row in rows]


def read_conditions(folder: Path) -> dict[str, Any]:
    """Return the settings of an evaluation; empty where its folder holds episodes alone.

    `action_steps` is taken from the summary if there is one: the settings hold null for the policy's own.

    Raises:
        ValueError: If a file cannot be read.
    """
    settings, summary = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (SETTINGS, SUMMARY_FILE)
    )
    return {**settings, **{name: summary[name] for name in ("action_steps",) if name in summary}}
