"""Meta-World 3.0: MT10, MT50 and the four difficulty groups, with LeRobot's camera, state and words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from envs.base import ManipulationEnv, Task, global_seed
from envs.rendering import CameraRig, load_mujoco, profile, quiet_import

VERSION = "3.0.0"
HORIZON = 500
CAMERA, CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)
PREFIX = "metaworld_"
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)


def tasks(suite: str) -> list[Task]:
    """List the tasks of a suite; each belongs to a difficulty group.

    Args:
        suite: "metaworld_mt10", "metaworld_mt50", or "metaworld_" and a group: easy (28 tasks), medium (11),
            hard (6), very_hard (5).
    """
    groups = {name: group for group, names in _table()["DIFFICULTY_TO_TASKS"].items() for name in names}
    words = _table()["TASK_DESCRIPTIONS"]
    return [
        Task(suite, index, name, words[name], HORIZON, group=groups[name])
        for index, name in enumerate(_names(suite.removeprefix(PREFIX)))
    ]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> MetaworldEnv:
    """Build the environment of a task; see `envs.make`."""
    return MetaworldEnv(task, frame_size=frame_size, rendering=rendering, render=render)


class MetaworldEnv(ManipulationEnv):
    """A Meta-World task whose object and goal are drawn by the seed.

    An action is 3 deltas of the hand (full scale 1 cm) and the gripper's effort (-1 opens, 1 closes). The
    state is the hand's position in metres and how far the gripper is open, in [0, 1]. The one camera,
    `corner2`, hangs upside down: its pictures are turned by 180 degrees, as LeRobot does.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 gymnasium's own name
    action_size: ClassVar[int] = 4
    state_size: ClassVar[int] = 4
    robot_type: ClassVar[str] = "sawyer"

    def __init__(self, task: Task, *, frame_size: int, rendering: str, render: bool) -> None:
        """Compile the model.

        Args:
            task: One of this module's `tasks`.
            frame_size: Height and width of a frame in pixels.
            rendering: Name of a rendering profile.
            render: Whether there is a camera at all.
        """
        super().__init__(task, cameras=("image",) if render else (), frame_size=frame_size)
        chosen = profile(rendering)
        self._mujoco = load_mujoco()
        self._raw = _load_metaworld().env_dict.ALL_V3_ENVIRONMENTS[task.name]()
        self._raw._set_task_called, self._raw._partially_observable = True, False
        vars(self._raw).pop("sawyer_observation_space", None)  # cached with the goal clipped to zero
        self._raw._freeze_rand_vec, self._raw.seeded_rand_vec = False, True  # draw objects anew, by seed
        self._model, self._data = self._raw.model, self._raw.data
        self._model.camera(CAMERA).pos = CAMERA_POSITION
        self.privileged = np.zeros(39)
        if render:
            self.camera_rig = CameraRig(
                self._model,
                self._data,
                {"image": CAMERA},
                frame_size=frame_size,
                rendering=chosen,
                flipped=(0, 1),
            )

    @property
    def raw(self) -> Any:
        """The environment of Meta-World itself, for demonstrators."""
        return self._raw

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        if "initial_state" in options:
            raise ValueError(
                f"{self.task.name} has no official initial states (asked for {options['initial_state']!r}); "
                "choose its episodes by seed"
            )
        self._raw.seed(seed)
        with global_seed(seed):
            self.privileged, _ = self._raw.reset()

    def _advance(self, action: np.ndarray) -> bool:
        self._raw.curr_path_length = 0  # the horizon is counted here
        self.privileged, _, _, _, info = self._raw.step(action)
        return bool(info["success"])

    def _refresh(self) -> None:
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)

    def _proprioception(self) -> np.ndarray:
        return self._raw._get_curr_obs_combined_no_goal()[: self.state_size].astype(np.float32)

    @property
    def _state_parts(self) -> int:
        return self._mujoco.mjtState.mjSTATE_INTEGRATION

    def simulator_state(self) -> np.ndarray:
        """Return physics, controls and the solver's warm start, float64 [n]; fixed things are the seed's."""
        state = np.empty(self._mujoco.mj_stateSize(self._model, self._state_parts))
        self._mujoco.mj_getState(self._model, self._data, state, self._state_parts)
        return state

    def restore(self, state: np.ndarray) -> None:
        """Put the physical state back; reset with the episode's seed first, which places what is fixed.

        Args:
            state: As returned by `simulator_state`.

        Raises:
            ValueError: If the state is of another model.
        """
        size = self._mujoco.mj_stateSize(self._model, self._state_parts)
        if np.shape(state) != (size,):
            raise ValueError(f"a state of {self.task.name} has {size} values, got shape {np.shape(state)}")
        self._mujoco.mj_setState(self._model, self._data, np.asarray(state, np.float64), self._state_parts)
        self._refresh()

    def close(self) -> None:
        """Free the rendering context and the simulator."""
        super().close()
        self._raw.close()


def packaged_policy(name: str) -> Any:
    """Return Meta-World's own scripted policy of a task; it has `get_action(privileged [39]) -> [4]`."""
    with quiet_import():
        from metaworld import policies

    return vars(policies)[_table()["TASK_POLICY_MAPPING"][name]]()


def _names(kind: str) -> list[str]:
    if kind == "mt10":
        return list(MT10)
    if kind == "mt50":
        return list(_table()["TASK_NAME_TO_ID"])
    return list(_table()["DIFFICULTY_TO_TASKS"][kind])


@cache
def _table() -> dict[str, Any]:
    """LeRobot's table of Meta-World: words, groups, scripted policies; read without importing it."""
    lerobot = importlib.util.find_spec("lerobot")
    if lerobot is None or lerobot.origin is None:
        raise RuntimeError("Meta-World's tasks are listed in LeRobot, which is not installed")
    return json.loads((Path(lerobot.origin).parent / "envs" / "metaworld_config.json").read_text())


@cache
def _load_metaworld() -> Any:
    try:
        found = importlib.metadata.version("metaworld")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise RuntimeError(
            f"metaworld {VERSION} is needed for its suites, found {found}; install it with: "
            "pip install 'lerobot_policy_vega[metaworld]'"
        )
    load_mujoco()
    with quiet_import():
        import metaworld

    return metaworld
