"""The hand of a Panda under robosuite's OSC_POSE controller: pose, motions, reachability, start pose."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from envs.rendering import load_mujoco

Array = NDArray[np.floating[Any]]

OPEN, CLOSED = -1.0, 1.0
GRIP_SITE = "gripper0_grip_site"
TRANSLATION_PER_STEP = 0.05  # m, OSC_POSE's full scale
ROTATION_PER_STEP = 0.5  # rad, OSC_POSE's full scale
GAIN = 2.0  # the controller goes about half of each commanded delta in a control step
STALL_WINDOW, STALL_PROGRESS = 12, 0.002  # steps; m: less than this in that window is no motion
# The grip site pointing straight down, its fingers closing along the world's y axis: yaw zero.
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
LINKS = ("robot0_link", "robot0_right_hand", "gripper0_right_gripper")  # fingers touch what they grasp
PREDICTION_ITERATIONS = 25
DAMPING = 1e-3
JOINT_MARGIN, REACHED = 0.05, 0.01  # rad from a joint's limit; m of error of a predicted posture
POSTURE_GAIN = 0.3  # of the pull towards the first posture, which the controller's null space has too
START_ITERATIONS = 30
MISSED_SHIFT = ((-0.04, -0.04, 0.04), (0.04, 0.04, 0.14))  # m from its centre: least and largest x, y, z
MISSED_TURN = 0.6  # rad, largest turn of the hand against its rest
START_WITHIN = (0.005, 0.05)  # m, rad: how exactly a start must be reached
FINGERS_CLOSED = (0.001, -0.001)  # m, joints of a Panda's fingers that hold nothing


def about_z(angle: float) -> Array:
    """Return the rotation matrix [3 3] about the z axis by `angle` rad."""
    return Rotation.from_euler("z", angle).as_matrix()


def rotation_error(goal: Array, actual: Array) -> Array:
    """Return the rotation vector [3] (rad, norm in [0, pi]) that takes one rotation matrix to another."""
    return Rotation.from_matrix(goal @ actual.T).as_rotvec()


def wrap(angle: float, period: float = 2 * np.pi) -> float:
    """Return the equivalent of `angle` modulo `period`, in [-period/2, period/2)."""
    return float((angle + period / 2) % period - period / 2)


def nearest_equivalent(angle: float, reference: float, period: float) -> float:
    """Return the angle equal to `angle` modulo `period` that lies closest to `reference` (all rad).

    A cube looks the same every quarter turn (period pi/2), two fingers every half turn (period pi).
    """
    return reference + wrap(angle - reference, period)


class Command(NamedTuple):
    """One clean action [7] in [-1, 1] and the share of action noise that it bears (0 none, 1 all)."""

    action: Array
    noise_share: float = 1.0


type Skill = Generator[Command, None, bool]
"""Yield commands while the caller steps the simulation; returns whether it reached its goal."""


@dataclass(frozen=True)
class Reach:
    """How exactly, how fast and how long to pursue a pose."""

    within: float = 0.006  # m
    within_angle: float = 0.06  # rad
    speed: float = 1.0  # share of full scale per axis
    steps: int = 80
    noise_share: float = 1.0
    plumb: bool = False  # correct the horizontal error at full gain while the height is still far off
    stalls: bool = True  # give up when nothing moves any more (in contact, or at a joint limit)


PASSING = Reach(within=0.02, within_angle=0.1, steps=120)
CLEARING = Reach(within=0.02, within_angle=9.0)
PRECISE = Reach(within=0.005, speed=0.7, noise_share=0.3, plumb=True)
LOWERING = Reach(within=0.006, within_angle=0.1, speed=0.7, noise_share=0.3, plumb=True)


STANDOFF = 0.06  # m at most that an approaching hand keeps from its goal
ALIGNED, SLOPE = 0.004, 3.0  # m of error that keeps no distance; metres of distance for each metre beyond
TURN_ARM = 0.05  # m of error that a radian counts as
UNALIGNED_NOISE = 0.6  # share of action noise at the full standoff


class Arm:
    """Read the hand's pose and turns pose errors into actions."""

    def __init__(self, sim: Any) -> None:
        """Find the Panda's grip site in `sim`, the `MjSim` of a robosuite 1.4 environment."""
        self._data = sim.data._data
        self._site = sim.model.site_name2id(GRIP_SITE)

    @property
    def position(self) -> Array:
        """Return point [3] between the fingertips, in the world (m)."""
        return np.array(self._data.site_xpos[self._site])

    @property
    def rotation(self) -> Array:
        """Return the rotation matrix [3 3] of the grip site in the world."""
        return np.array(self._data.site_xmat[self._site]).reshape(3, 3)

    @property
    def yaw(self) -> float:
        """Angle (rad) of the closing axis from the world's y axis, seen from above."""
        closing = self.rotation[:, 0]
        return float(np.arctan2(-closing[0], closing[1]))

    def command(
        self, position: Array, rotation: Array, gripper: float, speed: float = 1.0, plumb: bool = False
    ) -> Array:
        """Return the action [7] towards a pose: proportional near it, limited far from it.

        `speed` limits each translation (share of full scale). `plumb` limits the vertical and the horizontal
        part separately; otherwise the hand goes straight, and a long way down leaves a small sideways error
        for last.
        """
        shift = GAIN * (position - self.position) / TRANSLATION_PER_STEP
        turn = GAIN * rotation_error(rotation, self.rotation) / ROTATION_PER_STEP
        parts = [shift[:2], shift[2:]] if plumb else [shift]
        limited = [_limited(part, speed) for part in parts]
        return np.concatenate([*limited, _limited(turn, 1.0), [gripper]])

    def move(self, position: ArrayLike, rotation: Array, gripper: float, reach: Reach | None = None) -> Skill:
        """Pursue a pose until it is reached (True), or time is up or the hand stalls (False)."""
        reach = reach or Reach()
        goal, distances = np.asarray(position, dtype=np.float64), []
        for _ in range(reach.steps):
            away = float(np.linalg.norm(goal - self.position))
            turn = float(np.linalg.norm(rotation_error(rotation, self.rotation)))
            if away < reach.within and turn < reach.within_angle:
                return True
            distances.append(away + TURN_ARM * turn)
            if reach.stalls and _stalled(distances):
                return False
            action = self.command(goal, rotation, gripper, reach.speed, reach.plumb)
            yield Command(action, reach.noise_share)
        return False

    def approach(
        self,
        goal: ArrayLike | Callable[[], Array],
        rotation: Array,
        gripper: float,
        reach: Reach,
        aligned: float = ALIGNED,
    ) -> Skill:
        """Pursue a pose along the hand's own axis, the closer the better it is aligned; as `move`.

        The distance kept is a continuous function of the error, and zero up to the error `aligned` (m). A
        hand that waited until it was aligned would show two actions, waiting and going, in states that look
        alike, and a policy that takes the median of them can wait for good. The third column of `rotation` [3
        3] is the hand's axis.
        """
        axis, distances = rotation[:, 2], []
        for _ in range(reach.steps):
            missing = np.asarray(goal() if callable(goal) else goal) - self.position
            turn = float(np.linalg.norm(rotation_error(rotation, self.rotation)))
            away = float(np.linalg.norm(missing))
            if away < reach.within and turn < reach.within_angle:
                return True
            distances.append(away + TURN_ARM * turn)
            if reach.stalls and _stalled(distances):
                return False
            ahead = float(missing @ axis)
            aside = missing - ahead * axis
            error = float(np.linalg.norm(aside)) + TURN_ARM * turn
            kept = min(STANDOFF, SLOPE * max(0.0, error - aligned))
            forward = max(0.0, ahead - kept) * axis
            to_position = self.position + aside
            action = self.command(to_position, rotation, gripper, reach.speed)
            action[:3] += _limited(GAIN * forward / TRANSLATION_PER_STEP, reach.speed)
            share = kept / STANDOFF
            yield Command(action, (1 - share) * reach.noise_share + share * UNALIGNED_NOISE)
        return False

    def hold(self, position: Array, rotation: Array, gripper: float, steps: int) -> Skill:
        """Keep a pose for some steps, such as those that the fingers need to close."""
        for _ in range(steps):
            yield Command(self.command(position, rotation, gripper), PRECISE.noise_share)
        return True


