"""The hand of a Panda under robosuite's OSC_POSE controller: where it is, and how to drive it to a pose."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.rendering import load_mujoco

Array = NDArray[np.floating[Any]]


def about_x(angle: float) -> Array:
    """Rotation matrix [3 3] about the x axis by `angle` rad."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def about_z(angle: float) -> Array:
    """Rotation matrix [3 3] about the z axis by `angle` rad."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def about_axis(axis: Array, angle: float) -> Array:
    """Rotation matrix [3 3] about a unit vector [3] by `angle` rad (Rodrigues)."""
    cross = np.array([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_vector(rotation: Array) -> Array:
    """Axis times angle [3] (rad, norm in [0, pi]) of a rotation matrix [3 3]: its logarithm.

    Half turns are read from the symmetric part, where the antisymmetric part vanishes.
    """
    angle = float(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1.0, 1.0)))
    twist = np.array(
        [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    if angle < 1e-6:
        return twist / 2
    if angle < np.pi - 1e-4:
        return twist * angle / (2 * np.sin(angle))
    # rotation = 2 n n^T - 1 at a half turn: any column of (rotation + 1) is parallel to the axis n.
    outer = (rotation + np.eye(3)) / 2
    axis = outer[:, int(np.argmax(np.diag(outer)))]
    return angle * axis / np.linalg.norm(axis)


def wrap(angle: float, period: float = 2 * np.pi) -> float:
    """The equivalent of `angle` modulo `period`, in [-period/2, period/2)."""
    return float((angle + period / 2) % period - period / 2)


def nearest_equivalent(angle: float, reference: float, period: float) -> float:
    """The angle equal to `angle` modulo `period` that lies closest to `reference` (all rad).

    A cube looks the same every quarter turn (period pi/2), two fingers every half turn (period pi).
    """
    return reference + wrap(angle - reference, period)


OPEN, CLOSED = -1.0, 1.0
GRIP_SITE = "gripper0_grip_site"
TRANSLATION_PER_STEP = 0.05  # m, OSC_POSE's full scale
ROTATION_PER_STEP = 0.5  # rad, OSC_POSE's full scale
GAIN = 2.0  # the controller goes about half of each commanded delta in a control step
STALL_WINDOW, STALL_PROGRESS = 12, 0.002  # steps; m: less than this in that window is no motion
# The grip site looking straight down, its fingers closing along the world's y axis: yaw zero.
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


class Command(NamedTuple):
    """One clean action [7] in [-1, 1] and the share of action noise that it bears (0 none, 1 all)."""

    action: Array
    noise_share: float = 1.0


type Skill = Generator[Command, None, bool]
"""Yields commands while the caller steps the simulation; returns whether it got where it wanted."""


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
ALIGNING = Reach(within=0.008, noise_share=0.6)
PRECISE = Reach(within=0.005, speed=0.7, noise_share=0.3, plumb=True)
LOWERING = Reach(within=0.006, within_angle=0.1, speed=0.7, noise_share=0.3, plumb=True)


class Arm:
    """Reads the hand's pose and turns pose errors into actions."""

    def __init__(self, sim: Any) -> None:
        """Finds the Panda's grip site in `sim`, the `MjSim` of a robosuite 1.4 environment."""
        self._data = sim.data._data
        self._site = sim.model.site_name2id(GRIP_SITE)

    @property
    def position(self) -> Array:
        """Point [3] between the fingertips, in the world (m)."""
        return np.array(self._data.site_xpos[self._site])

    @property
    def rotation(self) -> Array:
        """Rotation matrix [3 3] of the grip site in the world."""
        return np.array(self._data.site_xmat[self._site]).reshape(3, 3)

    @property
    def yaw(self) -> float:
        """Angle (rad) by which the closing axis is turned from the world's y axis, seen from above."""
        closing = self.rotation[:, 0]
        return float(np.arctan2(-closing[0], closing[1]))

    def command(
        self, position: Array, rotation: Array, gripper: float, speed: float = 1.0, plumb: bool = False
    ) -> Array:
        """The action [7] that moves the hand towards a pose, proportional near it and limited far from it.

        Args:
            position: wanted grip point [3] (m, world).
            rotation: wanted rotation [3 3] of the grip site.
            gripper: OPEN or CLOSED.
            speed: largest share of full scale that any translation may take.
            plumb: limit the vertical and the horizontal part each for itself; otherwise the hand goes in a
                straight line, and a long way down leaves a small sideways error for last.
        """
        shift = GAIN * (position - self.position) / TRANSLATION_PER_STEP
        turn = GAIN * rotation_vector(rotation @ self.rotation.T) / ROTATION_PER_STEP
        parts = [shift[:2], shift[2:]] if plumb else [shift]
        limited = [_limited(part, speed) for part in parts]
        return np.concatenate([*limited, _limited(turn, 1.0), [gripper]])

    def move(self, position: ArrayLike, rotation: Array, gripper: float, reach: Reach | None = None) -> Skill:
        """Pursues a pose until it is reached (True), or time is up or the hand stalls (False)."""
        reach = reach or Reach()
        goal, distances = np.asarray(position, dtype=np.float64), []
        for _ in range(reach.steps):
            away = float(np.linalg.norm(goal - self.position))
            turn = float(np.linalg.norm(rotation_vector(rotation @ self.rotation.T)))
            if away < reach.within and turn < reach.within_angle:
                return True
            distances.append(away + 0.05 * turn)
            if reach.stalls and _stalled(distances):
                return False
            action = self.command(goal, rotation, gripper, reach.speed, reach.plumb)
            yield Command(action, reach.noise_share)
        return False

    def hold(self, position: Array, rotation: Array, gripper: float, steps: int) -> Skill:
        """Keeps a pose for some steps, such as those that the fingers need to close."""
        for _ in range(steps):
            yield Command(self.command(position, rotation, gripper), PRECISE.noise_share)
        return True


def down(yaw: float) -> Array:
    """Rotation [3 3] of a hand that looks straight down with its closing axis turned by `yaw` rad."""
    return about_z(yaw) @ DOWN


def pointing(approach: Array, closing: Array) -> Array:
    """Rotation [3 3] of a hand that points along a unit vector [3] and closes along another one."""
    return np.stack([closing, np.cross(approach, closing), approach], axis=1)


def leaning(heading: Array, pitch: float) -> Array:
    """Rotation [3 3] of a hand that leans towards a horizontal unit vector [3], closing level and across it.

    Args:
        heading: where the fingers point to when the hand lies flat.
        pitch: 0 looks straight down, pi/2 straight along the heading (rad).
    """
    approach = np.sin(pitch) * heading - np.array([0.0, 0.0, np.cos(pitch)])
    across = np.array([-heading[1], heading[0], 0.0])
    # Either sign of the closing axis is the same hand to the world; the wrist has more room at positive yaws.
    return pointing(approach, across if across[1] > 0.1 or (across[1] >= -0.1 and across[0] < 0) else -across)


def above(position: Array, height: float) -> Array:
    """The point [3] that lies `height` metres above `position`."""
    return position + np.array([0.0, 0.0, height])


def _limited(vector: Array, limit: float) -> Array:
    """`vector`, shortened without turning so that no entry exceeds `limit`."""
    largest = float(np.abs(vector).max())
    return vector if largest <= limit else vector * (limit / largest)


def _stalled(distances: list[float]) -> bool:
    if len(distances) < STALL_WINDOW + 3:
        return False
    return distances[-STALL_WINDOW - 1] - distances[-1] < STALL_PROGRESS


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
