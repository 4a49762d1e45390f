"""Clips of our simulators on disk, for pre-training a video model: filmed in parallel, resumed after a kill.

<folder>/order.json                      what was ordered; another order gets another folder
         <suite>-<task>-<part>.npy       uint8 [n t h w 3], to be mapped into memory
         <suite>-<task>-<part>.json      bytes of that file, and what each clip shows; written last
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import envs
from envs.base import DEMONSTRATION_SEEDS
from envs.demos import demonstrate
from envs.posed_views import PosedCamera, Scatter, Viewpoint, model_and_data
from envs.robosuite import PandaEnv

logger = logging.getLogger(__name__)


CameraPath = list[Viewpoint]
AGENT, WRIST = "agentview", "robot0_eye_in_hand"
TURN = np.radians(60.0)  # largest turn to either side of the suite's own camera
LEAD = 60  # control steps, at most, that pass before a played clip begins
NOISE = 0.3  # of the demonstrator's actions, in shares of full scale


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        frames: uint8 [t h w 3].
        instruction: What the robot was told.
        shot: Key of `STILL` or `PLAYED`.
        seed: Seed of the episode.
    """

    frames: np.ndarray
    instruction: str
    shot: str
    seed: int


def orbit(count: int, rng: np.random.Generator) -> CameraPath:
    """About the vertical through the middle, with some climb."""
    turns, climbs = _ramp(count, rng, TURN), _ramp(count, rng, 0.2)
    distance = float(rng.uniform(0.8, 1.2))
    return [Viewpoint(float(turn), float(climb), distance) for turn, climb in zip(turns, climbs, strict=True)]


def dolly(count: int, rng: np.random.Generator) -> CameraPath:
    """Towards the middle or away from it."""
    near, far = rng.permutation([rng.uniform(0.5, 0.8), rng.uniform(1.0, 1.3)])
    turn, climb = float(rng.uniform(-TURN, TURN)), float(rng.uniform(-0.1, 0.3))
    return [Viewpoint(turn, climb, float(distance)) for distance in np.linspace(near, far, count)]


def pan(count: int, rng: np.random.Generator) -> CameraPath:
    """From one side to the other, at a longer focal length."""
    turn, field = float(rng.uniform(-TURN, TURN)), float(rng.uniform(0.35, 0.6))
    return [Viewpoint(turn, aim=float(aim), field=field) for aim in _ramp(count, rng, 0.3)]


def fixed(count: int, rng: np.random.Generator) -> CameraPath:
    """A camera that stands somewhere."""
    view = Viewpoint(
        float(rng.uniform(-TURN, TURN)), float(rng.uniform(-0.1, 0.3)), float(rng.uniform(0.7, 1.2))
    )
    return [view] * count


def own(count: int, rng: np.random.Generator) -> CameraPath:
    """The camera's own place; the wrist's moves with the hand."""
    return [Viewpoint()] * count


Shot = tuple[str, Callable[[int, np.random.Generator], CameraPath]]
STILL: dict[str, Shot] = {"orbit": (AGENT, orbit), "dolly": (AGENT, dolly), "pan": (AGENT, pan)}
PLAYED: dict[str, Shot] = {
    "fixed": (AGENT, fixed),
    "orbit_motion": (AGENT, orbit),
    "agent": (AGENT, own),
    "wrist": (WRIST, own),
}
"""Name -> (camera, function of (frames, generator) that gives its path)."""


class Appearance:
    """Light and tint of a scene, drawn anew for each round.

    Args:
        env: The environment.
    """

    def __init__(self, env: PandaEnv) -> None:
        self._model, _ = model_and_data(env)
        self._light, self._tint = self._model.light_diffuse.copy(), self._model.mat_rgba.copy()

    def draw(self, rng: np.random.Generator) -> None:
        """Scale each light by up to a third and each material's colour by up to a quarter."""
        self._model.light_diffuse[:] = self._light * rng.uniform(0.67, 1.33, (len(self._light), 1))
        tint = rng.uniform(0.75, 1.0, (len(self._tint), 3))
        self._model.mat_rgba[:, :3] = self._tint[:, :3] * tint


