"""Render demonstrations from files of simulator states, in several processes, into one file of frames."""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
import logging
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import envs
from envs.base import ManipulationEnv
from envs.demos.collect import context, exit_with_parent
from envs.demos.planner_fixtures import displacements
from envs.demos.planner_grasping import Workcell
from envs.demos.shards import dataset_features, image_key, knows_targets, read_metadata, write_metadata
from envs.demos.states import StateEpisode, read_header, read_states

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode of the dataset to be rendered."""

    file: Path
    suite: str
    task: int  # index in its suite
    index: int  # among the task's episodes in the file
    row: int  # of its first frame in the dataset
    length: int  # number of states to be rendered
    seed: int
    digest: str  # of its states
    source: tuple[Path, int] | None = None  # file of frames rendered before, and its first row there

    @property
    def identity(self) -> list[Any]:
        """Return what two equal episodes of different datasets share."""
        return [self.suite, self.task, self.seed, self.length, self.digest]


@dataclass(frozen=True)
class Plan:
    """A dataset to be rendered."""

    episodes: list[PlannedEpisode]
    frame_size: int  # height and width in pixels
    rendering: str  # profile
    features: dict[str, dict[str, Any]]  # as LeRobot names them
    cameras: list[str]  # keys of the features, in the order of views
    fps: int
    robot_type: str
    frame_stride: int = 1  # only every k-th state of an episode is rendered

    @property
    def rows(self) -> int:
        """Return the number of rows n of frames."""
        return sum(episode.length for episode in self.episodes)

    @property
    def row_bytes(self) -> int:
        """Return the size of a row [v 3 h w] of frames."""
        return len(self.cameras) * 3 * self.frame_size**2


def plan_rendering(
    files: Sequence[Path],
    *,
    frame_size: int,
    rendering: str,
    tasks: Sequence[int] | None = None,
    episodes_per_task: int | None = None,
    frame_stride: int = 1,
    displacement: bool = False,
) -> tuple[Plan, list[dict[str, Any]]]:
    """Plan a dataset of all episodes of the files, or of the first few of some tasks of each file.

    With `frame_stride` k only every k-th state of an episode is rendered, its first one included. With
    `displacement` the features include where the target is. Returned are the plan, and `state` [t s],
    `action` [t a], `executed` [t a] and `instruction` of each episode.

    Raises:
        ValueError: If a file is no file of states, no episode is chosen, cameras or robots differ, or a
            suite's targets are not known.
    """
    if frame_stride < 1:
        raise ValueError(f"frame_stride must be at least 1; got {frame_stride}")
    episodes: list[PlannedEpisode] = []
    values: list[dict[str, Any]] = []
    row = 0
    for file in files:
        suite = read_header(file)["suite"]
        known, counts = envs.tasks(suite), dict[int, int]()
        for episode in read_states(file, tasks):
            index = counts.setdefault(episode.task, 0)
            if episodes_per_task is not None and index >= episodes_per_task:
                continue
            counts[episode.task] += 1
            digest = hashlib.sha256(episode.initial.tobytes() + episode.positions.tobytes()).hexdigest()[:16]
            length = len(range(0, len(episode), frame_stride))
            at = (file, suite, episode.task, index, row, length, episode.seed, digest)
            episodes.append(PlannedEpisode(*at))
            instruction = known[episode.task].instruction
            actions = {"action": episode.actions, "executed": episode.executed}
            values.append({"state": episode.proprioception, "instruction": instruction} | actions)
            row += length
    if not episodes:
        raise ValueError(
            f"no episode is chosen: {', '.join(map(str, files))} hold none of the tasks {tasks} with "
            f"episodes_per_task={episodes_per_task}"
        )
    described = _describe(episodes, frame_size, rendering, displacement)
    return Plan(episodes, frame_size, rendering, **described, frame_stride=frame_stride), values


def _describe(
    episodes: Sequence[PlannedEpisode], frame_size: int, rendering: str, displacement: bool
) -> dict[str, Any]:
    """Return features, cameras, rate and robot, which must be the same for all suites."""
    descriptions = {}
    for suite, task in {episode.suite: episode.task for episode in episodes}.items():
        env = envs.make(suite, task, frame_size=frame_size, rendering=rendering)
        features = dataset_features(env)
        cameras = [image_key(env, camera) for camera in env.cameras]
        for camera in cameras:
            features[camera]["info"] = {"rendering": rendering}
        descriptions[suite] = {
            "features": features,
            "cameras": cameras,
            "fps": env.metadata["render_fps"],
            "robot_type": env.robot_type,
        }
        env.close()
    unknown = [suite for suite in descriptions if not knows_targets(envs.tasks(suite)[0])]
    if displacement and unknown:
        raise ValueError(
            f"displacement=true: the targets of {', '.join(unknown)} are not known, only those of LIBERO's "
            "suites. Leave displacement out."
        )
    if not displacement:
        for description in descriptions.values():
            description["features"].pop("displacement", None)
    first, *others = descriptions.values()
    if any(other != first for other in others):
        raise ValueError(
            f"one dataset has one kind of robot and cameras; these suites differ: {descriptions}"
        )
    return first


def find_displacements(plan: Plan, processes: int) -> list[np.ndarray]:
    """Return the displacement [t 3] of each episode, of all its states, found by several processes.

    Raises:
        ValueError: If `processes` is less than 1.
        RuntimeError: If a process dies.
    """
    once, first_rows = _without_repeats(plan)
    with tqdm(total=len(once.episodes), unit="episode", desc="Targets", smoothing=0.02) as bar:
        results = _run(partial(_TargetFinder, once), once, processes, bar)
    by_row = {row: found for result in results for row, found in result.items()}
    return [by_row[first_rows[episode.row]] for episode in plan.episodes]


def _without_repeats(plan: Plan) -> tuple[Plan, dict[int, int]]:
    """Return the first ones of equal episodes, and the row of that first one by the row of each episode."""
    firsts: dict[str, int] = {}
    rows = {one.row: firsts.setdefault(json.dumps(one.identity), one.row) for one in plan.episodes}
    return replace(plan, episodes=[one for one in plan.episodes if rows[one.row] == one.row]), rows


def with_sources(plan: Plan, places: Mapping[str, tuple[Path, int]]) -> Plan:
    """Return a plan that copies the frames of episodes whose identity (as JSON) has a place (file, row)."""
    episodes = [
        replace(episode, source=places.get(json.dumps(episode.identity))) for episode in plan.episodes
    ]
    return replace(plan, episodes=episodes)


def origin(plan: Plan, repo_id: str) -> dict[str, Any]:
    """Return the origin of a rendered dataset, JSON values."""
    suites = list(dict.fromkeys(episode.suite for episode in plan.episodes))
    settings = {"suite": "+".join(suites), "frame_size": plan.frame_size, "rendering": plan.rendering}
    if plan.frame_stride > 1:
        settings["frame_stride"] = plan.frame_stride
    if "displacement" in plan.features:
        settings["displacement"] = True
    episodes = [episode.identity for episode in plan.episodes]
    return {"settings": {**settings, "repo_id": repo_id}, "episodes": episodes}


def write_origin(root: Path, plan: Plan, repo_id: str) -> None:
    """Write the origin beside the features, with the versions of the simulators."""
    write_metadata(root, origin(plan, repo_id))


def read_origin(root: Path) -> dict[str, Any] | None:
    """Return `settings` and `episodes` of a dataset that was rendered from states, or None."""
    metadata = read_metadata(root)
    is_rendered = metadata is not None and all(isinstance(entry, list) for entry in metadata["episodes"])
    return metadata if is_rendered else None


def render_frames(
    plan: Plan, target: Path, notes: Path, *, processes: int, egl_devices: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Render all frames of a plan into the file `target` [n v 3 h w]; return their sum by camera [3 h w].

    Finished episodes are recorded in the folder `notes` with a checksum of their frames; a second call
    renders only the others. Equal episodes are rendered once, then copied. The number of processes does not
    change the frames; with 1 they are rendered in this one. They are spread over the GPUs `egl_devices`; none
    leaves the choice to MuJoCo.

    Raises:
        RuntimeError: If a rendering process dies.
    """
    once, first_rows = _without_repeats(plan)
    repeats = [one for one in plan.episodes if first_rows[one.row] != one.row]
    copies = replace(plan, episodes=[replace(one, source=(target, first_rows[one.row])) for one in repeats])
    finished, total = _read_notes(notes), np.zeros((), np.int64)
    with tqdm(total=plan.rows, unit="state", desc="Rendering", smoothing=0.02) as bar:
        for part in (once, copies) if repeats else (once,):
            job = _RenderJob(part, target, notes, finished, tuple(egl_devices))
            total = sum(_run(partial(_Renderer, job), part, processes, bar), start=total)
    return dict(zip(plan.cameras, total, strict=True))


