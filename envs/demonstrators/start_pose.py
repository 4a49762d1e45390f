"""Widened start poses: an episode need not begin where the factory's reset leaves the hand."""

from typing import Any

import numpy as np

from envs.demonstrators.arm import GRIP_SITE, Arm
from envs.demonstrators.rotations import Array, rotation_vector
from envs.rendering import load_mujoco

ITERATIONS = 30
DAMPING = 1e-3


def widen_start(raw: Any, spread: Array, rng: np.random.Generator) -> None:
    """Moves the resting hand by a uniformly drawn shift, before the first step of an episode.

    The joints are set by damped least squares; nothing else in the scene moves, no time passes, and the
    controller's goal follows the hand.

    Args:
        raw: robosuite 1.4 environment, just reset.
        spread: largest shift [3] in x, y and upwards z (m); never downwards, where objects stand.
        rng: source of randomness.
    """
    shift = rng.uniform([-spread[0], -spread[1], 0.0], spread)
    arm, robot = Arm(raw.sim), raw.robots[0]
    goal, rotation = arm.position + shift, arm.rotation
    for _ in range(ITERATIONS):
        _step_towards(raw.sim, arm, robot, goal, rotation)
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
