"""The environment that every simulator family implements: tasks, observations, actions, success."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from envs.rendering import CameraRig

Observation = dict[str, Any]  # {"pixels": {camera: uint8 [h w 3]}, "agent_pos": float32 [s]}

DEMONSTRATION_SEEDS = range(0, 1_000_000)
"""Seeds of demonstrations."""

EVALUATION_SEED = 1_000_000
"""Evaluation episode i has seed EVALUATION_SEED + i, so that no demonstration is ever evaluated on."""

LAYOUTS = ("standard", "random", "partial", "fixtures")
"""How LIBERO's scenes are laid out: as its problem files say, every object anywhere in reach, or as the files
say but for a few changes, or for a fixture that moves (see `envs.layouts`)."""


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    suite: str  # under which `envs.make` finds the task
    index: int  # in its suite, from 0
    name: str  # short, usable in file names
    instruction: str
    horizon: int  # control steps after which an episode is cut
    official_states: int = 0  # number of official initial states; 0 where episodes are drawn by seed alone
    group: str = ""  # difficulty in Meta-World, else empty


class ManipulationEnv(gymnasium.Env, abc.ABC):
    """One robot, one task, cameras and proprioception; success is the simulator's own check.

    An observation is `{"pixels": {camera: uint8 [h w 3]}, "agent_pos": float32 [s]}`; the state is
    proprioception only, images are upright. Without cameras there is no "pixels" key and nothing is rendered.

    A family sets `raw` (the simulator's own environment, for demonstrators and analysis only), `_mujoco`,
    MuJoCo's `model` and `data` and, with cameras, `camera_rig`; it implements the abstract methods.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 gymnasium's own name
    render_mode: str | None = "rgb_array"
    action_size: ClassVar[int] = 7
    state_size: ClassVar[int] = 8
    robot_type: ClassVar[str] = "panda"
    # Entries of actions and state as LeRobot's robots name them; None where a dataset names none.
    action_names: ClassVar[tuple[str, ...] | None] = None
    state_names: ClassVar[tuple[str, ...] | None] = None
    noise_unit: ClassVar[float] = 1.0  # action noise of 1 in the action's units
    position_unit: ClassVar[str] = "metres"  # of the state's first three entries
    # whether `restore` also places what an episode's seed places
    states_hold_fixtures: ClassVar[bool] = False
    action_space: gymnasium.spaces.Box  # pyright: ignore[reportIncompatibleVariableOverride]
    raw: Any
    _mujoco: Any
    model: Any
    data: Any

    def __init__(self, task: Task, *, cameras: tuple[str, ...], frame_size: int) -> None:
        self.task = task
        self.task_description = task.instruction  # LeRobot reads this and the next by name
        self._max_episode_steps = task.horizon
        self.cameras = cameras
        self.frame_size = frame_size  # height and width in pixels
        self.camera_rig: CameraRig | None = None
        self._steps = 0
        self.success = False  # of the last step
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.action_size,), np.float32)
        self.observation_space = observation_space(cameras, frame_size, self.state_size)

    @abc.abstractmethod
    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        """Start an episode that depends on the seed and the options alone."""

    @abc.abstractmethod
    def _advance(self, action: np.ndarray) -> bool:
        """Simulate one control step of a checked action [a] and return the simulator's own success."""

    @abc.abstractmethod
    def _proprioception(self) -> np.ndarray:
        """Return the robot's state, float32 [s]."""

    @property
    def _state_parts(self) -> int:
        """Parts of MuJoCo's state in `simulator_state`; here with controls and the solver's warm start."""
        return self._mujoco.mjtState.mjSTATE_INTEGRATION

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that the seed decides; without one, the environment draws a seed.

        `options={"initial_state": k}` starts from official initial state k where a family has them.
        """
        self.reset_blindly(seed=seed, options=options)
        return self.observe(), {"is_success": False}

    def reset_blindly(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Start an episode as `reset` does, without rendering."""
        super().reset(seed=seed)
        options = dict(options or {})
        if "initial_state" in options and not self.task.official_states:
            raise ValueError(
                f"{self.task.name} has no official initial states (got {options['initial_state']!r}); "
                "choose its episodes by seed"
            )
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._steps, self.success = 0, False
        self._reset_simulator(seed, options)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute one action [a], clipped to `action_space` as robot controllers do, and observe.

        Returns observation, reward (1 on success, else 0), success, whether the horizon is reached, and
        `{"is_success": bool}`.

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
                f"expected {self.action_size} finite action values in {self.action_space}, "
                f"got shape {action.shape}: {action}"
            )
        self.success = self._advance(action.clip(self.action_space.low, self.action_space.high))
        self._steps += 1
        return self.success, self._steps >= self._max_episode_steps

    def holding_action(self, last: np.ndarray | None) -> np.ndarray:
        """Return the action [a] that holds still after the `last` one; None at the start of an episode.

        Here actions are displacements, and the last entry is the gripper, which opens at the start.
        """
        hold = np.zeros(self.action_size)
        hold[-1] = -1.0 if last is None else last[-1]
        return hold

    def observe(self) -> Observation:
        """Observe the present state; frames are rendered now."""
        self.refresh()
        observation: Observation = {"agent_pos": self._proprioception()}
        if self.camera_rig is not None:
            observation["pixels"] = self.camera_rig.frames()
        return observation

    def render(self) -> np.ndarray:
        """Render the first camera, uint8 [h w 3].

        Raises:
            RuntimeError: If the environment was made without cameras.
        """
        if self.camera_rig is None:
            raise RuntimeError("this environment was made with render=False; make it with render=True")
        self.refresh()
        return self.camera_rig.frame()

    def refresh(self) -> None:
        """Bring poses in line with the joints."""
        # Poses lag one substep behind the joints after a step. Only kinematics is recomputed: a forward pass
        # would change the solver's warm start, and an observed episode would differ from an unobserved one.
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_comPos(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def refresh_contacts(self) -> None:
        """Find the contacts of the present poses."""
        self._mujoco.mj_collision(self.model, self.data)

    def simulator_state(self) -> np.ndarray:
        """Return the physical state, float64 [n]; fixed bodies are placed by the episode's seed."""
        parts = self._state_parts
        state = np.empty(self._mujoco.mj_stateSize(self.model, parts))
        self._mujoco.mj_getState(self.model, self.data, state, parts)
        return state

    def restore(self, state: np.ndarray) -> None:
        """Put a `simulator_state` back; reset with the episode's seed first, which places fixed bodies.

        Raises:
            ValueError: If the state is of another model.
        """
        parts = self._state_parts
        self._check_state(state, self._mujoco.mj_stateSize(self.model, parts))
        self._mujoco.mj_setState(self.model, self.data, np.asarray(state, np.float64), parts)
        self.refresh()

    def _check_state(self, state: np.ndarray, size: int) -> None:
        if np.shape(state) != (size,):
            raise ValueError(f"a state of {self.task.name} has {size} values, got shape {np.shape(state)}")

    def close(self) -> None:
        """Free the rendering context and the simulator; closing twice is allowed."""
        if self.camera_rig is not None:
            self.camera_rig.close()
            self.camera_rig = None
        self.raw.close()


def observation_space(cameras: tuple[str, ...], frame_size: int, state_size: int) -> gymnasium.spaces.Dict:
    """Return the space of observations; without cameras it has no pixels."""
    state = gymnasium.spaces.Box(-np.inf, np.inf, (state_size,), np.float32)
    if not cameras:
        return gymnasium.spaces.Dict({"agent_pos": state})
    frame = gymnasium.spaces.Box(0, 255, (frame_size, frame_size, 3), np.uint8)
    pixels = gymnasium.spaces.Dict(dict.fromkeys(cameras, frame))
    return gymnasium.spaces.Dict({"pixels": pixels, "agent_pos": state})


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators inside the block and restore the caller's afterwards.

    robosuite 1.4 and LIBERO draw from both; there is no other way to seed them.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
