"""Where the arm itself would be when its hand is at a pose, and whether it would touch anything there."""

from typing import Any

import numpy as np

from envs.demonstrators.arm import GRIP_SITE
from envs.demonstrators.rotations import Array, rotation_vector
from envs.rendering import load_mujoco

LINKS = ("robot0_link", "robot0_right_hand", "gripper0_right_gripper")  # fingers touch what they grasp
ITERATIONS = 25
DAMPING = 1e-3
POSTURE_GAIN = 0.3  # of the pull towards the first posture, which the controller's null space has too


class ArmClearance:
    """Predicts the arm's posture at a pose of the hand on a copy of the simulation; nothing moves in it."""

    def __init__(self, sim: Any, robot: Any) -> None:
        """Takes the arm's posture now for the one that the controller prefers.

        Args:
            sim: `MjSim` of a robosuite 1.4 environment that has just been reset.
            robot: its robot.
        """
        self._mujoco = load_mujoco()
        self._model, self._live = sim.model._model, sim.data._data
        self._scratch = self._mujoco.MjData(self._model)
        self._site = sim.model.site_name2id(GRIP_SITE)
        self._joints = list(robot._ref_joint_pos_indexes)
        self._speeds = list(robot._ref_joint_vel_indexes)
        self._preferred = np.array(self._live.qpos[self._joints])
        self._owners = [self._model.body(body).name for body in self._model.geom_bodyid]

    def touched(self, position: Array, rotation: Array) -> set[str]:
        """Names of the bodies that the arm, without its fingers, would touch with its hand at a pose.

        Args:
            position: of the grip point [3] (m, world).
            rotation: of the grip site [3 3].
        """
        scratch = self._scratch
        scratch.qpos[:] = self._live.qpos
        for _ in range(ITERATIONS):
            self._step_towards(position, rotation)
        self._mujoco.mj_kinematics(self._model, scratch)
        self._mujoco.mj_collision(self._model, scratch)
        pairs = (
            (self._owners[first], self._owners[second])
            for first, second in scratch.contact.geom[: scratch.ncon]
        )
        return {
            other
            for pair in pairs
            for own, other in (pair, pair[::-1])
            if own.startswith(LINKS) and not other.startswith(("robot0", "gripper0", "mount0"))
        }

    def _step_towards(self, position: Array, rotation: Array) -> None:
        """One damped least-squares step, with the preferred posture as the second aim."""
        scratch = self._scratch
        self._mujoco.mj_kinematics(self._model, scratch)
        self._mujoco.mj_comPos(self._model, scratch)
        jacobian = np.zeros((6, self._model.nv))
        self._mujoco.mj_jacSite(self._model, scratch, jacobian[:3], jacobian[3:], self._site)
        jacobian = jacobian[:, self._speeds]
        hand = scratch.site_xmat[self._site].reshape(3, 3)
        error = np.concatenate([position - scratch.site_xpos[self._site], rotation_vector(rotation @ hand.T)])
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + DAMPING * np.eye(6))
        drift = POSTURE_GAIN * (self._preferred - scratch.qpos[self._joints])
        free = np.eye(len(self._joints)) - inverse @ jacobian
        scratch.qpos[self._joints] += inverse @ error + free @ drift
