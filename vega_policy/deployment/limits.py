"""What a robot may be commanded: limits of each joint, from a config or measured on a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class JointLimits:
    """What may be commanded to one entry of the robot's action, in that entry's own unit u.

    For a robot that takes absolute positions these are positions, speeds and accelerations. For one that
    takes displacements a step, `low` and `high` bound the speed, `speed` the acceleration.

    Attributes:
        name: Key of the action, such as `shoulder_pan.pos`.
        low: Smallest command.
        high: Largest command.
        speed: Largest change of the command, u/s.
        acceleration: Largest change of that change, u/s^2.
        jump: A command farther than this from where the robot was sent, and from what was last wanted, is
            refused, not approached.
        rest: The command that lets the robot stand still (0 for displacements); None: stay where it is.
        start: Command taken as given before the first one; None takes `rest`, else the measured position.
    """

    name: str
    low: float
    high: float
    speed: float = math.inf
    acceleration: float = math.inf
    jump: float = math.inf
    rest: float | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that nothing can keep.

        Raises:
            ValueError: If a bound is not finite, a limit not positive, or rest or start out of bounds.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"limits of {self.name}: expected finite low < high, got {self.low} and {self.high}"
            )
        for field in ("speed", "acceleration", "jump"):
            if not vars(self)[field] > 0:
                raise ValueError(f"limits of {self.name}: {field} must be positive, got {vars(self)[field]}")
        for field in ("rest", "start"):
            value = vars(self)[field]
            if value is not None and not self.low <= value <= self.high:
                raise ValueError(
                    f"limits of {self.name}: {field} must lie in [{self.low}, {self.high}], got {value}"
                )


@dataclass(frozen=True)
class Workspace:
    """A box that the hand may not leave, for robots whose action moves the hand by a displacement a step.

    Robots that take absolute hand positions need none: their `JointLimits` are the box. For joint commands it
    would take the arm's kinematics, which this package does not know.

    Attributes:
        low: Smallest x, y, z of the hand in metres.
        high: Largest x, y, z in metres.
        position: Observation keys of the hand's x, y, z in metres.
        action: Action keys that move it along x, y, z.
        metres_per_unit: How far a command of 1 moves the hand.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    position: tuple[str, str, str]
    action: tuple[str, str, str]
    metres_per_unit: float

    def __post_init__(self) -> None:
        """Refuse an empty box.

        Raises:
            ValueError: If low is not below high, or the scale is not positive.
        """
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"workspace: expected low < high in x, y, z; got {self.low} and {self.high}")
        if not self.metres_per_unit > 0:
            raise ValueError(f"workspace: metres_per_unit must be positive, got {self.metres_per_unit}")


def read_limits(joints: Mapping[str, Mapping[str, Any]]) -> tuple[JointLimits, ...]:
    """Read limits from a config, by joint name; a value of null means no such limit.

    Raises:
        ValueError: If a field is unknown or missing, or a limit is impossible.
    """
    known = {field.name for field in fields(JointLimits)} - {"name"}
    limits = []
    for name, values in joints.items():
        unknown, missing = sorted(set(values) - known), sorted({"low", "high"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"limits of {name}: unknown fields {unknown}, missing fields {missing}; there are "
                f"{sorted(known)}"
            )
        given = {key: float(value) for key, value in values.items() if value is not None}
        limits.append(JointLimits(name, **given))
    return tuple(limits)


def limits_from_episodes(
    names: Sequence[str],
    episodes: Sequence[np.ndarray],
    *,
    fps: float,
    percentile: float = 99.9,
    margin: float = 0.25,
    rest: float | None = None,
) -> tuple[JointLimits, ...]:
    """Measure limits on demonstrations: what was done there, and a margin more.

    Args:
        names: Action keys, in the order of the columns.
        episodes: Actions of each episode, [t a], in the robot's units.
        fps: Control steps a second.
        percentile: Share of the demonstrated values that must lie inside, in percent; the rest is outliers.
        margin: How far beyond, as a share of the range, speed, acceleration or jump.
        rest: See `JointLimits.rest`, for all joints.

    Raises:
        ValueError: If there are fewer than three steps in every episode, or the columns do not match.
    """
    long_enough = [np.asarray(episode, np.float64) for episode in episodes if len(episode) >= 3]
    if not long_enough or any(episode.shape[1] != len(names) for episode in long_enough):
        shapes = sorted({np.shape(episode) for episode in episodes})[:3]
        raise ValueError(
            f"expected episodes of at least 3 steps with {len(names)} actions {list(names)}, got {shapes}"
        )
    values = np.concatenate(long_enough)
    steps = np.abs(np.concatenate([np.diff(episode, axis=0) for episode in long_enough]))
    bends = np.abs(np.concatenate([np.diff(episode, n=2, axis=0) for episode in long_enough]))
    low, high = np.percentile(values, [100 - percentile, percentile], axis=0)
    room = margin * np.maximum(high - low, 1e-6)
    largest_step = np.percentile(steps, percentile, axis=0) * (1 + margin)
    largest_bend = np.percentile(bends, percentile, axis=0) * (1 + margin)
    return tuple(
        JointLimits(
            name,
            low=float(low[joint] - room[joint]),
            high=float(high[joint] + room[joint]),
            speed=max(float(largest_step[joint]) * fps, 1e-6),
            acceleration=max(float(largest_bend[joint]) * fps**2, 1e-6),
            jump=max(2 * float(largest_step[joint]), 1e-6),
            rest=rest,
        )
        for joint, name in enumerate(names)
    )


def braking_speed(room: np.ndarray, acceleration: np.ndarray, dt: float) -> np.ndarray:
    """Largest speed [a] from which a joint comes to rest within some room.

    Braking from v at rate a needs v^2 / 2a. A step at v leaves d - v dt of the room d, so v is at most the
    root of v^2 / 2a + v dt = d; without a limit of a, it is d / dt.

    Args:
        room: Distance d [a] to where it must rest, at least 0.
        acceleration: Largest rate of braking [a], which may be infinite.
        dt: Seconds of the step.
    """
    with np.errstate(invalid="ignore"):
        braked = 2 * room / (np.sqrt(dt**2 + 2 * room / acceleration) + dt)
    return np.where(np.isinf(acceleration), room / dt, braked)
