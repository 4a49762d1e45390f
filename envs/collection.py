"""Collect demonstrations into a LeRobotDataset: resumable, in parallel, each episode decided by its seed."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import envs
from envs.base import DEMONSTRATION_SEEDS, Task
from envs.demonstrators import DemonstrationOptions
from envs.metadata import differences, read_metadata, write_metadata
from envs.recording import Demonstrator
from envs.rendering import load_mujoco, profile
from envs.shards import CODECS, ShardSummary, read_shard, read_summary
from envs.workers import Job, Workers

logger = logging.getLogger(__name__)

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
        video: How frames are stored, "lossless" or "h264" (see `envs.shards.CODECS`).
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
        The dataset's metadata (see `envs.metadata.read_metadata`).

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
