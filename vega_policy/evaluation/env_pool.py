"""Pool of worker processes, one simulator each: the side of the main process."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from vega_policy.evaluation.env_worker import MEMORY_BYTES, Commands, EnvReport, EpisodeSpec, map_frames

_WORKER_FILE = Path(__file__).with_name("env_worker.py")
_SECONDS_TO_CLOSE = 20.0


class WorkerError(RuntimeError):
    """A worker process failed; the message names its episode and the error."""


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
    """Worker processes with one simulator each; each has at most one request at a time.

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
        self._workers = [_Worker(number, factory.make) for number in range(processes)]
        self.busy_seconds = 0.0  # of all simulators together

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """Process identifiers of the workers."""
        return [worker.process.pid for worker in self._workers]

    def open(self, *, render: bool, keep_states: bool, history: int = 1) -> None:
        """Set what the simulators do from now on; what an interrupted user requested is finished and dropped.

        Simulators that were made for another `render` are closed, and rebuilt when needed. With `keep_states`
        finished episodes come with the simulator state of each step. An observation has the last `history`
        frames of each camera.
        """
        arguments = self._factory.arguments(render=render)
        for worker in self._workers:
            if worker.is_busy:
                worker.answer()
            worker.send("open", arguments=arguments, keep_states=keep_states, history=history)

    def build(self, tasks: Iterable[tuple[str, int]]) -> None:
        """Start to build the simulator of worker 0, 1, ... for (suite, task index); return at once."""
        for worker, (suite, task_index) in zip(self._workers, tasks, strict=False):
            worker.send("build", suite=suite, task_index=task_index)

    def begin(self, worker: int, spec: EpisodeSpec) -> None:
        """Let a worker start an episode; `receive` returns its first observation."""
        self._workers[worker].request("begin", spec=spec)

    def execute(self, worker: int, actions: Commands) -> None:
        """Let a worker execute actions [t a], None to hold still; `receive` returns what they led to."""
        self._workers[worker].request("execute", actions=actions)

    def receive(self, *, all_of_them: bool = False, block: bool = True) -> Iterator[tuple[int, EnvReport]]:
        """Yield worker and report of those that have arrived; frames are valid until its next request.

        With `block` it waits for one if there is none yet, with `all_of_them` for every request.

        Raises:
            WorkerError: If a worker failed or died.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.is_busy}
        ready = busy if all_of_them else wait(list(busy), None if block else 0)
        for connection, worker in busy.items():
            if connection in ready:
                yield worker.number, self._report(worker)

    def render(
        self, jobs: Sequence[tuple[EpisodeSpec, np.ndarray | None]], *, frame_size: int
    ) -> list[np.ndarray]:
        """Render the simulator states [t n] of episodes in parallel, one uint8 [t h w 3] for each job.

        Without states, the start of the episode is rendered.
        """
        arguments = self._factory.arguments(render=True, frame_size=frame_size)
        requests = [{"spec": spec, "states": states, "arguments": arguments} for spec, states in jobs]
        return self._map("render", requests, "Rendering")

    def replay(self, episodes: Sequence[RecordedEpisode]) -> list[bool]:
        """Restore each episode's initial state, execute its actions, and return whether that is a success.

        Raises:
            WorkerError: If a simulator failed.
        """
        self.open(render=False, keep_states=False)
        requests = [{"spec": one.spec(), "actions": one.actions} for one in episodes]
        return self._map("replay", requests, "Replaying")

    def close(self) -> None:
        """Close the connections, let the workers close their environments, and end those that do not."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self, method: str, requests: Sequence[dict[str, Any]], title: str) -> list[Any]:
        """Return the results of a method, whichever workers compute them, under a progress bar."""
        results: list[Any] = [None] * len(requests)
        waiting, running = list(enumerate(requests)), {}
        with tqdm(desc=title, total=len(requests), unit="ep", disable=not requests) as bar:
            while waiting or running:
                for worker in self._workers:
                    if not worker.is_busy and waiting:
                        number, request = waiting.pop(0)
                        worker.request(method, **request)
                        running[worker.connection] = number, worker
                for connection in wait(list(running)):
                    number, worker = running.pop(connection)
                    results[number] = worker.answer()[0]
                    bar.update()
        return results

    def _report(self, worker: _Worker) -> EnvReport:
        report, seconds = worker.answer()
        self.busy_seconds += seconds
        if report["observation"] is not None:
            report["observation"]["frames"] = map_frames(worker.memory, report["shapes"])
        return report


class _Worker:
    """A worker process as the main process has it."""

    def __init__(self, number: int, make: str) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        with theirs, _memory_file() as file:
            os.ftruncate(file.fileno(), MEMORY_BYTES)
            self.memory = mmap.mmap(file.fileno(), MEMORY_BYTES)
            descriptors = [theirs.fileno(), file.fileno()]
            # Simulators run in parallel over processes: a thread pool in each would compete for the same
            # cores. -P keeps this folder off the search path, where a module could hide one of Python's own.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER_FILE), *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                },
            )
        self.connection = Connection(ours.detach())
        self.connection.send((sys.path, make))
        self.is_busy = False  # a request is not answered yet
        self._episode = "no episode"

    def send(self, method: str, **arguments: Any) -> None:
        """Send a request that is not answered."""
        # Nothing can be sent to a dead worker, but its last message can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((method, arguments))

    def request(self, method: str, **arguments: Any) -> None:
        """Send a request that is answered."""
        if (spec := arguments.get("spec")) is not None:
            self._episode = f"task {spec['task_index']} of {spec['suite']}, seed {spec['seed']}"
        self.is_busy = True
        self.send(method, **arguments)

    def answer(self) -> tuple[Any, float]:
        """Wait for the answer, and return it with the seconds that it took."""
        try:
            outcome, value, seconds = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self.process.wait(_SECONDS_TO_CLOSE)
            raise WorkerError(
                f"simulator process {self.number} died without a message in {self._episode} (exit code "
                f"{code}; -9 often means that memory ran out). Finished episodes are kept: start again with "
                "the same settings, or with fewer processes."
            ) from error
        if outcome == "failed":
            raise WorkerError(
                f"simulator process {self.number} failed in {self._episode}. Finished episodes are kept.\n"
                f"{value}"
            )
        self.is_busy = False
        return value, seconds

    def end(self) -> None:
        """Wait until the process has ended; kill it if it does not."""
        try:
            self.process.wait(_SECONDS_TO_CLOSE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _memory_file() -> Any:
    """Return a new file without a name, in memory where the system can."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("frames"), "w+b")
    return tempfile.TemporaryFile()


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