def held_bodies(model: Any, data: Any) -> set[int]:
    """Return the ids of the bodies that both fingers touch, by the contacts that were found last."""
    touched: dict[str, set[int]] = {"finger1": set(), "finger2": set()}
    pairs = data.contact.geom[: data.ncon].tolist()
    names = {geom: model.geom(geom).name for pair in pairs for geom in pair}
    for geom, other in [*pairs, *(pair[::-1] for pair in pairs)]:
        for finger, bodies in touched.items():
            if names[geom].startswith("gripper0_") and finger in names[geom]:
                bodies.add(int(model.geom_bodyid[other]))
    return touched["finger1"] & touched["finger2"]


def down(yaw: float) -> Array:
    """Return the rotation [3 3] of a hand that points straight down, its closing axis turned by `yaw` rad."""
    return about_z(yaw) @ DOWN


def pointing(approach: Array, closing: Array) -> Array:
    """Return the rotation [3 3] of a hand that points along one unit vector [3] and closes along another."""
    return np.stack([closing, np.cross(approach, closing), approach], axis=1)


def leaning(heading: Array, pitch: float) -> Array:
    """Return the rotation [3 3] of a hand that leans along a horizontal unit vector [3], closing across it.

    `pitch` 0 points straight down, pi/2 straight along the heading (rad).
    """
    approach = np.sin(pitch) * heading - np.array([0.0, 0.0, np.cos(pitch)])
    across = np.array([-heading[1], heading[0], 0.0])
    # Either sign of the closing axis is the same hand to the world; the wrist has more room at positive yaws.
    return pointing(approach, across if across[1] > 0.1 or (across[1] >= -0.1 and across[0] < 0) else -across)


