"""Pool of worker processes that run the environments: the side of the main process."""

from __future__ import annotations

import contextlib
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

from vega_policy.evaluation.env_worker import EnvCommand, EnvReport, EpisodeSpec

_WORKER_FILE = Path(__file__).with_name("env_worker.py")
_SECONDS_TO_CLOSE = 20.0


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback."""


@dataclass(frozen=True)
class EnvironmentFactory:
    """How workers make environments."""

    make: str  # dotted path of (suite, task_index, *, frame_size, rendering, render) -> environment
    frame_size: int  # height and width of a frame in pixels
    rendering: str  # profile, `full` or `fast`

    def arguments(self, *, render: bool, frame_size: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `make`, for another frame size if one is given."""
        return {"frame_size": frame_size or self.frame_size, "rendering": self.rendering, "render": render}


class WorkerPool:
    """Worker processes; environment i runs in process i modulo their number.

    Use it as a context manager: leaving it ends the processes.
    """

    def __init__(self, factory: EnvironmentFactory, processes: int) -> None:
        """Start the processes; they import the simulator while the caller goes on.

        Raises:
            ValueError: If the number of processes is below 1.
        """
        if processes < 1:
            raise ValueError(f"expected at least 1 process, got processes={processes}")
        self._factory = factory
        self._children: list[tuple[subprocess.Popen[bytes], Connection]] = []
        for _ in range(processes):
            child = _start_worker()
            self._children.append(child)
            child[1].send((sys.path, factory.make))
        self._unread = [0] * processes

    @property
    def pids(self) -> list[int]:
        """Process identifiers of the workers."""
        return [process.pid for process, _ in self._children]

    def open(self, *, render: bool, keep_states: bool, history: int = 1) -> None:
        """Set what the environments do from now on; return at once.

        Args:
            render: Whether they render frames; those made otherwise are closed, and rebuilt when needed.
            keep_states: Whether finished episodes come with the simulator state of each step.
            history: Frames of each camera in an observation, the last ones of the episode.
        """
        arguments = self._factory.arguments(render=render)
        for worker in range(len(self._children)):
            request = {"arguments": arguments, "keep_states": keep_states, "history": history}
            self._send(worker, "open", request)

    def build(self, tasks: dict[int, tuple[str, int]]) -> None:
        """Start to build environments for (suite, task index) by environment; return at once."""
        for worker, share in self._by_worker(tasks).items():
            self._send(worker, "build", {"tasks": share})

    def advance(self, commands: dict[int, EnvCommand]) -> dict[int, EnvReport]:
        """Run one tick of every environment that has a command and return the reports.

        Raises:
            WorkerError: If a worker failed or died.
        """
        shares = self._by_worker(commands)
        for worker, share in shares.items():
            self._send(worker, "advance", {"commands": share})
        reports: dict[int, EnvReport] = {}
        for worker in shares:
            reports |= self._receive(worker)
        return reports

    def render(self, jobs: list[tuple[EpisodeSpec, np.ndarray]], *, frame_size: int) -> list[np.ndarray]:
        """Render the simulator states [t n] of episodes in parallel, one uint8 [t h w 3] for each job."""
        arguments = self._factory.arguments(render=True, frame_size=frame_size)
        videos: list[np.ndarray] = []
        for start in range(0, len(jobs), len(self._children)):
            batch = jobs[start : start + len(self._children)]
            for worker, (spec, states) in enumerate(batch):
                self._send(worker, "render", {"spec": spec, "states": states, "arguments": arguments})
            videos += [self._receive(worker) for worker in range(len(batch))]
        return videos

    def close(self) -> None:
        """Close the connections, let the workers close their environments, and end those that do not."""
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

    def _by_worker(self, values: dict[int, Any]) -> dict[int, dict[int, Any]]:
        shares: dict[int, dict[int, Any]] = {}
        for index, value in values.items():
            shares.setdefault(index % len(self._children), {})[index] = value
        return shares

    def _send(self, worker: int, method: str, arguments: dict[str, Any]) -> None:
        self._unread[worker] += 1
        # Nothing can be sent to a dead worker, but its last message can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._children[worker][1].send((method, arguments))

    def _receive(self, worker: int) -> Any:
        """Wait until a worker has answered all requests, and return its last answer."""
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
                f"evaluation worker {worker} died without a message (exit code {code}; -9 often means that "
                "memory ran out). Finished episodes are kept: start again with the same settings, or with a "
                "smaller num_envs in another folder."
            ) from error
        if outcome == "failed":
            raise WorkerError(f"evaluation worker {worker} failed. Finished episodes are kept.\n{value}")
        return value


def _start_worker() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    # Simulators run in parallel over processes: a thread pool in each would compete for the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with theirs:
        # -P keeps this folder off the search path, where a module could hide one of Python's own.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return process, Connection(ours.detach())


@dataclass(frozen=True)
class RecordedEpisode:
    """A recorded episode that can be replayed open loop."""

    suite: str
    task: str
    task_index: int
    seed: int  # of the reset
    start: np.ndarray  # simulator state before the first action, float64 [n]
    actions: np.ndarray  # float32 [t a]

    def spec(self) -> EpisodeSpec:
        """Return what a worker needs to start the episode."""
        return {
            "suite": self.suite,
            "task_index": self.task_index,
            "seed": self.seed,
            "initial_state": None,
            "start": self.start,
        }


def replay(
    episodes: Sequence[RecordedEpisode], pool: WorkerPool, *, num_envs: int
) -> Iterator[tuple[RecordedEpisode, bool]]:
    """Restore each episode's initial state, execute its actions, and yield whether that is a success.

    Raises:
        WorkerError: If a simulator failed.
    """
    pool.open(render=False, keep_states=False)
    for first in range(0, len(episodes), num_envs):
        batch = dict(enumerate(episodes[first : first + num_envs]))
        pool.advance({env: {"actions": None, "episode": one.spec()} for env, one in batch.items()})
        reports = pool.advance({env: {"actions": one.actions, "episode": None} for env, one in batch.items()})
        for env, episode in batch.items():
            outcome = reports[env]["outcome"]
            yield episode, outcome is not None and outcome["success"]
