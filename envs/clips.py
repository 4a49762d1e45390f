"""Video clips of our simulators on disk, to pre-train a video model: recorded in parallel, resumable.

<folder>/settings.json                   the `ClipSpec`; another one needs another folder
         <suite>-<task>-<part>.npy       uint8 [n t h w 3], to be mapped into memory
         <suite>-<task>-<part>.json      bytes of that file, and shot, seed and instruction of each clip;
         written last
"""

from __future__ import annotations

import itertools
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import envs
from envs.base import DEMONSTRATION_SEEDS
from envs.demos import demonstrate
from envs.posed_views import PosedCamera, RandomLayout, Viewpoint, decode_spec, make_panda, run_jobs
from envs.robosuite import PandaEnv
from vega_policy.run_dir import atomic_file, open_run, write_text

logger = logging.getLogger(__name__)

CameraPath = list[Viewpoint]
AGENT, WRIST = "agentview", "robot0_eye_in_hand"
TURN = np.radians(60.0)  # largest turn to either side of the suite's own camera
LEAD = 60  # largest number of control steps before a rollout's clip begins
NOISE = 0.3  # of the demonstrator's actions, fraction of full scale


def orbit(count: int, rng: np.random.Generator) -> CameraPath:
    """Return a path about the vertical through the middle, with some climb."""
    turns, climbs = _ramp(count, rng, TURN), _ramp(count, rng, 0.2)
    distance = float(rng.uniform(0.8, 1.2))
    return [Viewpoint(float(turn), float(climb), distance) for turn, climb in zip(turns, climbs, strict=True)]


def dolly(count: int, rng: np.random.Generator) -> CameraPath:
    """Return a path towards the middle or away from it."""
    near, far = rng.permutation([rng.uniform(0.5, 0.8), rng.uniform(1.0, 1.3)])
    turn, climb = float(rng.uniform(-TURN, TURN)), float(rng.uniform(-0.1, 0.3))
    return [Viewpoint(turn, climb, float(distance)) for distance in np.linspace(near, far, count)]


def pan(count: int, rng: np.random.Generator) -> CameraPath:
    """Return a pan from one side to the other, at a longer focal length."""
    turn, field = float(rng.uniform(-TURN, TURN)), float(rng.uniform(0.35, 0.6))
    return [Viewpoint(turn, aim=float(aim), field=field) for aim in _ramp(count, rng, 0.3)]


def fixed(count: int, rng: np.random.Generator) -> CameraPath:
    """Return a random pose that does not change."""
    view = Viewpoint(
        float(rng.uniform(-TURN, TURN)), float(rng.uniform(-0.1, 0.3)), float(rng.uniform(0.7, 1.2))
    )
    return [view] * count


def own(count: int, rng: np.random.Generator) -> CameraPath:
    """Return the camera's own pose; the wrist camera's moves with the hand."""
    return [Viewpoint()] * count


def _ramp(count: int, rng: np.random.Generator, reach: float) -> np.ndarray:
    """Return values from one end to another, both within the reach, at least half of it apart."""
    start = rng.uniform(-reach, reach)
    stop = start - np.sign(start) * rng.uniform(reach / 2, reach)
    return np.linspace(start, stop, count)


Shot = tuple[str, Callable[[int, np.random.Generator], CameraPath]]
STILL: dict[str, Shot] = {"orbit": (AGENT, orbit), "dolly": (AGENT, dolly), "pan": (AGENT, pan)}
"""Shots of still scenes. Name -> (camera, function of (frames, generator) that gives its path)."""

ROLLOUT: dict[str, Shot] = {
    "fixed": (AGENT, fixed),
    "orbit_motion": (AGENT, orbit),
    "agent": (AGENT, own),
    "wrist": (WRIST, own),
}
"""Shots of demonstrations."""


