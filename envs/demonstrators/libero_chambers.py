"""Skills for a chamber with a roof and a door, such as a microwave."""

from dataclasses import dataclass

import numpy as np

from envs.demonstrators.arm import (
    CLEARING,
    CLOSED,
    LOWERING,
    OPEN,
    PRECISE,
    Command,
    Reach,
    Skill,
    above,
    down,
    leaning,
)
from envs.demonstrators.grasping import find_rim
from envs.demonstrators.libero_scene import Region, joint_position, region
from envs.demonstrators.rotations import Array, about_axis
from envs.demonstrators.skills import ABOVE_GRASP, CLOSING_STEPS, OPENING_STEPS, Workcell, transit

LEAN = np.deg2rad(50)  # flat enough to stay below the roof, steep enough to reach over a rim
PUSH_GAP, PUSH_DEPTH = 0.03, 0.035  # m before a vessel's wall; m below its rim
GRIP_DEPTH = 0.014  # m below the rim
INSIDE = 0.025  # m that the origin of a thing must be inside of its region
SHUT = 0.003  # rad from the closed door; LIBERO calls 0.005 closed
WIDE = 1.9  # rad; a microwave draws its door from 1.3 to 2.1, and less than this hinders a leaning hand
LEAD = 0.25  # rad that the pushing hand aims ahead of the door
SIDES = tuple(
    np.array(side) for side in ((0.0, -1.0, 0.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
)


def open_side(cloud: Array, chamber: Region) -> Array:
    """The horizontal direction [3] in which a chamber has no wall.

    Args:
        cloud: points [n 3] of the walls (m, world).
        chamber: the space inside.
    """
    relative = cloud - chamber.centre
    level = np.abs(relative[:, 2]) < 0.5 * chamber.half_extents[2]

    def walled(side: Array) -> int:
        across = np.abs(relative @ np.array([-side[1], side[0], 0.0]))
        beyond = relative @ side > 0.8 * float(np.abs(side) @ chamber.half_extents)
        return int(np.count_nonzero(level & beyond & (across < 0.04)))

    return min(SIDES, key=walled)


def resting_place(cloud: Array, chamber: Region, inwards: Array) -> Array:
    """The point [3] on a chamber's floor midway between its side walls, just inside of its region.

    Args:
        cloud: points [n 3] of the walls, the floor and the roof (m, world).
        chamber: the region, which may reach into a wall.
        inwards: direction [3] from the open front.
    """
    across = np.array([-inwards[1], inwards[0], 0.0])
    relative = cloud - chamber.centre
    beside = relative @ across
    depth = float(np.abs(inwards) @ chamber.half_extents)
    deep = np.abs(relative @ inwards) < 0.6 * depth  # the back wall may lie within the region
    sides = beside[deep & (np.abs(relative[:, 2]) < 0.5 * chamber.half_extents[2])]
    middle = (sides[sides < 0].max(initial=-0.5) + sides[sides > 0].min(initial=0.5)) / 2
    below = deep & (np.abs(beside - middle) < 0.03) & (relative[:, 2] < 0)
    point = chamber.centre + middle * across
    point -= (depth - INSIDE) * inwards
    point[2] = cloud[below, 2].max(initial=chamber.centre[2] - chamber.half_extents[2])
    return point


def insert(cell: Workcell, body: str, chamber_name: str) -> Skill:
    """Takes a vessel by the side of its rim with a leaning hand and brings it in through the open front."""
    fixture = cell.env.object_sites_dict[chamber_name].parent_name
    yield from _open_wide(cell, fixture)
    chamber, walls = region(cell, chamber_name), cell.scene.cloud(f"{fixture}_main")
    inwards = -open_side(walls, chamber)
    rotation = leaning(inwards, LEAN)
    side = _side_near_robot(cell, body, rotation[:, 0])
    held = yield from _grasp_leaning(cell, body, rotation, side)
    if not held:
        return False
    inside = resting_place(walls, chamber, inwards)
    outside = inside - 0.16 * inwards
    yield from transit(cell, _hand_for(cell, body, above(outside, 0.02)), rotation, CLOSED, body)
    for point in (above(outside, 0.02), above(inside, 0.02), above(inside, 0.002)):
        yield from cell.arm.move(_hand_for(cell, body, point), rotation, CLOSED, LOWERING)
    here, approach = cell.arm.position, rotation[:, 2]
    yield from cell.arm.hold(here, rotation, OPEN, OPENING_STEPS)
    yield from cell.arm.move(here - 0.06 * approach, rotation, OPEN, Reach(0.01, 9.0, speed=0.5))
    back = above(cell.arm.position - 0.12 * inwards, 0.06)
    yield from cell.arm.move(back, rotation, OPEN, CLEARING)
    return (yield from _push_in(cell, body, inside, inwards, rotation))


def _push_in(cell: Workcell, body: str, inside: Array, inwards: Array, rotation: Array) -> Skill:
    """Pushes a vessel that stands in the front of a chamber, from outside, until its origin is `inside`."""
    cloud = cell.scene.cloud(body)
    near_side = float((cloud @ inwards).min())
    start = cell.scene.position(body) + (near_side - PUSH_GAP - cell.scene.position(body) @ inwards) * inwards
    start[2] = cloud[:, 2].max() - PUSH_DEPTH
    yield from cell.arm.move(above(start - 0.04 * inwards, 0.04), rotation, CLOSED, Reach(0.015, 0.1))
    yield from cell.arm.move(start, rotation, CLOSED, Reach(0.01, 0.1))
    for _ in range(50):
        missing = float((inside - cell.scene.position(body)) @ inwards)
        if missing < 0:
            break
        pushed = float((cell.arm.position - start) @ inwards)
        goal = start + (pushed + 0.02 + 0.5 * missing) * inwards
        yield Command(cell.arm.command(goal, rotation, CLOSED, 0.4), PRECISE.noise_share)
    yield from cell.arm.move(above(cell.arm.position - 0.12 * inwards, 0.06), rotation, CLOSED, CLEARING)
    return float((inside - cell.scene.position(body)) @ inwards) < INSIDE


def _side_near_robot(cell: Workcell, body: str, across: Array) -> float:
    """+1 or -1: the side along `across` that lies nearer to the robot, where a leaning arm still bends."""
    towards = cell.scene.position("robot0_base") - cell.scene.position(body)
    return 1.0 if float(towards @ across) > 0 else -1.0


def _grasp_leaning(cell: Workcell, body: str, rotation: Array, first_side: float) -> Skill:
    """Pinches the wall of a vessel beside its middle; True if it comes along."""
    across = rotation[:, 0]
    for side in (first_side, -first_side):
        rim = find_rim(cell.scene.cloud(body), cell.scene.rotation(body), cell.scene.position(body))
        radius = float(np.linalg.norm(rim.points[0] - rim.middle))
        grip = rim.middle + side * radius * across + GRIP_DEPTH * rotation[:, 2]
        ready = grip - 0.09 * rotation[:, 2]
        yield from transit(cell, above(ready, 0.02), rotation, OPEN, clearance=0.03)
        yield from cell.arm.move(ready, rotation, OPEN, Reach(0.008, 0.08, noise_share=0.6))
        yield from cell.arm.move(grip, rotation, OPEN, Reach(0.005, 0.06, speed=0.5, noise_share=0.3))
        yield from cell.arm.hold(grip, rotation, CLOSED, CLOSING_STEPS)
        before = cell.scene.bottom(body)
        yield from cell.arm.move(above(grip, ABOVE_GRASP), rotation, CLOSED, CLEARING)
        if cell.scene.bottom(body) > before + 0.025:
            return True
        yield from cell.arm.hold(cell.arm.position, rotation, OPEN, OPENING_STEPS)
        yield from cell.arm.move(cell.arm.position - 0.08 * rotation[:, 2], rotation, OPEN, CLEARING)
    return False


def _hand_for(cell: Workcell, body: str, point: Array) -> Array:
    """Where the hand must be [3] for the held body to stand on `point` [3]."""
    hand = cell.arm.position
    goal = hand + point - cell.scene.position(body)
    goal[2] = point[2] + hand[2] - cell.scene.bottom(body)
    return goal


@dataclass(frozen=True)
class Door:
    """A hinged door: its body, its joint, the hinge's axis and a point on it."""

    body: str
    joint: str
    axis: Array  # [3] unit
    anchor: Array  # [3] m

    @classmethod
    def of(cls, cell: Workcell, fixture: str) -> "Door":
        """The first hinged door of a fixture."""
        joint = cell.env.get_object(fixture).joints[0]
        data = cell.scene.data.joint(joint)
        body = cell.scene.model.body(cell.scene.model.joint(joint).bodyid[0]).name
        return cls(body, joint, np.array(data.xaxis), np.array(data.xanchor))


def close_door(cell: Workcell, fixture: str) -> Skill:
    """Pushes a door shut."""
    return (yield from _swing(cell, Door.of(cell, fixture), 0.0))


def _open_wide(cell: Workcell, fixture: str) -> Skill:
    """Pushes a door that stands ajar, if there is one, out of the way of a hand that goes in."""
    if not cell.env.get_object(fixture).joints:
        return True
    door = Door.of(cell, fixture)
    angle = joint_position(cell, door.joint)
    if not SHUT < abs(angle) < WIDE:
        return True
    return (yield from _swing(cell, door, float(np.sign(angle)) * WIDE))


def _swing(cell: Workcell, door: Door, wanted: float) -> Skill:
    """Pushes a door to the joint position `wanted` (rad) with closed fingers, below its upper edge."""
    sign = float(np.sign(wanted - joint_position(cell, door.joint)))
    sense = sign * door.axis
    contact = _pushed_point(cell, door, sense)
    away = np.cross(sense, contact - door.anchor)
    away = -away / np.linalg.norm(away)
    rotation = down(0.0)
    start = contact + 0.05 * away
    # Upright first and well above the door: a hand that turns on its way sinks and throws the door open.
    high = cell.arm.position
    high[2] = max(high[2], cell.scene.top(door.body) + 0.12)
    yield from cell.arm.move(high, rotation, CLOSED, Reach(0.03, 0.2))
    yield from transit(cell, above(start, 0.12), rotation, CLOSED, clearance=0.10)
    yield from cell.arm.move(start, rotation, CLOSED, Reach(0.01))
    first = joint_position(cell, door.joint)
    for _ in range(120):
        angle = joint_position(cell, door.joint)
        if sign * (wanted - angle) < SHUT:
            break
        turn = about_axis(sense, abs(first - angle) + LEAD)
        goal = door.anchor + turn @ (contact - door.anchor)
        yield Command(cell.arm.command(goal, rotation, CLOSED, 0.6), PRECISE.noise_share)
    yield from cell.arm.move(above(cell.arm.position, 0.10), rotation, CLOSED, CLEARING)
    return sign * (wanted - joint_position(cell, door.joint)) < SHUT


def _pushed_point(cell: Workcell, door: Door, sense: Array) -> Array:
    """Where to put the closed fingers [3]: towards the free edge, behind, below the upper edge."""
    cloud = cell.scene.cloud(door.body)
    arms = cloud - door.anchor
    arms -= np.outer(arms @ door.axis, door.axis)
    reach = np.linalg.norm(arms, axis=1)
    free = arms[int(np.argmax(reach))]
    along = free / np.linalg.norm(free)
    push = np.cross(sense, along)
    outer = float((arms @ push).min())
    point = door.anchor + 0.6 * float((arms @ along).max()) * along + (outer - 0.012) * push
    point[2] = cloud[:, 2].max() - 0.025
    return point
