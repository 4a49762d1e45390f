"""Collect demonstrations into a LeRobotDataset: resumable, in parallel, each episode decided by its seed."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

import envs
from envs.base import DEMONSTRATION_SEEDS, ManipulationEnv, Task
from envs.demos import DemonstrationOptions
from envs.demos.replay import read_episodes
from envs.demos.shards import (
    CODECS,
    Demonstrator,
    Recording,
    ShardSummary,
    differences,
    merge_shards,
    read_metadata,
    read_shard,
    read_summary,
    record,
    write_metadata,
    write_shard,
)
from envs.rendering import load_mujoco, profile

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
        video: How frames are stored, a name in `envs.demos.shards.CODECS`.
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


SEEDS_A_SHARD = 1000


@dataclass(frozen=True)
class CollectionSettings:
    """What is collected; everything here decides the dataset, and nothing else does.

    Attributes:
        suite: Suite whose tasks are demonstrated.
        tasks: Indices of the tasks; None takes all tasks of the suite.
        episodes_per_task: Successful demonstrations of each task.
        episodes_per_shard: Demonstrations that a kill can cost at most, for each process.
        frame_size: Height and width of a frame in pixels.
        rendering: Profile "full" or "fast".
        demonstrator: How demonstrators play.
        repo_id: LeRobot's name for the dataset.
        video: How frames are stored, "lossless" or "h264" (see `envs.demos.shards.CODECS`).
    """

    suite: str
    tasks: tuple[int, ...] | None = None
    episodes_per_task: int = 50
    episodes_per_shard: int = 10
    frame_size: int = 128
    rendering: str = "fast"
    demonstrator: Demonstrator = field(default_factory=Demonstrator)
    repo_id: str = "vega/demonstrations"
    video: str = "lossless"

    def __post_init__(self) -> None:
        """Check what can be checked without a simulator.

        Raises:
            ValueError: If the profile or the video is unknown, or a number is out of range.
        """
        profile(self.rendering)
        if self.video not in CODECS:
            raise ValueError(f"unknown video {self.video!r}; known: {', '.join(CODECS)}")
        for name in ("episodes_per_task", "episodes_per_shard"):
            if vars(self)[name] < 1:
                raise ValueError(f"expected {name} of at least 1, got {vars(self)[name]}")
        most = len(DEMONSTRATION_SEEDS) // SEEDS_A_SHARD * self.episodes_per_shard
        if self.episodes_per_task > most:
            raise ValueError(
                f"the demonstrations' seeds suffice for {most} episodes a task with episodes_per_shard="
                f"{self.episodes_per_shard}, got episodes_per_task={self.episodes_per_task}"
            )

    @staticmethod
    def of(config: Mapping[str, Any]) -> CollectionSettings:
        """Build settings from a composed configuration (configs/collect.yaml)."""
        demonstrator = dict(config["demonstrator"])
        options = dict(demonstrator.pop("options"))
        options |= {name: tuple(options[name]) for name in ("start_spread", "detour")}
        tasks = config["tasks"]
        return CollectionSettings(
            **config["env"],
            tasks=None if tasks is None else tuple(tasks),
            episodes_per_task=config["episodes_per_task"],
            episodes_per_shard=config["episodes_per_shard"],
            demonstrator=Demonstrator(options=DemonstrationOptions(**options), **demonstrator),
            repo_id=config["repo_id"],
            video=config["video"],
        )

    @staticmethod
    def stored(values: Mapping[str, Any]) -> CollectionSettings:
        """Build settings from what `decisive` returned."""
        demonstrator = dict(values["demonstrator"])
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in demonstrator.pop("options").items()
        }
        tasks = values["tasks"]
        plain = {
            **values,
            "tasks": None if tasks is None else tuple(tasks),
            "demonstrator": Demonstrator(options=DemonstrationOptions(**options), **demonstrator),
        }
        return CollectionSettings(**plain)

    def decisive(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return json.loads(json.dumps(asdict(self)))


def collect(settings: CollectionSettings, root: Path, *, processes: int = 2) -> dict[str, Any]:
    """Collect demonstrations, or go on where an interrupted collection stopped.

    While it runs, finished shards lie in `<root>.partial`; the dataset appears under `root` when it is whole.

    Args:
        settings: What is collected.
        root: Where the dataset will lie.
        processes: Worker processes; they change the time it takes, never the dataset. With 1, everything
            happens in this process.

    Returns:
        The dataset's metadata (see `envs.demos.shards.read_metadata`).

    Raises:
        ValueError: If `root` or its interrupted collection has other settings, or tasks do not exist.
        FileExistsError: If `root` holds something else.
        RuntimeError: If a demonstrator succeeds too rarely, worker processes keep dying, or the simulators
            cannot run here.
    """
    return assemble(settings, root, processes, lambda work: list(_jobs(settings, work)))


def assemble(
    settings: CollectionSettings,
    root: Path,
    processes: int,
    jobs_in: Callable[[Path], list[Job]],
    *,
    counts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Do the jobs that are missing and merge their shards; see `collect` for what it raises.

    Args:
        settings: What the dataset is.
        root: Where the dataset will lie.
        processes: Worker processes.
        jobs_in: Gives the jobs, in the dataset's order, for a working folder.
        counts: Attempts, failures and demonstrations by task, if they are known from elsewhere.
    """
    finished = _finished(settings, root)
    if finished is not None:
        logger.info("%s is there already, with these settings: nothing to collect", root)
        return finished
    load_mujoco()  # a simulator that cannot run is reported here; a worker could only die of it
    work = root.with_name(root.name + ".partial")
    with _claimed(work, settings):
        jobs = jobs_in(work)
        missing = [job for job in jobs if read_shard(job.folder) is None]
        _announce(jobs, missing)
        for job in missing:  # a damaged shard must not be in the way of its successor
            shutil.rmtree(job.folder, ignore_errors=True)
        merged = work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        with Workers(processes, total=sum(job.episodes for job in jobs)) as workers:
            workers.run(missing)
            workers.merge([job.folder for job in jobs], merged, settings.repo_id)
        metadata = _metadata(settings, [read_summary(job.folder) for job in jobs])
        write_metadata(merged, metadata if counts is None else {**metadata, "tasks": counts})
        merged.rename(root)
    shutil.rmtree(work)
    return read_metadata(root) or {}


