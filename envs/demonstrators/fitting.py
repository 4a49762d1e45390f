"""Where a held thing fits: pure geometry on footprints, in the plane of the table."""

import numpy as np

from envs.demonstrators.grasping import COMFORTABLE_REACH, closing_axis, side_axis
from envs.demonstrators.rotations import Array, about_z

TURNS = np.deg2rad(np.arange(-180.0, 180.0, 5.0))
COMFORTABLE_YAW = np.deg2rad(95.0)
ENOUGH = 0.06  # m of free space around a thing; more is no better
MARGIN = 0.015  # m of play that a thing should have in its compartment
SPREAD = 0.7  # share of a region's half extents over which shared spots are spread


def fitting_turn(footprint: Array, room: Array, yaw: float) -> float:
    """The smallest turn (rad) after which a footprint fits into a rectangle along the axes with some play.

    Args:
        footprint: points [n 2] of the held thing (m).
        room: side lengths [2] of the rectangle (m).
        yaw: present yaw of the hand (rad), whose wrist limits the turn.
    """

    def cost(turn: float) -> float:
        sides = np.ptp(footprint @ about_z(turn)[:2, :2].T, axis=0)
        too_wide = float(np.maximum(sides + MARGIN - room, 0.0).sum())
        twisted = max(0.0, abs(yaw + turn) - COMFORTABLE_YAW)
        return 100.0 * too_wide + 0.1 * abs(turn) + 5.0 * twisted

    return float(min(TURNS, key=cost))


def open_fingers(yaw: float) -> Array:
    """Points [n 2] under the open fingers, relative to the grip point."""
    along, aside = np.meshgrid([-0.075, -0.055, -0.035, 0.035, 0.055, 0.075], [-0.012, 0.0, 0.012])
    return along.reshape(-1, 1) * closing_axis(yaw) + aside.reshape(-1, 1) * side_axis(yaw)


def thinned(points: Array) -> Array:
    """Those of `points` [n 2] that differ when rounded to 2 mm, as they are rounded."""
    return 0.002 * np.unique(np.round(points / 0.002), axis=0)


def clearance(footprint: Array, obstacles: Array) -> float:
    """Smallest distance (m) between two sets of points [n 2] and [m 2]; inf if one is empty."""
    if not len(footprint) or not len(obstacles):
        return float("inf")
    apart = footprint[:, None] - obstacles[None]
    return float(np.sqrt((apart**2).sum(-1).min()))


def shared_spot(footprint: Array, obstacles: Array, centre: Array, half_extents: Array, base: Array) -> Array:
    """A spot [2] for one of several things that have to share a region.

    A spot is good if it leaves 6 cm around the thing and the fingers that let it go, then if it is far from
    the middle of the region, which leaves room for the next thing, and not too far for the arm.

    Args:
        footprint: points [n 2] under the thing and the fingers, relative to the thing's origin (m).
        obstacles: points [m 2] of what stands there already (m).
        centre: middle of the region [2] (m).
        half_extents: of the region [2] (m).
        base: of the robot [2] (m).
    """
    steps = SPREAD * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    spots = [centre + half_extents * np.array([x, y]) for x in steps for y in steps]

    def cost(spot: Array) -> float:
        free = min(clearance(footprint + spot, obstacles), ENOUGH)
        stretched = max(0.0, float(np.linalg.norm(spot - base)) - COMFORTABLE_REACH)
        return -free - 0.1 * float(np.linalg.norm(spot - centre)) + 0.5 * stretched

    return min(spots, key=cost)
