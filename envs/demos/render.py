"""Render demonstrations from files of simulator states, in several processes, into one file of frames."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import envs
from envs.base import ManipulationEnv
from envs.demos.collect import context, exit_with_parent
from envs.demos.planner_fixtures import displacements
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
    """Return the displacement [t 3] of each episode, of all its states; a process takes a task at a time."""
    groups = list(_by_task(plan).values())
    processes = min(processes, len(groups))
    if processes <= 1:
        found = list(map(_displacements_of, groups))
    else:
        with ProcessPoolExecutor(processes, context(("numba", "envs.demos")), _watch_parent) as pool:
            found = list(tqdm(pool.map(_displacements_of, groups), "Targets", len(groups), unit="task"))
    by_row = {
        episode.row: way
        for group, ways in zip(groups, found, strict=True)
        for episode, way in zip(group, ways, strict=True)
    }
    return [by_row[episode.row] for episode in plan.episodes]


def _displacements_of(episodes: Sequence[PlannedEpisode]) -> list[np.ndarray]:
    """Return the displacements of episodes of one task of one file."""
    file, suite, task = (getattr(episodes[0], name) for name in ("file", "suite", "task"))
    env, stored = envs.make(suite, task, render=False), read_states(file, [task])
    env.reset_blindly(seed=episodes[0].seed)
    chosen = (stored[episode.index] for episode in episodes)
    found = [displacements(env, map(one.state, range(len(one)))) for one in chosen]
    env.close()
    return found


def _by_task(plan: Plan) -> dict[tuple[Path, int], list[PlannedEpisode]]:
    groups: dict[tuple[Path, int], list[PlannedEpisode]] = {}
    for episode in plan.episodes:
        groups.setdefault((episode.file, episode.task), []).append(episode)
    return groups


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
    renders only the others. The number of processes does not change the frames; with 1 they are rendered in
    this one. They are spread over the GPUs `egl_devices`; none leaves the choice to MuJoCo.

    Raises:
        RuntimeError: If a rendering process dies.
    """
    if processes < 1:
        raise ValueError(f"expected at least 1 process, got {processes}")
    work = _Work(plan, list(_by_task(plan).values()), target, notes, _read_notes(notes))
    with tqdm(total=plan.rows, unit="state", desc="Rendering", smoothing=0.02) as bar:
        if processes == 1:
            total = _Renderer(work, [0] * len(work.groups), threading.Lock(), 0, egl_devices).run(bar.update)
        else:
            total = _render_in_pool(work, min(processes, len(plan.episodes)), egl_devices, bar)
    return dict(zip(plan.cameras, total, strict=True))


@dataclass(frozen=True)
class _Work:
    """What every rendering process is given."""

    plan: Plan
    groups: list[list[PlannedEpisode]]  # episodes of one task of one file
    target: Path
    notes: Path
    finished: Mapping[int, int]  # first row -> checksum, of episodes of an interrupted rendering


def _render_in_pool(work: _Work, processes: int, egl_devices: Sequence[int], bar: Any) -> np.ndarray:
    """Run one renderer in each process of a pool until no episode is left; return the sum of all frames."""
    started = context(("numba", "envs.demos"))
    claimed, states, numbers = (
        started.Array("i", len(work.groups)),
        started.Value("q", 0),
        started.Value("i", 0),
    )
    initial = (work, claimed, states, numbers, list(egl_devices))
    pool = ProcessPoolExecutor(processes, started, initializer=_start_worker, initargs=initial)
    running: list[Future[np.ndarray]] = [pool.submit(_render_in_worker) for _ in range(processes)]
    try:
        left: Any = running
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
            if new := states.value - bar.n:
                bar.update(new)
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a rendering process died (out of memory?); the same command resumes, also with fewer processes"
        ) from error
    finally:
        # after an error, the others end with their episode
        claimed[:] = [len(group) for group in work.groups]
        pool.shutdown()
    return sum((future.result() for future in running), start=np.zeros((), np.int64))


_RENDERER: Any = None  # of this worker process
_STATES: Any = None  # counter of rendered states, shared by all