def above(position: Array, height: float) -> Array:
    """Return the point [3] that lies `height` metres above `position`."""
    return position + np.array([0.0, 0.0, height])


def _limited(vector: Array, limit: float) -> Array:
    """`vector`, shortened without turning so that no entry exceeds `limit`."""
    largest = float(np.abs(vector).max())
    return vector if largest <= limit else vector * (limit / largest)


def _stalled(distances: list[float]) -> bool:
    if len(distances) < STALL_WINDOW + 3:
        return False
    return distances[-STALL_WINDOW - 1] - distances[-1] < STALL_PROGRESS


class ArmClearance:
    """Predict the arm's posture at a pose of the hand on a copy of the simulation; nothing moves in it."""

    def __init__(self, sim: Any, robot: Any) -> None:
        """Take the arm's posture now for the one that the controller prefers.

        `sim` is the `MjSim` of a robosuite 1.4 environment that has just been reset.
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
        """Return the bodies that the arm without its fingers would touch with the grip site at a pose."""
        scratch = self._scratch
        scratch.qpos[:] = self._live.qpos
        for _ in range(PREDICTION_ITERATIONS):
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

    def reaches(self, position: Array, rotation: Array) -> bool:
        """Return whether the arm gets the grip site to a pose without bending a joint to its limit."""
        scratch = self._scratch
        scratch.qpos[:] = self._live.qpos
        low, high = self._model.jnt_range[self._model.dof_jntid[self._speeds]].T
        for _ in range(PREDICTION_ITERATIONS):
            self._step_towards(position, rotation)
            bent = scratch.qpos[self._joints]
            scratch.qpos[self._joints] = np.clip(bent, low + JOINT_MARGIN, high - JOINT_MARGIN)
        self._mujoco.mj_kinematics(self._model, scratch)
        return bool(np.linalg.norm(position - scratch.site_xpos[self._site]) < REACHED)

    def _step_towards(self, position: Array, rotation: Array) -> None:
        """One damped least-squares step, with the preferred posture as the second aim."""
        scratch = self._scratch
        self._mujoco.mj_kinematics(self._model, scratch)
        self._mujoco.mj_comPos(self._model, scratch)
        jacobian = np.zeros((6, self._model.nv))
        self._mujoco.mj_jacSite(self._model, scratch, jacobian[:3], jacobian[3:], self._site)
        jacobian = jacobian[:, self._speeds]
        hand = scratch.site_xmat[self._site].reshape(3, 3)
        error = np.concatenate([position - scratch.site_xpos[self._site], rotation_error(rotation, hand)])
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + DAMPING * np.eye(6))
        drift = POSTURE_GAIN * (self._preferred - scratch.qpos[self._joints])
        free = np.eye(len(self._joints)) - inverse @ jacobian
        scratch.qpos[self._joints] += inverse @ error + free @ drift


class UnreachableStartError(RuntimeError):
    """The arm does not reach the start of an episode; the message holds the remaining error."""


def widen_start(raw: Any, spread: Array, rng: np.random.Generator) -> None:
    """Move the resting hand by a uniformly drawn shift, before the first step; nothing else moves.

    `spread` is the largest shift [3] in x, y (both ways) and upwards z (m). UnreachableStartError if the arm
    does not get there.
    """
    shift = rng.uniform([-spread[0], -spread[1], 0.0], spread)
    arm = Arm(raw.sim)
    _put_hand(raw, arm, arm.position + shift, arm.rotation)


def start_after_a_miss(raw: Any, body: Array, rng: np.random.Generator) -> None:
    """Put the hand where a missed grasp leaves it: closed, empty, above the object centre `body` [3].

    Raises:
        UnreachableStartError: The arm does not get there.
    """
    arm, robot = Arm(raw.sim), raw.robots[0]
    shift, turn = rng.uniform(*MISSED_SHIFT), rng.uniform(-MISSED_TURN, MISSED_TURN)
    raw.sim.data.qpos[robot._ref_gripper_joint_pos_indexes] = FINGERS_CLOSED
    robot.gripper.current_action = np.array([-1.0, 1.0])
    _put_hand(raw, arm, body + shift, about_z(turn) @ arm.rotation)


def _put_hand(raw: Any, arm: Arm, goal: Array, rotation: Array) -> None:
    """Set the joints by damped least squares; no time passes, and the controller's goal follows the hand."""
    robot = raw.robots[0]
    for _ in range(START_ITERATIONS):
        _step_joints(raw.sim, arm, robot, goal, rotation)
    off = float(np.linalg.norm(goal - arm.position))
    turned = float(np.linalg.norm(rotation_error(rotation, arm.rotation)))
    if off > START_WITHIN[0] or turned > START_WITHIN[1]:
        raise UnreachableStartError(
            f"expected a start at {goal.round(3)}, got no nearer than {off:.3f} m and {turned:.2f} rad"
        )
    raw.sim.data.qvel[robot._ref_joint_vel_indexes] = 0.0
    raw.sim.forward()
    robot.controller.update(force=True)
    robot.controller.reset_goal()


def _step_joints(sim: Any, arm: Arm, robot: Any, goal: Array, rotation: Array) -> None:
    """One damped least-squares step of the joints towards a pose of the grip site."""
    model, data = sim.model._model, sim.data._data
    jacobian = np.zeros((6, model.nv))
    load_mujoco().mj_jacSite(model, data, jacobian[:3], jacobian[3:], sim.model.site_name2id(GRIP_SITE))
    arm_jacobian = jacobian[:, robot._ref_joint_vel_indexes]
    error = np.concatenate([goal - arm.position, rotation_error(rotation, arm.rotation)])
    damped = arm_jacobian @ arm_jacobian.T + DAMPING * np.eye(6)
    data.qpos[robot._ref_joint_pos_indexes] += arm_jacobian.T @ np.linalg.solve(damped, error)
    sim.forward()
