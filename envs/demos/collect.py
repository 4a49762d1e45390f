"""Collect demonstrations, render a dataset again, both resumable; measure how often demonstrators succeed."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import batched, groupby
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

import envs
from envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEED, LAYOUTS, ManipulationEnv, Task
from envs.demos.shards import (
    BLOCK,
    CODECS,
    DATASET,
    STATES,
    Demonstrator,
    Recording,
    ShardSummary,
    VisitedStates,
    collected_metadata,
    merge_shards,
    package_versions,
    read_episodes,
    read_metadata,
    read_shard,
    read_summary,
    record,
    stores_executed,
    write_metadata,
    write_shard,
    write_state_shard,
)
from envs.demos.states import read_header, read_states, write_states
from envs.rendering import load_mujoco, profile
from vega_policy.config import check_choices, from_config
from vega_policy.run_dir import atomic_folder, check_same_settings, open_run, require_folder, write_json

logger = logging.getLogger(__name__)

SEEDS_PER_SHARD = 1000
MAX_ATTEMPTS = 20  # episodes per demonstration before a demonstrator is called unable
SLOW_IMPORTS = ("lerobot.datasets.lerobot_dataset", "numba")  # of workers that write LeRobotDatasets
MAX_DEATHS = 3  # of worker processes before the collection gives up
Report = Callable[[str, bool], None]  # (task, success), after every episode


@dataclass(frozen=True)
class CollectionSettings:
    """Everything that decides a dataset."""

    suite: str
    tasks: tuple[int, ...] | None = None  # indices; None takes all tasks of the suite
    episodes_per_task: int = 50  # successful demonstrations
    skip: int = 0  # first ones of each task, which another collection with these settings holds
    episodes_per_shard: int = 10  # demonstrations that a kill can cost at most, for each process
    frame_size: int = 128  # height and width in pixels
    rendering: str = "fast"  # or "full"
    demonstrator: Demonstrator = field(default_factory=Demonstrator)
    repo_id: str = "vega/demonstrations"  # LeRobot's name for the dataset
    video: str = "lossless"  # key of `envs.demos.shards.CODECS`
    format: str = "lerobot"  # or "states": one file of simulator states, without frames
    layouts: str = "standard"  # or "random": LIBERO's objects anywhere in reach; "partial"; "fixtures"
    starts: str | None = None  # folder of an evaluation with the states of its episodes; see `VisitedStates`
    starts_hash: str | None = None  # of these episodes, filled in

    def __post_init__(self) -> None:
        profile(self.rendering)
        check_choices(self, "", format=("lerobot", "states"), video=CODECS, layouts=LAYOUTS)
        self._check_scenes()
        if self.format == "lerobot" and self.frame_size <= BLOCK:
            raise ValueError(f"expected frame_size above {BLOCK} for videos, got {self.frame_size}")
        for name in ("episodes_per_task", "episodes_per_shard"):
            if vars(self)[name] < 1:
                raise ValueError(f"expected {name} of at least 1, got {vars(self)[name]}")
        if self.skip < 0 or (self.format != "states" and self.skip % self.episodes_per_shard):
            raise ValueError(
                f"expected skip to be a multiple of episodes_per_shard={self.episodes_per_shard}, "
                f"got {self.skip}"
            )
        most = len(DEMONSTRATION_SEEDS) // SEEDS_PER_SHARD * self.episodes_per_shard
        if self.skip + self.episodes_per_task > most:
            raise ValueError(
                f"the demonstrations' seeds suffice for {most} episodes a task with episodes_per_shard="
                f"{self.episodes_per_shard}, got skip={self.skip} and "
                f"episodes_per_task={self.episodes_per_task}"
            )

    def _check_scenes(self) -> None:
        if self.layouts != "standard" and self.suite not in envs.LIBERO_SUITES:
            raise ValueError(
                f"layouts={self.layouts}: expected one of the suites {', '.join(envs.LIBERO_SUITES)}; "
                f"got {self.suite!r}. Leave layouts out."
            )
        if self.starts is not None and self.layouts != "standard":
            raise ValueError("starts: the evaluation decides the layouts. Leave layouts out.")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CollectionSettings:
        """Build settings from a composed configuration (configs/collect.yaml)."""
        names = (
            "tasks",
            "episodes_per_task",
            "skip",
            "episodes_per_shard",
            "demonstrator",
            "repo_id",
            "video",
            "format",
            "layouts",
            "starts",
        )
        values = {**config["env"], **{name: config[name] for name in names}}
        if values["starts"] is not None:
            visited = VisitedStates(Path(values["starts"]))
            values["starts_hash"] = visited.fingerprint
            if values["tasks"] is None:
                values["tasks"] = visited.tasks(values["suite"])
        return cls.stored(values)

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> CollectionSettings:
        """Build settings from plain values such as those of `decisive`."""
        return from_config(cls, values)

    def decisive(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Job:
    """One shard to collect, or to render from episodes of another dataset (`source`)."""

    task: Task
    folder: Path
    settings: CollectionSettings
    episodes: int  # successful demonstrations in the shard
    seeds: range = range(0)  # tried in order
    source: Path | None = None
    source_episodes: tuple[int, ...] = ()


def collect(settings: CollectionSettings, root: Path, *, processes: int = 2) -> dict[str, Any]:
    """Collect demonstrations, or resume an interrupted collection; return the dataset's metadata.

    While it runs, finished shards lie in `<root>.partial`; the dataset appears under `root` when it is whole.
    The number of worker processes does not change the dataset; with 1, everything runs in this process.

    Raises:
        ValueError: If `root` or its interrupted collection has other settings, or tasks do not exist.
        FileExistsError: If `root` holds something else.
        NotADirectoryError: If `root` is a file.
        RuntimeError: If a demonstrator succeeds too rarely, worker processes keep dying, or the simulators
            cannot run here.
    """
    if settings.format == "states":
        return _collect_states(settings, root.with_suffix(".safetensors"), processes)
    return _assemble(settings, root, processes, lambda work: list(_collection_jobs(settings, work)))


def _collect_states(settings: CollectionSettings, file: Path, processes: int) -> dict[str, Any]:
    """Collect into one file of simulator states; see `collect`."""
    unused = CollectionSettings(settings.suite)  # nothing is rendered, and a shard is one episode
    settings = replace(
        settings, episodes_per_shard=1, frame_size=unused.frame_size, rendering=unused.rendering
    )
    defaults = unused.decisive()
    if file.is_file():
        origin = read_header(file)["origin"]
        stored = origin.get("settings", {})
        check_same_settings(file, stored, settings.decisive(), defaults=defaults, option="root")
        logger.info("%s is complete, with these settings: nothing to collect", file)
        return origin
    load_mujoco()
    work = file.with_name(file.name + ".partial")
    with open_run(work, settings.decisive(), defaults=defaults, option="root"):
        jobs = list(_collection_jobs(settings, work))
        with Workers(processes, total=len(jobs)) as workers:
            workers.run(_missing(jobs))
        origin = _metadata(settings, [read_summary(job.folder) for job in jobs])
        del origin["episodes"]  # the header lists them
        origin["versions"] = package_versions()
        episodes = [episode for job in jobs for episode in read_states(job.folder / STATES)]
        write_states(file, settings.suite, episodes, origin, threads=os.cpu_count() or 1)
        shutil.rmtree(work)  # still locked
    return origin


def render_again(
    source: Path,
    root: Path,
    *,
    frame_size: int,
    rendering: str,
    video: str | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Write the demonstrations of a collected dataset with other images; states, actions and order stay.

    Without `video`, frames are encoded as in the source. Returns the new dataset's metadata; resumes and
    raises as `collect` does.

    Raises:
        FileNotFoundError: If `source` holds no collected dataset.
    """
    stored = collected_metadata(source)
    before = CollectionSettings.stored(stored["settings"])
    settings = replace(before, frame_size=frame_size, rendering=rendering, video=video or before.video)

    def jobs(work: Path) -> Iterator[Job]:
        tasks = {task.name: task for task in envs.tasks(settings.suite)}
        entries = enumerate(stored["episodes"])
        for name, members in groupby(entries, key=lambda entry: entry[1]["task"]):
            for group in batched((index for index, _ in members), settings.episodes_per_shard):
                folder = work / f"{group[0]:06d}"
                yield Job(tasks[name], folder, settings, len(group), source=source, source_episodes=group)

    return _assemble(settings, root, processes, lambda work: list(jobs(work)), counts=stored["tasks"])


