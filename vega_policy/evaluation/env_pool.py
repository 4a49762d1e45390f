"""Worker processes from the main process's side: start, send to all, wait for all, say what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vega_policy.evaluation.env_worker import EpisodeSpec, SlotReport, SlotSpec
from vega_policy.evaluation.episodes import (
    EPISODES_FILE,
    PROGRESS_FILE,
    SETTINGS_FILE,
    SHARD_FOLDER,
    TRAJECTORY_FOLDER,
    Progress,
    RunFolder,
    Trajectories,
    read_episodes,
    require_equal,
)

_WORKER_FILE = Path(__file__).with_name("env_worker.py")
_SECONDS_TO_CLOSE = 20.0


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback."""


@dataclass(frozen=True)
class EnvironmentFactory:
    """How workers build environments.

    Attributes:
        make: Dotted path of a function `(suite, task_index, *, frame_size, rendering, render) ->
            environment`.
        frame_size: Height and width of a frame in pixels.
        rendering: Rendering profile, `full` or `fast`.
    """

    make: str
    frame_size: int
    rendering: str

    def arguments(self, *, render: bool, frame_size: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `make`, for another frame size if one is given."""
        return {"frame_size": frame_size or self.frame_size, "rendering": self.rendering, "render": render}


class WorkerPool:
    """Processes that hold the environments of all slots; slot s lives in process s modulo their number.

    Use it as a context manager: leaving it ends the processes.
    """

    def __init__(self, factory: EnvironmentFactory, processes: int) -> None:
        """Start the processes; they import the simulator while the caller goes on.

        Args:
            factory: How environments are built.
            processes: Number of processes, at least 1.

        Raises:
            ValueError: If the number of processes is below 1.
        """
        if processes < 1:
            raise ValueError(f"expected at least 1 process, got processes={processes}")
        self._factory = factory
        self._children: list[tuple[subprocess.Popen[bytes], Connection]] = []
        for _ in range(processes):
            child = _start()
            self._children.append(child)
            child[1].send((sys.path, factory.make))
        self._unread = [0] * processes

    def open(self, *, render: bool, keep_states: bool, history: int = 1) -> None:
        """Say what is wanted of the environments from now on; returns at once.

        Args:
            render: Whether they render frames; those made otherwise are closed and built anew when needed.
            keep_states: Whether finished episodes come with the simulator state of each step.
            history: Frames of each camera that an observation holds, the last ones of the episode.
        """
        arguments = self._factory.arguments(render=render)
        for worker in range(len(self._children)):
            wanted = {"arguments": arguments, "keep_states": keep_states, "history": history}
            self._send(worker, "open", wanted)

    def build(self, tasks: dict[int, tuple[str, int]]) -> None:
        """Let the workers build environments while the caller goes on; returns at once.

        Args:
            tasks: Suite and index of the task that each slot plays first.
        """
        for worker, share in self._shares(tasks).items():
            self._send(worker, "build", {"tasks": share})

    def advance(self, orders: dict[int, SlotSpec]) -> dict[int, SlotReport]:
        """Let every slot with an order play one tick and return the reports by slot.

        Raises:
            WorkerError: If a worker failed or died.
        """
        for worker, share in self._shares(orders).items():
            self._send(worker, "advance", {"orders": share})
        reports: dict[int, SlotReport] = {}
        for worker in self._shares(orders):
            reports |= self._receive(worker)
        return reports

    def film(self, jobs: list[tuple[EpisodeSpec, np.ndarray]], *, frame_size: int) -> list[np.ndarray]:
        """Render the states [t n] of episodes, several at a time.

        Args:
            jobs: Episodes and their simulator states.
            frame_size: Height and width of the pictures in pixels.

        Returns:
            One uint8 [t h w 3] for each job.
        """
        arguments = self._factory.arguments(render=True, frame_size=frame_size)
        films: list[np.ndarray] = []
        for start in range(0, len(jobs), len(self._children)):
            batch = jobs[start : start + len(self._children)]
            for worker, (order, states) in enumerate(batch):
                self._send(worker, "film", {"order": order, "states": states, "arguments": arguments})
            films += [self._receive(worker) for worker in range(len(batch))]
        return films

    def _shares(self, slots: dict[int, Any]) -> dict[int, dict[int, Any]]:
        """Return what belongs to slots, by worker."""
        shares: dict[int, dict[int, Any]] = {}
        for slot, value in slots.items():
            shares.setdefault(slot % len(self._children), {})[slot] = value
        return shares

    def _send(self, worker: int, method: str, arguments: dict[str, Any]) -> None:
        self._unread[worker] += 1
        # To a dead worker nothing can be sent, but its last words can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._children[worker][1].send((method, arguments))

    def _receive(self, worker: int) -> Any:
        """Wait until a worker has done all that it was sent, and return its last answer."""
        answer = None
        while self._unread[worker]:
            answer = self._read(worker)
            self._unread[worker] -= 1
        return answer

    def _read(self, worker: int) -> Any:
        process, connection = self._children[worker]
        try:
            outcome, value = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = process.wait(_SECONDS_TO_CLOSE)
            raise WorkerError(
                f"evaluation worker {worker} died without a word (exit code {code}; -9 often means that "
                "memory ran out). Finished episodes are kept: start again with the same settings, or with "
                "fewer slots."
            ) from error
        if outcome == "failed":
            raise WorkerError(f"evaluation worker {worker} failed. Finished episodes are kept.\n{value}")
        return value

    def close(self) -> None:
        """Hang up, let the workers close their environments, and end those that do not."""
        for _, connection in self._children:
            connection.close()
        for process, _ in self._children:
            try:
                process.wait(_SECONDS_TO_CLOSE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._children = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    # Simulators are parallel over processes: a thread pool in each would only fight for the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with theirs:
        # -P keeps this folder off the search path, where `statistics.py` would hide Python's own.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return process, Connection(ours.detach())


@dataclass(frozen=True)
class Shard:
    """One of several parts of an evaluation.

    Attributes:
        index: Which one, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a shard that does not exist.

        Raises:
            ValueError: If the index is not below the count.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shards are counted from 0: expected shard in [0, {self.count - 1}] with "
                f"shards={self.count}, got {self.index}"
            )

    def folder(self, output_dir: Path) -> Path:
        """Return where it is played; the whole evaluation lies in `output_dir` itself."""
        return output_dir if self.count == 1 else output_dir / SHARD_FOLDER / f"{self.index}_of_{self.count}"

    def plays(self, slot: int) -> bool:
        """Tell whether it plays a slot."""
        return slot % self.count == self.index