class _Queue:
    """The episodes of a plan, which processes take one by one.

    Those of one simulator are a group, also where they come from several files: building it costs seconds.
    """

    def __init__(self, plan: Plan, started: Any = None) -> None:
        """Prepare all episodes, for processes of the multiprocessing context `started` or for this one."""
        groups: dict[tuple[str, int], list[PlannedEpisode]] = {}
        for episode in plan.episodes:
            groups.setdefault((episode.suite, episode.task), []).append(episode)
        self._groups = list(groups.values())
        self._left = [_suffix_sums([episode.length for episode in group]) for group in self._groups]
        size = len(self._groups)
        self._taken: Any = started.Array("i", size) if started else [0] * size  # episodes of each group
        self._users: Any = started.Array("i", size) if started else [0] * size  # processes in each group
        self._lock = self._taken.get_lock() if started else threading.Lock()

    def take(self, group: int | None) -> tuple[int, PlannedEpisode] | None:
        """Return the next episode of this group or, if there is none, of the group with most left a process.

        `group` is that of the process's last episode, None at first. Returned are group and episode, or None.
        """
        with self._lock:
            if group is not None and self._taken[group] == len(self._groups[group]):
                self._users[group] -= 1
                group = None
            if group is None:
                shares = [
                    left[taken] / (users + 1)
                    for left, taken, users in zip(self._left, self._taken, self._users, strict=True)
                ]
                group = int(np.argmax(shares))
                if not shares[group]:
                    return None
                self._users[group] += 1
            self._taken[group] += 1
            return group, self._groups[group][self._taken[group] - 1]

    def stop(self) -> None:
        """Leave nothing to be taken: processes end with their running episode."""
        with self._lock:
            self._taken[:] = [len(group) for group in self._groups]