def _collection_jobs(settings: CollectionSettings, work: Path) -> Iterator[Job]:
    """Yield the shards' jobs; each has its own block of seeds, so that it depends on no other."""
    tasks = envs.tasks(settings.suite)
    indices = range(len(tasks)) if settings.tasks is None else settings.tasks
    unknown = [index for index in indices if not 0 <= index < len(tasks)]
    if unknown or not indices:
        known = ", ".join(f"{task.index} {task.name}" for task in tasks)
        raise ValueError(f"suite {settings.suite!r} has no tasks {unknown}; its tasks are: {known}")
    for task in (tasks[index] for index in indices):
        skipped = settings.skip // settings.episodes_per_shard
        for shard, done in enumerate(
            range(0, settings.episodes_per_task, settings.episodes_per_shard), start=skipped
        ):
            first = DEMONSTRATION_SEEDS.start + shard * SEEDS_PER_SHARD
            yield Job(
                task,
                work / f"{task.index:03d}_{task.name}_{shard:05d}",
                settings,
                episodes=min(settings.episodes_per_shard, settings.episodes_per_task - done),
                seeds=range(first, first + SEEDS_PER_SHARD),
            )


def _assemble(
    settings: CollectionSettings,
    root: Path,
    processes: int,
    jobs_in: Callable[[Path], list[Job]],
    *,
    counts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Do the missing jobs of a working folder and merge all shards, in order.

    `counts` are attempts, failures and demonstrations by task, where they are known from another dataset.
    """
    defaults = CollectionSettings(settings.suite).decisive()  # of fields that older datasets do not have
    finished = read_metadata(root)
    if finished is None:
        load_mujoco()  # reports a simulator that cannot run; a worker could only die of it
        finished = read_metadata(root)  # that took a second, in which another start may have ended
    if finished is not None:
        stored = finished["settings"]
        check_same_settings(root, stored, settings.decisive(), defaults=defaults, option="root")
        logger.info("%s is complete, with these settings: nothing to collect", root)
        return finished
    require_folder(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} holds files that this command did not write; give another root=FOLDER")
    work = root.with_name(root.name + ".partial")
    with open_run(work, settings.decisive(), defaults=defaults, option="root"):
        jobs = jobs_in(work)
        missing = _missing(jobs)
        merged = work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        with Workers(processes, total=sum(job.episodes for job in jobs)) as workers:
            workers.run(missing)
            metadata = _metadata(settings, [read_summary(job.folder) for job in jobs])
            with atomic_folder(merged) as draft:
                workers.merge([job.folder for job in jobs], draft / DATASET, settings.repo_id)
                tasks = metadata["tasks"] if counts is None else counts
                write_metadata(draft / DATASET, {**metadata, "tasks": tasks})
        (merged / DATASET).rename(root)
        shutil.rmtree(work)  # still locked
    return read_metadata(root) or {}


def _missing(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose shards are missing or damaged; damaged ones are deleted."""
    missing = [job for job in jobs if read_shard(job.folder) is None]
    damaged = [job.folder.name for job in missing if job.folder.exists()]
    if damaged:
        logger.warning("damaged shards are collected again: %s", ", ".join(damaged))
    if len(missing) < len(jobs):
        logger.info("resuming: %d of %d shards are complete", len(jobs) - len(missing), len(jobs))
    for job in missing:
        shutil.rmtree(job.folder, ignore_errors=True)
    return missing


def _metadata(settings: CollectionSettings, shards: Sequence[ShardSummary]) -> dict[str, Any]:
    attempts, demonstrations = Counter[str](), Counter[str]()
    for shard in shards:
        attempts[shard.task] += shard.attempts
        demonstrations[shard.task] += len(shard.seeds)
    tasks = {
        name: {
            "attempts": tried,
            "failures": tried - demonstrations[name],
            "demonstrations": demonstrations[name],
        }
        for name, tried in attempts.items()
    }
    episodes = [
        {"task": shard.task, "seed": seed, "length": length}
        for shard in shards
        for seed, length in zip(shard.seeds, shard.lengths, strict=True)
    ]
    return {"settings": settings.decisive(), "tasks": tasks, "episodes": episodes}


class Workers:
    """A pool of worker processes with a progress bar that replaces workers which die; a context manager.

    With one process, everything runs in the caller's own. `total` is the number of demonstrations.
    """

    def __init__(self, processes: int, *, total: int) -> None:
        if processes < 1:
            raise ValueError(f"expected at least 1 process, got {processes}")
        self._processes, self._total = processes, total
        self._bar = tqdm(desc="Demonstrations", total=total, unit="demo", smoothing=0)
        self._tried, self._succeeded = Counter[str](), Counter[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        _close_environment()

    def run(self, jobs: Sequence[Job]) -> None:
        """Collect shards; those of a worker that dies are collected again.

        Raises:
            RuntimeError: If workers keep dying, or a demonstrator is unable.
        """
        self._bar.initial = self._total - sum(job.episodes for job in jobs)  # those of an earlier run
        left, deaths = list(jobs), 0
        if left:
            self._bar.set_description("Starting simulators")  # for half a minute, until the first episode
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
                if deaths == MAX_DEATHS:
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
        """Run jobs and remove the finished ones from `left`."""
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
        self._bar.set_description("Demonstrations", refresh=False)
        rates = {"all": f"{self._succeeded.total()}/{self._tried.total()}"}
        for name, tried in self._tried.items():
            if self._succeeded[name] < tried or len(self._tried) == 1:  # LIBERO's names are too long for all
                rates[name] = f"{self._succeeded[name]}/{tried}"
        self._bar.set_postfix(rates, refresh=False)
        self._bar.update(success)


def context(modules: Sequence[str] = SLOW_IMPORTS) -> Any:
    """Return a multiprocessing context whose processes start with these modules already imported."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(list(modules))
    return forkserver


def collect_shard(job: Job, report: Report) -> ShardSummary:
    """Roll out demonstrations until a shard is full; each success is written before the next episode.

    Raises:
        RuntimeError: If the demonstrator succeeds too rarely to fill the shard.
    """
    render = job.settings.format != "states"
    env = _environment(job.task, job.settings.frame_size, job.settings.rendering, render)
    recordings = _successes(job, env, report) if job.source is None else _stored(job, job.source, env, report)
    if not render:
        (recording,) = recordings  # a shard of states is one episode
        return write_state_shard(job.folder, env, recording)
    executed = job.source is None or stores_executed(job.source)
    settings = job.settings
    return write_shard(job.folder, env, recordings, settings.repo_id, settings.video, executed=executed)


def _stored(job: Job, source: Path, env: ManipulationEnv, report: Report) -> Iterator[Recording]:
    for episode in read_episodes(source, job.source_episodes):
        env.reset_blindly(seed=episode.recording.seed)  # places bodies that no simulator state holds
        yield episode.recording
        report(job.task.name, True)


def _successes(job: Job, env: ManipulationEnv, report: Report) -> Iterator[Recording]:
    found = attempts = 0
    settings = job.settings
    visited = None if settings.starts is None else VisitedStates(Path(settings.starts))
    seeds = job.seeds[: MAX_ATTEMPTS * job.episodes]
    for seed in seeds:
        options = {"layout": settings.layouts, "visited": visited}
        recording = record(env, seed, job.settings.demonstrator, **options)
        attempts += 1
        if recording is not None:
            yield replace(recording, attempts=attempts)
            found, attempts = found + 1, 0
        report(job.task.name, recording is not None)
        if found == job.episodes:
            return
    raise RuntimeError(
        f"expected {job.episodes} demonstrations of {job.task.name}, its demonstrator succeeded in {found} "
        f"of {len(seeds)} episodes (seeds {seeds[0]} to {seeds[-1]}); lower its noise "
        f"({job.settings.demonstrator.noise}) or check its options"
    )


_OPEN: dict[
    tuple[str, int, int, str, bool], ManipulationEnv
] = {}  # this process's environment; one at a time


def _environment(task: Task, frame_size: int, rendering: str, render: bool) -> ManipulationEnv:
    key = (task.suite, task.index, frame_size, rendering, render)
    if key not in _OPEN:
        _close_environment()
        _OPEN[key] = envs.make(*key[:2], frame_size=frame_size, rendering=rendering, render=render)
    return _OPEN[key]


def _close_environment() -> None:
    while _OPEN:
        _OPEN.popitem()[1].close()


_EPISODES: Any = None  # this worker's end of the queue of (task, success)


def _start_worker(episodes: Any) -> None:
    global _EPISODES
    _EPISODES = episodes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the collection ends after the running shards
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent process to end, then end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _collect_in_worker(job: Job) -> ShardSummary:
    return collect_shard(job, lambda task, success: _EPISODES.put((task, success)))


SUCCESS_SEED = DEMONSTRATION_SEEDS.stop - 10_000  # collections begin at the other end
DECISIVE_MODULES = ("base.py", "layouts.py", "libero.py", "metaworld.py", "robosuite.py", "so101.py")
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
        seed = EVALUATION_SEED + index if official else SUCCESS_SEED + index
        recording = record(env, seed, Demonstrator(), initial_state=index if official else None)
        lengths.append(0 if recording is None else len(recording.actions))
    env.close()
    return TaskSuccess(task, official, tuple(lengths))


def measure_success(
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


def merge_result(known: Sequence[TaskSuccess], result: TaskSuccess) -> list[TaskSuccess]:
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
