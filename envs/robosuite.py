"""robosuite's tasks with a Panda arm, OSC_POSE control at 20 Hz, and two cameras."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from envs.base import ManipulationEnv, Task, global_seed
from envs.rendering import CameraRig, load_mujoco, profile, quiet_import

CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}
COLLISION_GROUP = 0  # robosuite keeps collision shapes in geometry group 0 and visible ones in 1


class PandaEnv(ManipulationEnv):
    """A Panda under OSC_POSE control at 20 Hz with two cameras.

    The model is compiled once and an episode starts with robosuite's soft reset. Simulation steps are bitwise
    robosuite's own, without its unused observables and without computing the same kinematics three times.

    An action is 6 pose deltas (full scale 5 cm, 0.5 rad) and the gripper (-1 open, 1 closed). The state is
    the end effector's position in metres and orientation as axis-angle, both in the world's frame, and the
    positions of the two gripper fingers: LIBERO's layout in LeRobot.
    """

    flipped: ClassVar[tuple[int, ...]] = ()  # axes along which upright images are flipped

    def __init__(self, task: Task, *, frame_size: int, rendering: str, render: bool) -> None:
        super().__init__(task, cameras=tuple(CAMERAS) if render else (), frame_size=frame_size)
        chosen = profile(rendering)
        self._mujoco = load_mujoco()
        self.raw = self._compile()
        self.raw.hard_reset = False  # after the first compilation, which robosuite insists on
        self._resumes = False  # whether the controller's goal is stale, after `restore`
        self.model, self.data = self.raw.sim.model._model, self.raw.sim.data._data
        self._substeps = round(self.raw.control_timestep / self.raw.model_timestep)
        if render:
            self.camera_rig = CameraRig(
                self.model,
                self.data,
                CAMERAS,
                frame_size=frame_size,
                rendering=chosen,
                hidden_groups=(COLLISION_GROUP,),
                flipped=self.flipped,
            )

    @abc.abstractmethod
    def _compile(self) -> Any:
        """Build robosuite's environment, without renderer."""

    @property
    def _gripper(self) -> Any:
        return self.raw.robots[0].gripper

    def _advance(self, action: np.ndarray) -> bool:
        raw = self.raw
        if self._resumes:  # only when an episode continues: most states are restored to be rendered
            raw.robots[0].controller.update(force=True)
            raw.robots[0].controller.reset_goal()
            self._resumes = False
        with self._solving_again():
            for substep in range(self._substeps):
                self._mujoco.mj_forward(self.model, self.data)
                raw._pre_action(action, policy_step=substep == 0)
                self._mujoco.mj_step2(self.model, self.data)
        return bool(raw._check_success())

    @contextmanager
    def _solving_again(self) -> Iterator[None]:
        """Have the controller's own forward pass start behind kinematics and contacts, which are up to date.

        The solver has to run again: its result is the warm start of the step's.
        """
        mujoco, sim = self._mujoco, self.raw.sim
        sim.forward = partial(mujoco.mj_forwardSkip, self.model, self.data, mujoco.mjtStage.mjSTAGE_VEL, 0)
        try:
            yield
        finally:
            del sim.forward

    def _proprioception(self) -> np.ndarray:
        robot, data = self.raw.robots[0], self.data
        position = data.site_xpos[robot.eef_site_id]
        hand = self.raw.sim.model.body_name2id(robot.robot_model.eef_name)
        orientation = axis_angle(data.xquat[hand])
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, orientation, fingers]).astype(np.float32)

    @property
    def _state_parts(self) -> int:
        """Time, joint positions, joint velocities and activations."""
        return self._mujoco.mjtState.mjSTATE_FULLPHYSICS

    def restore(self, state: np.ndarray) -> None:
        """Put the physical state back; the controller then holds the pose it finds."""
        super().restore(state)
        self._resumes = True


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Return axis times angle [3] of a unit quaternion [4] (w x y z); the angle runs over [0, 2 pi].

    The angle is not folded at pi as in scipy's `Rotation`: a hand that points down is near that jump. LeRobot
    has this convention for LIBERO.
    """
    w = float(np.clip(quaternion[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-10:
        return np.zeros(3)
    return np.asarray(quaternion[1:]) / sine * (2.0 * np.arccos(w))


@cache
def load_robosuite() -> ModuleType:
    """Import robosuite without its warnings about macro files.

    Raises:
        RuntimeError: If it cannot run here (see `envs.rendering.load_mujoco`).
    """
    load_mujoco()
    chosen = os.environ.get("MUJOCO_GL")
    try:
        with quiet_import():
            import robosuite
    except AssertionError as error:  # it compares two variables when it is imported
        raise RuntimeError(
            f"robosuite: {error}; got MUJOCO_EGL_DEVICE_ID={os.environ.get('MUJOCO_EGL_DEVICE_ID')!r} and "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}. Leave the first one out."
        ) from error
    if chosen is not None:
        os.environ["MUJOCO_GL"] = chosen  # robosuite's import sets it to EGL

    return robosuite


COMPILE_SEED = 0  # Lift draws its cube's edge (40 to 44 mm) when it is compiled: one cube for all episodes


@dataclass(frozen=True)
class RobosuiteTask:
    """One entry of the table of tasks."""

    environment: str  # robosuite's environment class
    instruction: str
    horizon: int  # about twice what the demonstrator needs
    cube_range: float | None = None  # m; half-width of the square in which the cube starts, with any yaw


TASKS = {
    "lift": RobosuiteTask("Lift", "lift the red cube", 100),
    "lift_wide": RobosuiteTask("Lift", "lift the red cube", 100, cube_range=0.10),
    "stack": RobosuiteTask("Stack", "stack the red cube on the green cube", 160),
    "pick_place_can": RobosuiteTask("PickPlaceCan", "put the can into its bin", 320),
    "nut_assembly_square": RobosuiteTask("NutAssemblySquare", "put the square nut on the square peg", 360),
}


def tasks(suite: str) -> list[Task]:
    """List the tasks of suite "robosuite", or of a suite of one named after its task."""
    names = list(TASKS) if suite == "robosuite" else [suite]
    return [
        Task(suite, index, name, TASKS[name].instruction, TASKS[name].horizon)
        for index, name in enumerate(names)
    ]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> RobosuiteEnv:
    """Build the environment of a task; see `envs.make`."""
    return RobosuiteEnv(task, frame_size=frame_size, rendering=rendering, render=render)


class RobosuiteEnv(PandaEnv):
    """A robosuite task whose episodes depend on their seed alone.

    A soft reset takes 1 ms instead of 300 ms; the gripper's command, which it keeps, is cleared here.
    """

    def _compile(self) -> Any:
        entry, robosuite = TASKS[self.task.name], load_robosuite()
        options = {}
        if entry.cube_range is not None:
            options["placement_initializer"] = _cube_placement(entry.cube_range)
        with global_seed(COMPILE_SEED):
            return robosuite.make(
                entry.environment,
                robots="Panda",
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                control_freq=20,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=False,
                ignore_done=True,
                **options,
            )

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        self._gripper.current_action = np.zeros_like(self._gripper.current_action)
        with global_seed(seed):
            self.raw.reset()
        self._resumes = False


def _cube_placement(half_width: float) -> Any:
    from robosuite.utils.placement_samplers import UniformRandomSampler

    return UniformRandomSampler(
        name="ObjectSampler",
        x_range=(-half_width, half_width),
        y_range=(-half_width, half_width),
        rotation=None,  # any yaw
        ensure_object_boundary_in_range=False,
        ensure_valid_placement=True,
        reference_pos=(0.0, 0.0, 0.8),  # the table's centre in Lift
        z_offset=0.01,
    )