def _finished(settings: CollectionSettings, root: Path) -> dict[str, Any] | None:
    """Return the metadata of a dataset with these settings, None if there is nothing under `root`."""
    metadata = read_metadata(root)
    if metadata is None:
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(
                f"{root} holds something that this package did not collect; choose another root"
            )
        return None
    _check_same(metadata["settings"], settings, root)
    return metadata


def _check_same(stored: Mapping[str, Any], settings: CollectionSettings, where: Path) -> None:
    # Through the class, so that what was stored before a field existed has the field's default.
    lines = differences(CollectionSettings.stored(stored).decisive(), settings.decisive())
    if lines:
        raise ValueError(
            f"{where} was collected with other settings: {'; '.join(lines)}. "
            "Choose another root, or remove that folder, or ask for its settings."
        )


@contextmanager
def _claimed(work: Path, settings: CollectionSettings) -> Iterator[None]:
    """Hold the working folder for these settings; refuse one that another process or other settings hold."""
    work.mkdir(parents=True, exist_ok=True)
    record = work / "settings.json"
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is collecting into {work}; wait for it, or stop it"
            ) from None
        if record.is_file():
            _check_same(json.loads(record.read_text()), settings, work)
        record.write_text(json.dumps(settings.decisive()))
        yield


def _tasks(settings: CollectionSettings) -> list[Task]:
    tasks = envs.tasks(settings.suite)
    if settings.tasks is None:
        return tasks
    unknown = [index for index in settings.tasks if not 0 <= index < len(tasks)]
    if unknown or not settings.tasks:
        known = ", ".join(f"{task.index} {task.name}" for task in tasks)
        raise ValueError(f"suite {settings.suite!r} has no tasks {unknown}; its tasks are: {known}")
    return [tasks[index] for index in settings.tasks]


def _jobs(settings: CollectionSettings, work: Path) -> Iterator[Job]:
    """Cut the work into shards: each has its own block of seeds, so that it depends on no other."""
    for task in _tasks(settings):
        for shard, done in enumerate(range(0, settings.episodes_per_task, settings.episodes_per_shard)):
            first = DEMONSTRATION_SEEDS.start + shard * SEEDS_A_SHARD
            yield Job(
                task=task,
                folder=work / f"{task.index:03d}_{task.name}_{shard:05d}",
                episodes=min(settings.episodes_per_shard, settings.episodes_per_task - done),
                seeds=range(first, first + SEEDS_A_SHARD),
                frame_size=settings.frame_size,
                rendering=settings.rendering,
                demonstrator=settings.demonstrator,
                repo_id=settings.repo_id,
                video=settings.video,
            )


def _announce(jobs: Sequence[Job], missing: Sequence[Job]) -> None:
    damaged = [job.folder.name for job in missing if job.folder.exists()]
    if damaged:
        logger.warning("damaged shards are collected again: %s", ", ".join(damaged))
    if len(missing) < len(jobs):
        logger.info("going on: %d of %d shards are there", len(jobs) - len(missing), len(jobs))


def _metadata(settings: CollectionSettings, shards: Sequence[ShardSummary]) -> dict[str, Any]:
    attempts, demonstrations = Counter[str](), Counter[str]()
    for shard in shards:
        attempts[shard.task] += shard.attempts
        demonstrations[shard.task] += len(shard.seeds)
    return {
        "settings": settings.decisive(),
        "tasks": {
            name: {
                "attempts": attempts[name],
                "failures": attempts[name] - demonstrations[name],
                "demonstrations": demonstrations[name],
            }
            for name in attempts
        },
        "episodes": [
            {"task": shard.task, "seed": seed, "length": length}
            for shard in shards
            for seed, length in zip(shard.seeds, shard.lengths, strict=True)
        ],
    }