def _suffix_sums(lengths: Sequence[int]) -> list[int]:
    """Return the sums of all, all but the first, ..., none of the lengths."""
    return [sum(lengths) - done for done in (0, *itertools.accumulate(lengths))]


def _run[Result](
    worker: Callable[[_Queue, int], _Worker[Result]], plan: Plan, processes: int, bar: Any
) -> list[Result]:
    """Run workers, each made with a queue and its number, until no episode is left; return their results.

    A single one runs in this process. The bar counts what they report.
    """
    if processes < 1:
        raise ValueError(f"expected at least 1 process, got {processes}")
    if processes == 1:
        return [worker(_Queue(plan), 0).run(bar.update)]
    return _run_in_pool(worker, plan, min(processes, len(plan.episodes)), bar)


def _run_in_pool[Result](
    worker: Callable[[_Queue, int], _Worker[Result]], plan: Plan, processes: int, bar: Any
) -> list[Result]:
    started = context(("numba", "envs.demos"))
    queue, count, numbers = _Queue(plan, started), started.Value("q", 0), started.Value("i", 0)
    pool = ProcessPoolExecutor(
        processes, started, initializer=_start_worker, initargs=(worker, queue, count, numbers)
    )
    running: list[Future[Result]] = [pool.submit(_run_worker) for _ in range(processes)]
    before = bar.n
    try:
        left: Any = running
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
            if new := before + count.value - bar.n:
                bar.update(new)
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a rendering process died (out of memory?); the same command resumes, also with fewer processes"
        ) from error
    finally:
        queue.stop()  # after an error, the others end with their episode
        pool.shutdown()
    return [future.result() for future in running]


_WORKER: Any = None  # of this worker process
_COUNT: Any = None  # of what all have done


def _start_worker(worker: Callable[[_Queue, int], Any], queue: _Queue, count: Any, numbers: Any) -> None:
    global _WORKER, _COUNT
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the command ends after the running episodes
    threading.Thread(target=exit_with_parent, daemon=True).start()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    _WORKER, _COUNT = worker(queue, number), count


def _run_worker() -> Any:
    def count(done: int) -> None:
        with _COUNT.get_lock():
            _COUNT.value += done

    return _WORKER.run(count)


class _Worker[Result](abc.ABC):
    """Takes episodes until none is left, and keeps the simulator and the file of the last one open."""

    def __init__(self, queue: _Queue, options: Mapping[str, Any]) -> None:
        """Take episodes of a queue; `options` are those of `envs.make`."""
        self._queue, self._options = queue, options
        self._env: ManipulationEnv | None = None
        self._opened: tuple[str, int] | None = None  # suite and task of the simulator
        self._stored: list[StateEpisode] = []
        self._read: tuple[Path, int] | None = None  # file and task of the stored episodes

    @abc.abstractmethod
    def run(self, count: Callable[[int], Any]) -> Result:
        """Work until no episode is left, calling `count` after each; return what was found."""

    def _episodes(self) -> Iterator[PlannedEpisode]:
        group: int | None = None
        while (taken := self._queue.take(group)) is not None:
            group, episode = taken
            yield episode
        if self._env is not None:
            self._env.close()

    def _open(self, episode: PlannedEpisode) -> tuple[ManipulationEnv, StateEpisode]:
        """Return the simulator of an episode, at any state, and its states."""
        if self._env is None or self._opened != (episode.suite, episode.task):
            if self._env is not None:
                self._env.close()
            self._env = envs.make(episode.suite, episode.task, **self._options)
            self._env.reset_blindly(seed=episode.seed)
            self._opened = episode.suite, episode.task
        if self._read != (episode.file, episode.task):
            self._stored, self._read = read_states(episode.file, [episode.task]), (episode.file, episode.task)
        return self._env, self._stored[episode.index]