@dataclass(frozen=True)
class ClipSpec:
    """Clips of robosuite and LIBERO suites."""

    suites: tuple[str, ...]
    tasks: int | None = None  # the first n of each suite; None takes all
    parts: int = 2  # shards of each task
    rounds: int = 8  # scenes a shard, each recorded once with every shot
    shots: tuple[str, ...] = (*STILL, *ROLLOUT)
    frames: int = 9  # per clip; 1 + 4 k as Wan's autoencoder takes them
    frame_size: int = 128  # side of the square frames in pixels, a multiple of 16
    every: int = 3  # control steps (20 a second) from one frame of a rollout to the next
    instruction_fraction: float = 0.5  # of the clips that keep their instruction; the others' is empty
    rendering: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        known = STILL | ROLLOUT
        if not self.shots or any(shot not in known for shot in self.shots):
            raise ValueError(
                f"clips.shots: expected some of {', '.join(known)}; got {', '.join(self.shots) or 'none'}"
            )
        if self.frames % 4 != 1:
            raise ValueError(
                f"clips.frames: expected 1 + 4 k frames for Wan's autoencoder; got {self.frames}"
            )
        if self.frame_size % 16:
            raise ValueError(f"clips.frame_size: expected a multiple of 16; got {self.frame_size}")
        if not self.suites or min(self.parts, self.rounds, self.every) < 1:
            raise ValueError("clips: expected a suite, and parts, rounds and every of at least 1")


@dataclass(frozen=True)
class Clip:
    """One video clip."""

    frames: np.ndarray  # uint8 [t h w 3]
    instruction: str
    shot: str  # key of `STILL` or `ROLLOUT`
    seed: int  # of the episode


@dataclass(frozen=True)
class Job:
    """One shard of one task; `deadline` is a `time.time()`."""

    folder: Path
    suite: str
    task: int
    part: int
    spec: ClipSpec
    deadline: float | None

    @property
    def name(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.suite}-{self.task:02d}-{self.part:02d}"

    def is_done(self) -> bool:
        """Return whether the shard is complete."""
        return (self.folder / f"{self.name}.json").is_file()

    def is_late(self) -> bool:
        """Return whether the deadline is over."""
        return self.deadline is not None and time.time() >= self.deadline


def instructions(**values: Any) -> list[str]:
    """Return the instructions of the tasks of a `ClipSpec`, each once; no simulator is started."""
    spec = decode_spec(ClipSpec, values)
    listed = (task.instruction for suite in spec.suites for task in envs.tasks(suite)[: spec.tasks])
    return list(dict.fromkeys(listed))


def write_clips(folder: Path, *, processes: int, deadline: float | None = None, **values: Any) -> bool:
    """Record the missing shards of `ClipSpec(**values)` into its folder; return whether all are complete.

    Unfinished shards are left to the next call at `deadline` (`time.time()`). `processes` does not change
    what is written.

    Raises:
        ValueError: If the folder holds clips of another spec.
        RuntimeError: If a worker process died, or another process writes into the folder.
    """
    spec = decode_spec(ClipSpec, values)
    with open_run(folder, asdict(spec), option="clips.folder"):
        jobs = [
            Job(folder, suite, task.index, part, spec, deadline)
            for part in range(spec.parts)
            for suite in spec.suites
            for task in envs.tasks(suite)[: spec.tasks]
        ]
        missing = [(job,) for job in jobs if not job.is_done()]
        with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="Clips", unit="shard") as bar:
            for done in run_jobs(_record_shard, missing, processes):
                bar.update(done)
    return all(job.is_done() for job in jobs)


def _record_shard(job: Job) -> bool:
    """Record and write a shard; False if the deadline is over first."""
    spec, clips = job.spec, list[Clip]()
    if job.is_late():
        return False
    with ClipRecorder(job.suite, job.task, spec) as recorder:
        for index in range(spec.rounds):
            if job.is_late():
                return False
            seed = (spec.seed, zlib.crc32(job.suite.encode()), job.task, job.part, index)
            clips.extend(recorder.record_round(np.random.default_rng(seed)))
    _write_shard(job, clips)
    return True