def gather(folder: RunFolder, trajectories: Trajectories, kept_ablation: str) -> int:
    """Take over what shards have finished; return the number of episodes.

    Args:
        folder: The whole evaluation.
        trajectories: Its simulator states.
        kept_ablation: Ablation whose states are kept.

    Raises:
        OtherRunError: If a shard was played with other settings.
    """
    taken = 0
    for path in sorted((folder.path / SHARD_FOLDER).glob("*_of_*")):
        if not (path / EPISODES_FILE).is_file():
            continue
        require_equal(path, json.loads((path / SETTINGS_FILE).read_text()), folder.settings)
        fresh = [result for result in read_episodes(path) if not folder.has(result)]
        if not fresh:
            continue
        states = Trajectories(path / TRAJECTORY_FOLDER, 0)
        for result in fresh:
            if result.ablation == kept_ablation:
                trajectories.offer(result, states.load(result))
        folder.progress.absorb(Progress(path / PROGRESS_FILE))
        folder.add(fresh)
        taken += len(fresh)
    return taken


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode as it was recorded.

    Attributes:
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        seed: Seed of the reset.
        start: Simulator state before the first action, float64 [n].
        actions: Executed actions, float32 [t a].
    """

    suite: str
    task: str
    task_index: int
    seed: int
    start: np.ndarray
    actions: np.ndarray


def replay(
    episodes: Sequence[RecordedEpisode], pool: WorkerPool, *, slots: int
) -> Iterator[tuple[RecordedEpisode, bool]]:
    """Put each episode's initial state back, play its actions, and say whether that is a success.

    Args:
        episodes: What was recorded.
        pool: Workers; nothing is rendered.
        slots: Episodes played at a time.

    Raises:
        WorkerError: If a simulator failed.
    """
    pool.open(render=False, keep_states=False)
    for first in range(0, len(episodes), slots):
        batch = dict(enumerate(episodes[first : first + slots]))
        pool.advance({slot: {"actions": None, "episode": _start_worker(one)} for slot, one in batch.items()})
        reports = pool.advance(
            {slot: {"actions": one.actions, "episode": None} for slot, one in batch.items()}
        )
        for slot, episode in batch.items():
            outcome = reports[slot]["outcome"]
            yield episode, outcome is not None and outcome["success"]


def _start_worker(episode: RecordedEpisode) -> EpisodeSpec:
    return {
        "suite": episode.suite,
        "task_index": episode.task_index,
        "seed": episode.seed,
        "initial_state": None,
        "start": episode.start,
    }
