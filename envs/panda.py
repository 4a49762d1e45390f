"""A Panda arm in a robosuite 1.4 simulation: what robosuite's own tasks and LIBERO have in common."""

from __future__ import annotations

import abc
import os
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from envs.base import ManipulationEnv, Task
from envs.rendering import CameraRig, load_mujoco, profile, quiet_import

CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}
COLLISION_GROUP = 0  # robosuite keeps collision shapes in geometry group 0 and what is to be seen in 1


class PandaEnv(ManipulationEnv):
    """A Panda under OSC_POSE control at 20 Hz with two cameras.

    The model is compiled once and an episode starts with robosuite's soft reset. Simulation steps are
    robosuite's own, without its observables, which nobody reads.

    An action is 6 pose deltas (full scale 5 cm, 0.5 rad) and the gripper (-1 open, 1 closed). The state is
    the end effector's position in metres and orientation as axis-angle, both in the world's frame, and the
    positions of the two gripper fingers: LIBERO's layout in LeRobot.
    """

    flipped: ClassVar[tuple[int, ...]] = ()  # axes along which upright pictures are flipped

    def __init__(self, task: Task, *, frame_size: int, rendering: str, render: bool) -> None:
        """Compile the model.

        Args:
            task: What is run.
            frame_size: Height and width of a frame in pixels.
            rendering: Name of a rendering profile.
            render: Whether there are cameras at all.
        """
        super().__init__(task, cameras=tuple(CAMERAS) if render else (), frame_size=frame_size)
        chosen = profile(rendering)
        self._mujoco = load_mujoco()
        self._raw = self._compile()
        self._raw.hard_reset = False  # after the first compilation, which robosuite insists on
        self._resumes = False
        self._model, self._data = self._raw.sim.model._model, self._raw.sim.data._data
        self._substeps = round(self._raw.control_timestep / self._raw.model_timestep)
        if render:
            self.camera_rig = CameraRig(
                self._model,
                self._data,
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
    def raw(self) -> Any:
        """The environment of robosuite itself, for demonstrators."""
        return self._raw

    @property
    def _gripper(self) -> Any:
        return self._raw.robots[0].gripper

    def _advance(self, action: np.ndarray) -> bool:
        raw = self._raw
        if self._resumes:  # done only when an episode goes on: most states are restored to be looked at
            raw.robots[0].controller.update(force=True)
            raw.robots[0].controller.reset_goal()
            self._resumes = False
        for substep in range(self._substeps):
            raw.sim.forward()
            raw._pre_action(action, policy_step=substep == 0)
            raw.sim.step()
        return bool(raw._check_success())

    def _refresh(self) -> None:
        # Poses lag one substep behind the joints after a step. Only kinematics is redone: a forward pass
        # would warm-start the solver anew, and a watched episode would part from an unwatched one.
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)

    def _proprioception(self) -> np.ndarray:
        robot, data = self._raw.robots[0], self._data
        position = data.site_xpos[robot.eef_site_id]
        orientation = axis_angle(data.xquat[self._hand_id])
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, orientation, fingers]).astype(np.float32)

    @property
    def _hand_id(self) -> int:
        return self._raw.sim.model.body_name2id(self._raw.robots[0].robot_model.eef_name)

    @property
    def _state_parts(self) -> int:
        """Which parts of MuJoCo's state `simulator_state` holds."""
        return self._mujoco.mjtState.mjSTATE_FULLPHYSICS

    def simulator_state(self) -> np.ndarray:
        """Return time, joint positions, joint velocities and activations, float64 [n]."""
        spec = self._state_parts
        state = np.empty(self._mujoco.mj_stateSize(self._model, spec))
        self._mujoco.mj_getState(self._model, self._data, state, spec)
        return state

    def restore(self, state: np.ndarray) -> None:
        """Put the physical state back; the controller then holds the pose it finds.

        Args:
            state: As returned by `simulator_state`.

        Raises:
            ValueError: If the state is of another model.
        """
        spec = self._state_parts
        size = self._mujoco.mj_stateSize(self._model, spec)
        if np.shape(state) != (size,):
            raise ValueError(f"a state of {self.task.name} has {size} values, got shape {np.shape(state)}")
        self._mujoco.mj_setState(self._model, self._data, np.asarray(state, np.float64), spec)
        self._refresh()
        self._resumes = True

    def close(self) -> None:
        """Free the rendering context and the simulator."""
        super().close()
        self._raw.close()


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Turn a unit quaternion [4] (w x y z) into axis times angle [3]; the angle runs over [0, 2 pi].

    The angle is not folded at pi: a hand that points down stays clear of the jump there.
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
    with quiet_import():
        import robosuite
    if chosen is not None:
        os.environ["MUJOCO_GL"] = chosen  # robosuite puts EGL in its place

    return robosuite