def _write_shard(job: Job, clips: list[Clip]) -> None:
    rng = np.random.default_rng((job.spec.seed, zlib.crc32(job.name.encode())))
    keeps = rng.permutation(len(clips)) < job.spec.instruction_fraction * len(clips)
    path = job.folder / f"{job.name}.npy"
    with atomic_file(path) as draft, draft.open("wb") as file:
        np.save(file, np.stack([clip.frames for clip in clips]))
    described = [
        {"shot": clip.shot, "seed": clip.seed, "instruction": clip.instruction if kept else ""}
        for clip, kept in zip(clips, keeps, strict=True)
    ]
    description = {"bytes": path.stat().st_size, "suite": job.suite, "task": job.task, "clips": described}
    write_text(path.with_suffix(".json"), json.dumps(description))


class Appearance:
    """Light and colour of a scene, drawn for each round."""

    def __init__(self, env: PandaEnv) -> None:
        self._model = env.model
        self._light, self._colour = self._model.light_diffuse.copy(), self._model.mat_rgba.copy()

    def draw(self, rng: np.random.Generator) -> None:
        """Scale each light by up to a third and each material's colour by up to a quarter."""
        self._model.light_diffuse[:] = self._light * rng.uniform(0.67, 1.33, (len(self._light), 1))
        scale = rng.uniform(0.75, 1.0, (len(self._colour), 3))
        self._model.mat_rgba[:, :3] = self._colour[:, :3] * scale


class ClipRecorder:
    """Records rounds of clips of one task; a context manager.

    Raises:
        ValueError: If the suite is not one of robosuite's or LIBERO's.
    """

    def __init__(self, suite: str, task: int, spec: ClipSpec) -> None:
        self._env, self._spec = make_panda(suite, task), spec
        self._env.reset_blindly(seed=0)
        self._cameras = {
            name: PosedCamera(self._env, camera=name, frame_size=spec.frame_size, rendering=spec.rendering)
            for name in sorted({(STILL | ROLLOUT)[shot][0] for shot in spec.shots})
        }
        self._layout, self._appearance = RandomLayout(self._env, presence=0.6), Appearance(self._env)

    def __enter__(self) -> ClipRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        for camera in self._cameras.values():
            camera.close()
        self._env.close()

    def record_round(self, rng: np.random.Generator) -> Iterator[Clip]:
        """Yield a clip of every shot: of one demonstration, then of one random layout."""
        seed = int(rng.integers(DEMONSTRATION_SEEDS.start, DEMONSTRATION_SEEDS.stop))
        self._env.reset_blindly(seed=seed)
        self._appearance.draw(rng)
        for shots, moments in ((ROLLOUT, self._rollout), (STILL, self._still)):
            paths = {
                shot: shots[shot][1](self._spec.frames, rng) for shot in self._spec.shots if shot in shots
            }
            frames: dict[str, list[np.ndarray]] = {shot: [] for shot in paths}
            if not paths:
                continue
            for moment in moments(rng, seed):
                for shot, path in paths.items():
                    camera = self._cameras[shots[shot][0]]
                    frames[shot].append(camera.image(path[moment], self._layout.middle))
            for shot, recorded in frames.items():
                yield Clip(np.stack(recorded), self._env.task.instruction, shot, seed)

    def _rollout(self, rng: np.random.Generator, seed: int) -> Iterator[int]:
        """Yield the index of each frame when the simulation is at its moment."""
        actions = self._actions(rng)
        for _ in range(int(rng.integers(LEAD))):
            self._env.step_blindly(next(actions))
        for moment in range(self._spec.frames):
            yield moment
            for _ in range(self._spec.every):
                self._env.step_blindly(next(actions))

    def _actions(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the demonstrator's actions, then zeros with the last gripper command."""
        executed = np.zeros(self._env.action_size, np.float32)
        for executed, _ in demonstrate(self._env, rng=rng, noise=NOISE):
            yield executed
        rest = np.zeros_like(executed)
        rest[-1] = executed[-1]
        yield from itertools.repeat(rest)

    def _still(self, rng: np.random.Generator, seed: int) -> Iterator[int]:
        """Yield the index of each frame of a random layout; without room, of the objects as they are."""
        try:
            self._layout.draw(rng)
        except RuntimeError as error:
            logger.warning("%s, seed %d: %s; recorded as it is", self._env.task.name, seed, error)
        yield from range(self._spec.frames)