class Film:
    """Films one task again and again; a context manager.

    Args:
        suite: Name of a robosuite or LIBERO suite.
        task: Index of the task.
        frames: Frames a clip.
        frame_size: Side of the square pictures in pixels.
        every: Control steps from one frame of a played clip to the next.
        shots: Keys of `STILL` and `PLAYED`; each is taken once a round.
        rendering: Rendering profile.

    Raises:
        ValueError: If a shot is unknown or the suite is of another family.
    """

    def __init__(
        self,
        suite: str,
        task: int,
        *,
        frames: int,
        frame_size: int,
        every: int,
        shots: list[str],
        rendering: str,
    ) -> None:
        check_shots(shots)
        env = envs.make(suite, task, render=False)
        if not isinstance(env, PandaEnv):
            env.close()
            raise ValueError(f"clips are filmed in robosuite's and LIBERO's suites; got {suite!r}")
        self._env, self._count, self._every, self._shots = env, frames, every, shots
        env.reset_blindly(seed=0)
        self._cameras = {
            name: PosedCamera(env, camera=name, frame_size=frame_size, rendering=rendering)
            for name in sorted({(STILL | PLAYED)[shot][0] for shot in shots})
        }
        self._scatter, self._appearance = Scatter(env, presence=0.6), Appearance(env)

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *error: object) -> None:
        for camera in self._cameras.values():
            camera.close()
        self._env.close()

    def round(self, rng: np.random.Generator) -> Iterator[Clip]:
        """One episode and one scattered scene: a clip of every shot, played ones first."""
        seed = int(rng.integers(DEMONSTRATION_SEEDS.start, DEMONSTRATION_SEEDS.stop))
        self._env.reset_blindly(seed=seed)
        self._appearance.draw(rng)
        for shots, moments in ((PLAYED, self._play), (STILL, self._scattered)):
            paths = {shot: shots[shot][1](self._count, rng) for shot in self._shots if shot in shots}
            frames: dict[str, list[np.ndarray]] = {shot: [] for shot in paths}
            if not paths:
                continue
            for moment in moments(rng, seed):
                for shot, path in paths.items():
                    camera = self._cameras[shots[shot][0]]
                    frames[shot].append(camera.picture(path[moment], self._scatter.middle))
            for shot, taken in frames.items():
                yield Clip(np.stack(taken), self._env.task.instruction, shot, seed)

    def _play(self, rng: np.random.Generator, seed: int) -> Iterator[int]:
        """Index of each frame, at the moment at which it is to be taken."""
        actions = self._actions(rng)
        for _ in range(int(rng.integers(LEAD))):
            self._env.step_blindly(next(actions))
        for moment in range(self._count):
            yield moment
            for _ in range(self._every):
                self._env.step_blindly(next(actions))

    def _actions(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The demonstrator's actions, then rest."""
        executed = np.zeros(self._env.action_size, np.float32)
        for executed, _ in demonstrate(self._env, rng=rng, noise=NOISE):
            yield executed
        rest = np.zeros_like(executed)
        rest[-1] = executed[-1]  # the gripper stays as it is
        yield from itertools.repeat(rest)

    def _scattered(self, rng: np.random.Generator, seed: int) -> Iterator[int]:
        """The same, of things scattered; where there is no room, of things as they lie."""
        try:
            self._scatter.draw(rng)
        except RuntimeError as error:
            logger.warning("%s, seed %d: %s; filmed as it is", self._env.task.name, seed, error)
        yield from range(self._count)


def check_shots(shots: list[str]) -> None:
    """Refuse shots that nobody knows, or none.

    Raises:
        ValueError: Naming them and the known ones.
    """
    known = STILL | PLAYED
    unknown = [shot for shot in shots if shot not in known]
    if unknown or not shots:
        raise ValueError(f"clips.shots: expected some of {', '.join(known)}; got {shots}")


def _ramp(count: int, rng: np.random.Generator, reach: float) -> Any:
    """From one end to the other, both within the reach, at least a half of it apart."""
    start = rng.uniform(-reach, reach)
    stop = start - np.sign(start) * rng.uniform(reach / 2, reach)
    return np.linspace(start, stop, count)


ORDER = "order.json"


@dataclass(frozen=True)
class ClipSpec:
    """Which clips are wanted.

    Attributes:
        suites: Robosuite and LIBERO suites.
        tasks: So many tasks of each, from the first; None takes all.
        parts: Shards of each task.
        rounds: Rounds a shard: each is a new scene, filmed once by every shot.
        shots: Keys of `envs.clips.STILL` and `PLAYED`.
        frames: Frames a clip, 1 + 4 k as Wan's autoencoder takes them.
        frame_size: Side of the square frames in pixels, a multiple of 16.
        every: Control steps (20 a second) from one frame of a played clip to the next.
        told: Share of the clips that keep their instruction; the others' is empty.
        rendering: Rendering profile.
        seed: Of everything.
    """

    suites: tuple[str, ...]
    tasks: int | None = None
    parts: int = 2
    rounds: int = 8
    shots: tuple[str, ...] = ("orbit", "dolly", "pan", "fixed", "orbit_motion", "agent", "wrist")
    frames: int = 9
    frame_size: int = 128
    every: int = 3
    told: float = 0.5
    rendering: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be filmed or learned from.

        Raises:
            ValueError: Naming the field.
        """
        check_shots(list(self.shots))
        if self.frames % 4 != 1:
            raise ValueError(f"clips.frames: Wan's autoencoder takes 1 + 4 k frames; got {self.frames}")
        if self.frame_size % 16:
            raise ValueError(f"clips.frame_size: expected a multiple of 16; got {self.frame_size}")
        if not self.suites or min(self.parts, self.rounds, self.every) < 1:
            raise ValueError("clips: expected a suite, and parts, rounds and every of at least 1")


@dataclass(frozen=True)
class Job:
    """One shard.

    Attributes:
        folder: Where it will lie.
        suite: Its suite.
        task: Its task.
        part: Which of the task's shards.
        order: The whole order.
        deadline: Time (`time.time()`) after which it is given up; None has all the time.
    """

    folder: Path
    suite: str
    task: int
    part: int
    order: ClipSpec
    deadline: float | None

    @property
    def name(self) -> str:
        """Name of its files, without ending."""
        return f"{self.suite}-{self.task:02d}-{self.part:02d}"

    @property
    def done(self) -> bool:
        """Whether it was written to its end."""
        return (self.folder / f"{self.name}.json").is_file()


def instructions(**order: Any) -> list[str]:
    """What the robot is told in the tasks of an order, each once; no simulator is started."""
    wanted = _order(order)
    told = (task.instruction for suite in wanted.suites for task in envs.tasks(suite)[: wanted.tasks])
    return list(dict.fromkeys(told))


def write_clips(folder: Path, *, processes: int, deadline: float | None = None, **order: Any) -> bool:
    """Film the shards that are missing.

    Args:
        folder: Belongs to this order alone.
        processes: Simulator processes; they change the time it takes, not what is written.
        deadline: Time (`time.time()`) at which unfinished shards are given up, to be filmed by the next call.
        **order: Fields of `ClipSpec`.

    Returns:
        Whether all shards are there.

    Raises:
        ValueError: If the folder holds clips of another order.
        RuntimeError: If a worker process died.
    """
    wanted = _order(order)
    _claim(folder, wanted)
    jobs = [
        Job(folder, suite, task.index, part, wanted, deadline)
        for part in range(wanted.parts)
        for suite in wanted.suites
        for task in envs.tasks(suite)[: wanted.tasks]
    ]
    missing = [job for job in jobs if not job.done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="Filming", unit="shard") as bar:
        for done in _filmed(missing, processes):
            bar.update(done)
    return all(job.done for job in jobs)


def _filmed(jobs: list[Job], processes: int) -> Iterator[bool]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(_film, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's rendering context
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(_film, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a simulator process died (out of memory?); start again with fewer clips.processes: "
                "finished shards are kept"
            ) from error


def _film(job: Job) -> bool:
    """Film a shard; False if there was no time for it."""
    order, clips = job.order, []
    if _late(job.deadline):
        return False
    with Film(
        job.suite,
        job.task,
        frames=order.frames,
        frame_size=order.frame_size,
        every=order.every,
        shots=list(order.shots),
        rendering=order.rendering,
    ) as film:
        for index in range(order.rounds):
            if _late(job.deadline):
                return False
            place = (order.seed, zlib.crc32(job.suite.encode()), job.task, job.part, index)
            clips.extend(film.round(np.random.default_rng(place)))
    _write(job, clips)
    return True


def _write(job: Job, clips: list[Clip]) -> None:
    """Files are written aside and renamed, the description last: a shard that has one is whole."""
    rng = np.random.default_rng((job.order.seed, zlib.crc32(job.name.encode())))
    told = rng.permutation(len(clips)) < job.order.told * len(clips)
    draft = job.folder / f".{job.name}.partial"
    with draft.open("wb") as file:
        np.save(file, np.stack([clip.frames for clip in clips]))
    size = draft.stat().st_size
    draft.rename(job.folder / f"{job.name}.npy")
    shown = [
        {"shot": clip.shot, "seed": clip.seed, "instruction": clip.instruction if keeps else ""}
        for clip, keeps in zip(clips, told, strict=True)
    ]
    draft.write_text(json.dumps({"bytes": size, "suite": job.suite, "task": job.task, "clips": shown}))
    draft.rename(job.folder / f"{job.name}.json")


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() >= deadline


def _order(order: dict[str, Any]) -> ClipSpec:
    known = {field.name for field in fields(ClipSpec)}
    unknown = sorted(order.keys() - known)
    if unknown:
        raise ValueError(f"clips: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in order.items()
    }
    return ClipSpec(**values)


def _claim(folder: Path, order: ClipSpec) -> None:
    """Note the order in its folder, or refuse a folder of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    note, text = folder / ORDER, json.dumps(asdict(order), indent=1)
    if note.is_file() and note.read_text() != text:
        before, now = json.loads(note.read_text()), json.loads(text)
        told = ", ".join(
            f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]
        )
        raise ValueError(f"{folder} holds clips of another order: {told}. Give another clips.folder.")
    draft = note.with_suffix(".partial")
    draft.write_text(text)
    draft.rename(note)