def _watch_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the rendering ends after the running episodes
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _start_worker(work: _Work, claimed: Any, states: Any, numbers: Any, egl_devices: list[int]) -> None:
    global _RENDERER, _STATES
    _watch_parent()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    _RENDERER, _STATES = _Renderer(work, claimed, claimed.get_lock(), number, egl_devices), states


def _render_in_worker() -> np.ndarray:
    def count(states: int) -> None:
        with _STATES.get_lock():
            _STATES.value += states

    return _RENDERER.run(count)


class _Renderer:
    """Renders episodes until none is left.

    `claimed` counts the episodes of each group that some process has taken.
    """

    def __init__(self, work: _Work, claimed: Any, lock: Any, number: int, egl_devices: Sequence[int]) -> None:
        if egl_devices:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = str(egl_devices[number % len(egl_devices)])
        self._work, self._claimed, self._lock, self._number = work, claimed, lock, number
        self._group: int | None = None  # in which this renderer has taken its last episode
        self._opened: int | None = None  # group of the environment
        self._env: ManipulationEnv | None = None
        self._states: list[StateEpisode] = []

    def run(self, count: Any) -> np.ndarray:
        """Render, calling `count` with the number of states of each episode; return the sum of the frames."""
        plan, work = self._work.plan, self._work
        total = np.zeros((len(plan.cameras), 3, plan.frame_size, plan.frame_size), np.int64)
        with work.target.open("r+b") as target, (work.notes / f"{os.getpid()}.txt").open("a") as notes:
            while (episode := self._claim()) is not None:
                frames = self._finished(target.fileno(), episode)
                if frames is None:
                    frames = self._render(episode) if episode.source is None else self._copied(episode)
                    _write(target.fileno(), frames, episode.row * plan.row_bytes)
                    notes.write(f"{episode.row} {zlib.crc32(frames)}\n")
                    notes.flush()
                total += frames.sum(axis=0, dtype=np.int32)
                count(episode.length)
        if self._env is not None:
            self._env.close()
        return total

    def _claim(self) -> PlannedEpisode | None:
        """Take an episode of the same group as before, since another costs seconds, else of the longest."""
        groups, claimed = self._work.groups, self._claimed
        with self._lock:
            left = [len(group) - taken for group, taken in zip(groups, claimed, strict=True)]
            if not any(left):
                return None
            if self._group is None or not left[self._group]:
                self._group = max(range(len(groups)), key=left.__getitem__)
            claimed[self._group] += 1
            return groups[self._group][claimed[self._group] - 1]

    def _finished(self, target: int, episode: PlannedEpisode) -> np.ndarray | None:
        """Return the frames that an interrupted rendering has left, or None."""
        checksum = self._work.finished.get(episode.row)
        if checksum is None:
            return None
        frames = self._read(target, episode.row, episode.length)
        return frames if zlib.crc32(frames) == checksum else None

    def _copied(self, episode: PlannedEpisode) -> np.ndarray:
        assert episode.source is not None
        path, row = episode.source
        with path.open("rb") as file:
            return self._read(file.fileno(), row, episode.length)

    def _read(self, file: int, row: int, length: int) -> np.ndarray:
        plan = self._work.plan
        shape = (length, len(plan.cameras), 3, plan.frame_size, plan.frame_size)
        content = os.pread(file, length * plan.row_bytes, row * plan.row_bytes)
        return np.frombuffer(content, np.uint8).reshape(shape)

    def _render(self, episode: PlannedEpisode) -> np.ndarray:
        plan = self._work.plan
        if self._env is None or self._opened != self._group:
            if self._env is not None:
                self._env.close()
            size, rendering = plan.frame_size, plan.rendering
            self._env = envs.make(episode.suite, episode.task, frame_size=size, rendering=rendering)
            self._env.reset_blindly(seed=episode.seed)
            self._states, self._opened = read_states(episode.file, [episode.task]), self._group
        return render_episode(self._env, self._states[episode.index], plan.frame_stride)


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
