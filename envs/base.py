"""The environment that every simulator family satisfies: what to run, what is observed, what is success."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from envs.rendering import CameraRig

Observation = dict[str, Any]  # {"pixels": {name: uint8 [h w 3]}, "agent_pos": float32 [s]}

DEMONSTRATION_SEEDS = range(0, 1_000_000)
"""Seeds of the episodes that demonstrators play."""

EVALUATION_SEED = 1_000_000
"""Evaluation episode i has seed EVALUATION_SEED + i, so that no demonstration is ever evaluated on."""


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        suite: Name under which `envs.make` finds the task.
        index: Position of the task in its suite, from 0.
        name: Short name, usable in file names.
        instruction: What a person would say to the robot.
        horizon: Steps of control after which an episode is cut.
        official_states: Number of official initial states from which the task is evaluated; 0 where episodes
            are drawn by seed alone.
        group: Group of the task where a suite has some (Meta-World's difficulty), else empty.
    """

    suite: str
    index: int
    name: str
    instruction: str
    horizon: int
    official_states: int = 0
    group: str = ""


class ManipulationEnv(gymnasium.Env, abc.ABC):
    """One robot, one task, cameras and proprioception; success is the simulator's own check.

    An observation is `{"pixels": {camera: uint8 [h w 3]}, "agent_pos": float32 [s]}`. The state is
    proprioception only. Images are upright for a person. Without cameras there is no "pixels" key and nothing
    is ever rendered.

    Families implement `_reset_simulator`, `_advance`, `_refresh`, `_proprioception`, `simulator_state` and
    `restore`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 gymnasium's own name
    render_mode: str | None = "rgb_array"
    action_size: ClassVar[int] = 7
    state_size: ClassVar[int] = 8
    robot_type: ClassVar[str] = "panda"

    def __init__(self, task: Task, *, cameras: tuple[str, ...], frame_size: int) -> None:
        """Set up the spaces.

        Args:
            task: What is run.
            cameras: Names of the cameras in an observation; empty for an environment that never renders.
            frame_size: Height and width of a frame in pixels.
        """
        self.task = task
        self.task_description = task.instruction
        self._max_episode_steps = task.horizon
        self.cameras = cameras
        self.frame_size = frame_size
        self.camera_rig: CameraRig | None = None
        self._steps = 0
        self.success = False  # of the last step
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.action_size,), np.float32)
        self.observation_space = observation_space(cameras, frame_size, self.state_size)

    @property
    @abc.abstractmethod
    def raw(self) -> Any:
        """The simulator's own environment, for demonstrators; nothing of it may reach a policy."""

    @abc.abstractmethod
    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        """Start an episode that depends on the seed and the options alone."""

    @abc.abstractmethod
    def _advance(self, action: np.ndarray) -> bool:
        """Simulate one control step of a checked action [a] and return the simulator's own success."""

    @abc.abstractmethod
    def _refresh(self) -> None:
        """Bring poses in line with the joints, without touching anything that later steps depend on."""

    @abc.abstractmethod
    def _proprioception(self) -> np.ndarray:
        """Return what the robot feels of itself, float32 [s]."""

    @abc.abstractmethod
    def simulator_state(self) -> np.ndarray:
        """Return the whole physical state, float64 [n]."""

    @abc.abstractmethod
    def restore(self, state: np.ndarray) -> None:
        """Put the physical state back, as `simulator_state` returned it."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Decides the whole episode; drawn from the environment's own generator if not given.
            options: `initial_state` (int) picks an official initial state where a family has them.

        Returns:
            The first observation and `{"is_success": False}`.
        """
        self.reset_blindly(seed=seed, options=options)
        return self.observe(), {"is_success": False}

    def reset_blindly(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Start an episode as `reset` does, without rendering."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._steps, self.success = 0, False
        self._reset_simulator(seed, dict(options or {}))

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute one action and observe.

        Args:
            action: [a]; values outside [-1, 1] are clipped, as the robot's controller does.

        Returns:
            Observation, reward (1 on success, else 0), success, cut by the horizon, `{"is_success": bool}`.

        Raises:
            ValueError: If the action has another shape or is not finite.
        """
        success, truncated = self.step_blindly(action)
        return self.observe(), float(success), success, truncated, {"is_success": success}

    def step_blindly(self, action: np.ndarray) -> tuple[bool, bool]:
        """Execute one action without rendering; return success and whether the horizon is reached."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self.action_size,) or not np.isfinite(action).all():
            raise ValueError(
                f"expected {self.action_size} finite action values in [-1, 1], "
                f"got shape {action.shape}: {action}"
            )
        self.success = self._advance(action.clip(-1.0, 1.0))
        self._steps += 1
        return self.success, self._steps >= self._max_episode_steps

    def observe(self) -> Observation:
        """Observe the present moment; frames are rendered now."""
        self._refresh()
        observation: Observation = {"agent_pos": self._proprioception()}
        if self.camera_rig is not None:
            observation["pixels"] = self.camera_rig.frames()
        return observation

    def render(self) -> np.ndarray:
        """Return what the first camera sees, uint8 [h w 3].

        Raises:
            RuntimeError: If the environment was made without cameras.
        """
        if self.camera_rig is None:
            raise RuntimeError(
                "this environment was made with render=False; make it with render=True to see frames"
            )
        self._refresh()
        return self.camera_rig.frame()

    def close(self) -> None:
        """Free the rendering context and the simulator; closing twice is allowed."""
        if self.camera_rig is not None:
            self.camera_rig.close()
            self.camera_rig = None


def observation_space(cameras: tuple[str, ...], frame_size: int, state_size: int) -> gymnasium.spaces.Dict:
    """Return the space of observations with these cameras (none: no pixels) and this many state values."""
    state = gymnasium.spaces.Box(-np.inf, np.inf, (state_size,), np.float32)
    if not cameras:
        return gymnasium.spaces.Dict({"agent_pos": state})
    frame = gymnasium.spaces.Box(0, 255, (frame_size, frame_size, 3), np.uint8)
    pixels = gymnasium.spaces.Dict(dict.fromkeys(cameras, frame))
    return gymnasium.spaces.Dict({"pixels": pixels, "agent_pos": state})


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators inside the block and leave the caller's untouched.

    robosuite 1.4 and LIBERO draw from both; there is no other way to seed them.

    Args:
        seed: Any integer; taken modulo 2**32.
    """
    import random

    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
