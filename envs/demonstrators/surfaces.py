"""Point clouds on the surfaces of simple shapes, in the frame of the shape (metres)."""

import numpy as np

from envs.demonstrators.rotations import Array

SPACING = 0.012  # closer than a finger is wide (about 0.02), so no gap between points lets a finger through


def _samples(half_length: float) -> Array:
    count = max(2, int(np.ceil(2 * half_length / SPACING)) + 1)
    return np.linspace(-half_length, half_length, count)


def box_surface(half_extents: Array) -> Array:
    """Points [n 3] on the six faces of a box centred at the origin with these half extents [3]."""
    faces = []
    for axis in range(3):
        first, second = (a for a in range(3) if a != axis)
        grid_first, grid_second = np.meshgrid(_samples(half_extents[first]), _samples(half_extents[second]))
        for side in (-1.0, 1.0):
            face = np.empty((grid_first.size, 3))
            face[:, first], face[:, second] = grid_first.ravel(), grid_second.ravel()
            face[:, axis] = side * half_extents[axis]
            faces.append(face)
    return np.concatenate(faces)


def cylinder_surface(radius: float, half_height: float, sides: int = 24) -> Array:
    """Points [n 3] on the mantle of an upright cylinder centred at the origin, both rims included."""
    angles = np.linspace(0.0, 2 * np.pi, sides, endpoint=False)
    angle, height = np.meshgrid(angles, _samples(half_height))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=-1).reshape(-1, 3)


def sphere_surface(radius: float, sides: int = 16) -> Array:
    """Points [n 3] on a sphere around the origin, on rings of equal spacing in height, poles included."""
    heights = np.linspace(-radius, radius, sides // 2 + 1)
    rings = np.sqrt(np.maximum(radius**2 - heights**2, 0.0))
    angles = np.linspace(0.0, 2 * np.pi, sides, endpoint=False)
    x, y = np.outer(rings, np.cos(angles)), np.outer(rings, np.sin(angles))
    z = np.broadcast_to(heights[:, None], x.shape)
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)