class _TargetFinder(_Worker[dict[int, np.ndarray]]):
    """Finds the displacement [t 3] of episodes, by first row."""

    def __init__(self, plan: Plan, queue: _Queue, number: int) -> None:
        super().__init__(queue, {"render": False})
        self._cell: Workcell | None = None  # of the open simulator

    def run(self, count: Callable[[int], Any]) -> dict[int, np.ndarray]:
        found = {}
        for episode in self._episodes():
            env, stored = self._open(episode)
            if self._cell is None or self._cell.env is not env.raw:
                self._cell = Workcell.of(env.raw)
            states = map(stored.state, range(len(stored)))
            found[episode.row] = displacements(env, states, self._cell)
            count(1)
        return found


@dataclass(frozen=True)
class _RenderJob:
    """What every rendering process is given."""

    plan: Plan
    target: Path
    notes: Path
    finished: Mapping[int, int]  # first row -> checksum, of episodes of an interrupted rendering
    egl_devices: tuple[int, ...]


class _Renderer(_Worker[np.ndarray]):
    """Writes the frames of episodes, and sums them up [v 3 h w]."""

    def __init__(self, job: _RenderJob, queue: _Queue, number: int) -> None:
        plan = job.plan
        super().__init__(queue, {"frame_size": plan.frame_size, "rendering": plan.rendering})
        if job.egl_devices:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = str(job.egl_devices[number % len(job.egl_devices)])
        self._job = job

    def run(self, count: Callable[[int], Any]) -> np.ndarray:
        plan, job = self._job.plan, self._job
        total = np.zeros((len(plan.cameras), 3, plan.frame_size, plan.frame_size), np.int64)
        with job.target.open("r+b") as target, (job.notes / f"{os.getpid()}.txt").open("a") as notes:
            for episode in self._episodes():
                frames = self._finished(target.fileno(), episode)
                if frames is None:
                    frames = self._render(episode) if episode.source is None else self._copied(episode)
                    _write(target.fileno(), frames, episode.row * plan.row_bytes)
                    notes.write(f"{episode.row} {zlib.crc32(frames)}\n")
                    notes.flush()
                total += frames.sum(axis=0, dtype=np.int32)
                count(episode.length)
        return total

    def _render(self, episode: PlannedEpisode) -> np.ndarray:
        env, stored = self._open(episode)
        return render_episode(env, stored, self._job.plan.frame_stride)

    def _finished(self, target: int, episode: PlannedEpisode) -> np.ndarray | None:
        """Return the frames that an interrupted rendering has left, or None."""
        checksum = self._job.finished.get(episode.row)
        if checksum is None:
            return None
        frames = self._frames(target, episode.row, episode.length)
        return frames if zlib.crc32(frames) == checksum else None

    def _copied(self, episode: PlannedEpisode) -> np.ndarray:
        assert episode.source is not None
        path, row = episode.source
        with path.open("rb") as file:
            return self._frames(file.fileno(), row, episode.length)

    def _frames(self, file: int, row: int, length: int) -> np.ndarray:
        plan = self._job.plan
        shape = (length, len(plan.cameras), 3, plan.frame_size, plan.frame_size)
        content = os.pread(file, length * plan.row_bytes, row * plan.row_bytes)
        return np.frombuffer(content, np.uint8).reshape(shape)


def render_episode(env: ManipulationEnv, episode: StateEpisode, stride: int = 1) -> np.ndarray:
    """Render every `stride`-th state of a demonstration from every camera, uint8 [t v 3 h w]."""
    assert env.camera_rig is not None
    if not env.states_hold_fixtures:
        env.reset_blindly(seed=episode.seed)
    steps = range(0, len(episode), stride)
    frames = np.empty((len(steps), len(env.cameras), 3, env.frame_size, env.frame_size), np.uint8)
    states, done = (episode.state(step) for step in steps), 0
    for batch in env.camera_rig.render_states(states, env.restore):
        frames[done : done + len(batch)] = batch.transpose(0, 1, 4, 2, 3)
        done += len(batch)
    return frames


def _write(file: int, frames: np.ndarray, offset: int) -> None:
    left = memoryview(frames).cast("B")
    while left:
        done = os.pwrite(file, left, offset)
        left, offset = left[done:], offset + done


def _read_notes(notes: Path) -> dict[int, int]:
    """Return the checksums of finished episodes by first row, without a line that a kill cut short."""
    finished = {}
    for file in sorted(notes.glob("*.txt")):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row, checksum = line.split()
                finished[int(row)] = int(checksum)
    return finished
