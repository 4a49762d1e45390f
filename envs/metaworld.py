"""Meta-World 3.0: MT10, MT50 and the four difficulty groups with LeRobot's camera, state and instructions."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from envs.base import ManipulationEnv, Task, global_seed
from envs.rendering import CameraRig, check_package, load_mujoco, profile, quiet_import

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
    """List the tasks of metaworld_mt10, _mt50, _easy (28), _medium (11), _hard (6) or _very_hard (5)."""
    groups = {name: group for group, names in _table()["DIFFICULTY_TO_TASKS"].items() for name in names}
    instructions = _table()["TASK_DESCRIPTIONS"]
    return [
        Task(suite, index, name, instructions[name], HORIZON, group=groups[name])
        for index, name in enumerate(_names(suite.removeprefix(PREFIX)))
    ]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> MetaworldEnv:
    """Build the environment of a task; see `envs.make`."""
    return MetaworldEnv(task, frame_size=frame_size, rendering=rendering, render=render)


class MetaworldEnv(ManipulationEnv):
    """A Meta-World task whose object and goal are drawn by the seed.

    An action is 3 deltas of the hand (full scale 1 cm) and the gripper's effort (-1 opens, 1 closes). The
    state is the hand's position in metres and the gripper's opening in [0, 1]. The one camera, `corner2`, is
    upside down: its images are rotated by 180 degrees, as in LeRobot.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 gymnasium's own name
    action_size: ClassVar[int] = 4
    state_size: ClassVar[int] = 4
    robot_type: ClassVar[str] = "sawyer"

    def __init__(self, task: Task, *, frame_size: int, rendering: str, render: bool) -> None:
        super().__init__(task, cameras=("image",) if render else (), frame_size=frame_size)
        chosen = profile(rendering)
        self._mujoco = load_mujoco()
        self.raw = _load_metaworld().env_dict.ALL_V3_ENVIRONMENTS[task.name]()
        self.raw._set_task_called, self.raw._partially_observable = True, False
        vars(self.raw).pop("sawyer_observation_space", None)  # cached with the goal clipped to zero
        self.raw._freeze_rand_vec, self.raw.seeded_rand_vec = False, True  # the seed draws objects
        self.model, self.data = self.raw.model, self.raw.data
        self.model.camera(CAMERA).pos = CAMERA_POSITION
        self.privileged = np.zeros(39)  # Meta-World's full observation, for its scripted policies
        if render:
            self.camera_rig = CameraRig(
                self.model,
                self.data,
                {"image": CAMERA},
                frame_size=frame_size,
                rendering=chosen,
                flipped=(0, 1),
            )

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        self.raw.seed(seed)
        with global_seed(seed):
            self.privileged, _ = self.raw.reset()

    def _advance(self, action: np.ndarray) -> bool:
        self.raw.curr_path_length = 0  # the horizon is counted here
        self.privileged, _, _, _, info = self.raw.step(action)
        return bool(info["success"])

    def _proprioception(self) -> np.ndarray:
        return self.raw._get_curr_obs_combined_no_goal()[: self.state_size].astype(np.float32)


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
    """Return LeRobot's table of instructions, groups and scripted policies, without importing LeRobot."""
    lerobot = importlib.util.find_spec("lerobot")
    if lerobot is None or lerobot.origin is None:
        raise RuntimeError("Meta-World's tasks are listed in LeRobot: pip install lerobot")
    return json.loads((Path(lerobot.origin).parent / "envs" / "metaworld_config.json").read_text())


@cache
def _load_metaworld() -> Any:
    check_package("the Meta-World suites need", "metaworld", VERSION, "metaworld")
    load_mujoco()
    with quiet_import():
        import metaworld

    return metaworld
