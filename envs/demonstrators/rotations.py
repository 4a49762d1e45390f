"""Rotations of the hand: pure functions on 3x3 matrices and angles in radians."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
