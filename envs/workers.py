"""Worker processes of a collection: they play, render and write shards, and one of them merges."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

import envs
from envs.base import ManipulationEnv, Task
from envs.recording import Demonstrator, Recording, record
from envs.shards import ShardSummary, merge_shards, write_shard
from envs.stored import read_episodes

logger = logging.getLogger(__name__)

DEATHS = 3  # times that worker processes may die before the collection gives up
PATIENCE = 20  # episodes played for each demonstration that is wanted, before a demonstrator is called unable
Report = Callable[[str, bool], None]  # (task, success), after every episode


@dataclass(frozen=True)
class Job:
    """One shard to be collected.

    Attributes:
        task: What is demonstrated.
        folder: Where the shard will lie.
        episodes: Successful demonstrations that it holds.
        seeds: Seeds to be tried, in order.
        frame_size: Height and width of a frame in pixels.
        rendering: Rendering profile.
        demonstrator: How demonstrators play.
        repo_id: LeRobot's name for the dataset.
        video: How frames are stored, a name in `envs.shards.CODECS`.
        source: Dataset whose episodes are rendered again instead of played; None plays.
        source_episodes: Which of its episodes.
    """

    task: Task
    folder: Path
    episodes: int
    seeds: range
    frame_size: int
    rendering: str
    demonstrator: Demonstrator
    repo_id: str
    video: str
    source: Path | None = None
    source_episodes: tuple[int, ...] = ()


def collect_shard(job: Job, report: Report) -> ShardSummary:
    """Play until a shard is full; each success is rendered and written before the next episode.

    Args:
        job: What is wanted.
        report: Told of every episode, of a success when it is written.

    Raises:
        RuntimeError: If the demonstrator succeeds too rarely to fill the shard.
    """
    env = _environment(job.task.suite, job.task.index, job.frame_size, job.rendering)
    recordings = _successes(job, env, report) if job.source is None else _stored(job, env, report)
    return write_shard(job.folder, env, recordings, job.repo_id, job.video)


def _stored(job: Job, env: ManipulationEnv, report: Report) -> Iterator[Recording]:
    if job.source is None:
        return
    for episode in read_episodes(job.source, job.source_episodes):
        env.reset_blindly(seed=episode.recording.seed)  # places what no simulator state holds
        yield episode.recording
        report(job.task.name, True)


def _successes(job: Job, env: ManipulationEnv, report: Report) -> Iterator[Recording]:
    found = attempts = 0
    seeds = job.seeds[: PATIENCE * job.episodes]
    for seed in seeds:
        recording = record(env, seed, job.demonstrator)
        attempts += 1
        if recording is not None:
            yield replace(recording, attempts=attempts)
            found, attempts = found + 1, 0
        report(job.task.name, recording is not None)
        if found == job.episodes:
            return
    raise RuntimeError(
        f"the demonstrator of {job.task.name} succeeded in {found} of {len(seeds)} episodes (seeds "
        f"{seeds[0]} to {seeds[-1]}); {job.episodes} demonstrations are needed. "
        f"Lower its noise ({job.demonstrator.noise}) or check its options."
    )


class Workers:
    """A pool of workers that survives the death of some, with a progress bar; use it as a context.

    With one process, everything happens in the caller's own.
    """

    def __init__(self, processes: int, *, total: int) -> None:
        """Prepare; processes start with the first job.

        Args:
            processes: How many.
            total: Demonstrations that the progress bar counts to.
        """
        if processes < 1:
            raise ValueError(f"expected at least 1 process, got {processes}")
        self._processes, self._total = processes, total
        self._bar = tqdm(total=total, unit="demo", smoothing=0)
        self._tried, self._succeeded = Counter[str](), Counter[str]()

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the progress bar and this process's environments."""
        self._bar.close()
        _close_environment()

    def run(self, jobs: Sequence[Job]) -> None:
        """Collect shards; those of a worker that dies are collected again.

        Raises:
            RuntimeError: If workers keep dying, or a demonstrator is unable.
        """
        self._bar.initial = self._total - sum(job.episodes for job in jobs)  # those of an earlier run
        left, deaths = list(jobs), 0
        while left:
            self._bar.n = self._total - sum(job.episodes for job in left)
            self._bar.refresh()
            if self._processes == 1:
                collect_shard(left.pop(0), self._count)
                continue
            try:
                self._run_pool(left)
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == DEATHS:
                    raise RuntimeError(
                        f"worker processes died {deaths} times (out of memory?); start again with fewer "
                        "processes: finished shards are kept"
                    ) from error
                logger.warning("a worker process died; its shards are collected again")

    def merge(self, folders: Sequence[Path], root: Path, repo_id: str) -> None:
        """Merge shards into one dataset, under LeRobot's own progress bars."""
        self._bar.close()
        logger.info("merging %d shards into one dataset", len(folders))
        if self._processes == 1:
            merge_shards(folders, root, repo_id)
            return
        with ProcessPoolExecutor(1, context()) as pool:  # a worker has LeRobot loaded, the caller has not
            pool.submit(merge_shards, folders, root, repo_id).result()

    def _run_pool(self, left: list[Job]) -> None:
        """Run jobs and strike those done off the list."""
        processes = context()
        episodes: Any = processes.SimpleQueue()
        pool = ProcessPoolExecutor(
            min(self._processes, len(left)), processes, initializer=_start_worker, initargs=(episodes,)
        )
        running: dict[Future[ShardSummary], Job] = {pool.submit(_collect_in_worker, job): job for job in left}
        try:
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not episodes.empty():
                    self._count(*episodes.get())
                for future in done:
                    job = running.pop(future)
                    future.result()
                    left.remove(job)
        finally:
            pool.shutdown(cancel_futures=True)

    def _count(self, task: str, success: bool) -> None:
        self._tried[task] += 1
        self._succeeded[task] += success
        self._bar.update(success)
        rates = {"all": f"{self._succeeded.total()}/{self._tried.total()}"}
        for name, tried in self._tried.items():
            if self._succeeded[name] < tried or len(self._tried) == 1:  # LIBERO's names are sentences
                rates[name] = f"{self._succeeded[name]}/{tried}"
        self._bar.set_postfix(rates, refresh=False)


_OPEN: dict[tuple[str, int, int, str], ManipulationEnv] = {}  # this process's environment; one at a time


def _environment(suite: str, task_index: int, frame_size: int, rendering: str) -> ManipulationEnv:
    key = (suite, task_index, frame_size, rendering)
    if key not in _OPEN:
        _close_environment()
        _OPEN[key] = envs.make(suite, task_index, frame_size=frame_size, rendering=rendering)
    return _OPEN[key]


def _close_environment() -> None:
    while _OPEN:
        _OPEN.popitem()[1].close()


def context() -> Any:
    """Return the multiprocessing context whose processes start with everything imported that they need."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["envs.preload"])
    return forkserver


_EPISODES: Any = None  # this worker's end of the queue of (task, success)


def _start_worker(episodes: Any) -> None:
    global _EPISODES
    _EPISODES = episodes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the collection ends after the running shards
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _collect_in_worker(job: Job) -> ShardSummary:
    return collect_shard(job, lambda task, success: _EPISODES.put((task, success)))
