"""Clips of a simulation in which cameras or the robot move: how one task's scenes are filmed.

Played shots are taken while a demonstrator works, still ones of things scattered anywhere on the table with
the arm where it came to rest. Episodes are drawn by demonstrations' seeds; an official initial state, from
which policies are evaluated, is never asked for.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import envs
from envs.base import DEMONSTRATION_SEEDS
from envs.demonstrators import demonstrate
from envs.panda import PandaEnv
from envs.scatter import Scatter
from envs.views import PosedCamera, Viewpoint, model_and_data

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
