"""Widened start poses: an episode need not begin where the factory's reset leaves the hand."""

from typing import Any

import numpy as np

from envs.demonstrators.arm import GRIP_SITE, Arm
from envs.demonstrators.rotations import Array, about_z, rotation_vector
from envs.rendering import load_mujoco

ITERATIONS = 30
DAMPING = 1e-3
MISSED_SHIFT = ((-0.04, -0.04, 0.04), (0.04, 0.04, 0.14))  # m from its centre: least and largest x, y, z
MISSED_TURN = 0.6  # rad, largest turn of the hand against its rest
START_WITHIN = (0.005, 0.05)  # m, rad: how exactly a start must be reached
FINGERS_CLOSED = (0.001, -0.001)  # m, joints of a Panda's fingers that hold nothing


class UnreachableStartError(RuntimeError):
    """The arm does not get to where an episode was to begin; the message says how near it came."""


def widen_start(raw: Any, spread: Array, rng: np.random.Generator) -> None:
    """Moves the resting hand by a uniformly drawn shift, before the first step of an episode.

    Nothing else in the scene moves.

    Args:
        raw: robosuite 1.4 environment, just reset.
        spread: largest shift [3] in x, y and upwards z (m); never downwards, where objects stand.
        rng: source of randomness.

    Raises:
        UnreachableStartError: If the arm does not get there.
    """
    shift = rng.uniform([-spread[0], -spread[1], 0.0], spread)
    arm = Arm(raw.sim)
    _put_hand(raw, arm, arm.position + shift, arm.rotation)


def start_after_a_miss(raw: Any, body: Array, rng: np.random.Generator) -> None:
    """Puts the hand where a missed grasp leaves it: closed, empty, somewhere above the object.

    Args:
        raw: robosuite 1.4 environment, just reset.
        body: position [3] of the object's centre (m).
        rng: source of randomness.

    Raises:
        UnreachableStartError: If the arm does not get there.
    """
    arm, robot = Arm(raw.sim), raw.robots[0]
    shift, turn = rng.uniform(*MISSED_SHIFT), rng.uniform(-MISSED_TURN, MISSED_TURN)
    raw.sim.data.qpos[robot._ref_gripper_joint_pos_indexes] = FINGERS_CLOSED
    robot.gripper.current_action = np.array([-1.0, 1.0])
    _put_hand(raw, arm, body + shift, about_z(turn) @ arm.rotation)


def _put_hand(raw: Any, arm: Arm, goal: Array, rotation: Array) -> None:
    """Sets the joints by damped least squares; no time passes, and the controller's goal follows the hand."""
    robot = raw.robots[0]
    for _ in range(ITERATIONS):
        _step_towards(raw.sim, arm, robot, goal, rotation)
    off = float(np.linalg.norm(goal - arm.position))
    turned = float(np.linalg.norm(rotation_vector(rotation @ arm.rotation.T)))
    if off > START_WITHIN[0] or turned > START_WITHIN[1]:
        raise UnreachableStartError(
            f"the hand was to start at {goal.round(3)}, got no nearer than {off:.3f} m and {turned:.2f} rad"
        )
    raw.sim.data.qvel[robot._ref_joint_vel_indexes] = 0.0
    raw.sim.forward()
    robot.controller.update(force=True)
    robot.controller.reset_goal()


def _step_towards(sim: Any, arm: Arm, robot: Any, goal: Array, rotation: Array) -> None:
    """One damped least-squares step of the joints towards a pose of the grip site."""
    model, data = sim.model._model, sim.data._data
    jacobian = np.zeros((6, model.nv))
    load_mujoco().mj_jacSite(model, data, jacobian[:3], jacobian[3:], sim.model.site_name2id(GRIP_SITE))
    arm_jacobian = jacobian[:, robot._ref_joint_vel_indexes]
    error = np.concatenate([goal - arm.position, rotation_vector(rotation @ arm.rotation.T)])
    damped = arm_jacobian @ arm_jacobian.T + DAMPING * np.eye(6)
    data.qpos[robot._ref_joint_pos_indexes] += arm_jacobian.T @ np.linalg.solve(damped, error)
    sim.forward()
