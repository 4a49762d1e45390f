"""What a recording asks of a demonstration besides its task."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.demos.planner_arm import GRIP_SITE, Arm, Array, about_z, rotation_vector
from envs.rendering import load_mujoco


@dataclass(frozen=True)
class DemonstrationOptions:
    """Options of `demonstrate`; the defaults give a plain recording to the end of the task.

    Attributes:
        noise_correlation: of the action noise between two control steps, in [0, 1).
        start_spread: largest shift of the hand's start in x, y (both ways) and upwards z (m).
        detour: largest error of the first approach, in metres of x and y and in radians of yaw. The hand
            first goes to a wrong place above the object, then corrects itself: recordings show corrections
            while every action stays the demonstrator's own. Lift and LiftWide only; others refuse it.
        missed_fraction: share of the episodes, in [0, 1], that begin as if a grasp had just missed: the hand
            closed, empty, 4 to 14 cm above the object's centre, up to 4 cm aside in x and in y, turned by
            up to 0.6 rad. Recordings then show how to try again, and no miss itself; `start_spread` does not
            apply to them. Lift and LiftWide only; others refuse it.
        follow_through: go on until the hand has let go and retreated; False ends at the first success.
    """

    noise_correlation: float = 0.9
    start_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    detour: tuple[float, float] = (0.0, 0.0)
    missed_fraction: float = 0.0
    follow_through: bool = True

    def __post_init__(self) -> None:
        """Refuses what is negative or more than the arm can follow.

        Raises:
            ValueError: a spread outside [0, 0.3] m, a detour outside [0, 0.1] m or [0, 1] rad, or a share
                outside [0, 1].
        """
        share = self.missed_fraction
        if not (isinstance(share, int | float) and not isinstance(share, bool) and 0.0 <= share <= 1.0):
            raise ValueError(
                f"missed_fraction is a share of the episodes: expected a number in [0, 1], got {share!r}"
            )
        if not (0.0 <= self.detour[0] <= 0.1 and 0.0 <= self.detour[1] <= 1.0):
            raise ValueError(f"detour: expected up to 0.1 m and up to 1 rad, got {self.detour}")
        if not all(0.0 <= spread <= 0.3 for spread in self.start_spread):
            raise ValueError(
                f"start_spread is a distance per axis: expected [0, 0.3] m, got {self.start_spread}"
            )


ROTATION_SHARE = 0.3  # a turn of the hand moves the fingers through clutter sooner than a shift of it


class OrnsteinUhlenbeck:
    """A mean-reverting walk over the six pose entries of an action, in units of their full scale."""

    def __init__(self, scale: float, correlation: float, rng: np.random.Generator) -> None:
        """Draws the first value from the stationary distribution.

        Args:
            scale: stationary standard deviation of the three translations, in [0, 1].
            correlation: between one control step and the next, in [0, 1).
            rng: source of randomness; owned by the caller.

        Raises:
            ValueError: `scale` or `correlation` outside its range.
        """
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"action noise is a share of full scale: expected [0, 1], got {scale}")
        if not 0.0 <= correlation < 1.0:
            raise ValueError(f"noise correlation: expected [0, 1), got {correlation}")
        self._scales = scale * np.array([1.0, 1.0, 1.0, ROTATION_SHARE, ROTATION_SHARE, ROTATION_SHARE])
        self._correlation = correlation
        self._rng = rng
        self._value = self._scales * rng.standard_normal(6)

    def step(self) -> Array:
        """The next value [6] of the walk; its standard deviation does not change over time."""
        fresh = np.sqrt(1.0 - self._correlation**2) * self._rng.standard_normal(6)
        self._value = self._correlation * self._value + self._scales * fresh
        return self._value


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
