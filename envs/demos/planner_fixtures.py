"""LIBERO's regions, joints and goals, skills for drawers, knobs, doors and chambers, and where all go."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from envs.demos.planner_arm import (
    CLEARING,
    CLOSED,
    LOWERING,
    OPEN,
    PRECISE,
    Array,
    Command,
    Reach,
    Skill,
    about_z,
    above,
    down,
    held_bodies,
    leaning,
)
from envs.demos.planner_grasping import (
    ABOVE_GRASP,
    CLOSING_STEPS,
    HANDLE,
    HANDLE_REACH,
    OPENING_STEPS,
    Rim,
    Workcell,
    closing_axis,
    comfortable_yaw,
    descend,
    extents,
    find_rim,
    transit,
)

OPEN_FULLY = 0.155  # m
OPEN_TO_FILL = 0.125  # m; a drawer pulled out farther blocks the hand that fills it
WIDENED = 0.157  # m; LIBERO's drawers stop at 0.16
HOOK_GAP, HOOK_DEPTH = 0.03, 0.02  # m from a drawer's front, and below its edge, to fingers that draw it
SHUT = 0.0005  # m past zero
PUSHING_PITCH = np.deg2rad(35)
BAR_DEPTH = 0.017  # m from the frontmost point of a drawer that belongs to the bar of its handle
KNOB_TURN = 1.2  # rad; the stove is on from 0.5
LEAN = np.deg2rad(50)  # flat enough to stay below the roof, steep enough to reach over a rim
PUSH_GAP, PUSH_DEPTH = 0.03, 0.035  # m before a vessel's wall; m below its rim
GRIP_DEPTH = 0.014  # m below the rim
HANDLE_GAP = 0.01  # m from a vessel's wall to what counts as its handle
HANDLE_GRIP = 0.012  # m from the outer end of a handle to the grip point
INSIDE = 0.025  # m that the origin of a thing must be inside of its region
DOOR_SHUT = 0.003  # rad from the closed door; LIBERO calls 0.005 closed
WIDE = 2.03  # rad; doors are drawn from 1.3 to their limit of 2.09, so that nearly every one is pushed
LEAD = 0.25  # rad that the pushing hand aims ahead of the door
ORDER = {"open": 0, "turnon": 1, "turnoff": 1, "on": 2, "in": 2, "close": 3}
"""In which predicates are achieved, so that none hinders the next."""
CONTAINER = "_contain_region"
BEFORE_DRAWER = 0.02  # m between an object and the drawer that is opened above it
KEPT_HELD = 3  # states for which an object counts as in the hand: contacts flicker, and what is let go falls
SIDES = tuple(
    np.array(side) for side in ((0.0, -1.0, 0.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
)

type Goal = tuple[str, ...]
"""A predicate and its arguments in lower case, such as ("on", "plate_1", "flat_stove_1_cook_region")."""


@dataclass(frozen=True)
class Region:
    """A box-shaped site that a goal names."""

    centre: Array  # [3] m, world
    half_extents: Array  # [3] m, along the axes of the world, as LIBERO's own checks take them


def region(cell: Workcell, name: str) -> Region:
    """Return the region `name` where it is now."""
    site = cell.env.sim.model.site_name2id(name)
    rotation = np.array(cell.env.sim.data.site_xmat[site]).reshape(3, 3)
    half = np.abs(rotation @ np.array(cell.scene.model.site_size[site]))
    return Region(np.array(cell.env.sim.data.site_xpos[site]), half)


def body_of(cell: Workcell, name: str) -> str:
    """Return the name of the body that carries the collision geometry of a BDDL object."""
    return name if name in cell.scene else f"{name}_main"


def is_object(cell: Workcell, name: str) -> bool:
    """Return whether `name` is an object with a body of its own, False if it is a region."""
    return body_of(cell, name) in cell.scene


def _place_of(cell: Workcell, name: str) -> Array:
    """Return the origin [3] of an object or the centre of a region (m, world)."""
    return cell.scene.position(body_of(cell, name)) if is_object(cell, name) else region(cell, name).centre


def parent_of(cell: Workcell, region_name: str) -> str:
    """Return the name of the object or fixture that a region belongs to."""
    return cell.env.object_sites_dict[region_name].parent_name


def owner_of(cell: Workcell, target: str) -> str:
    """Return the fixture or object that a region belongs to, or `target` itself if it is no region of one."""
    return str(getattr(cell.env.object_sites_dict.get(target), "parent_name", target))


def joint_of(cell: Workcell, region_name: str) -> str | None:
    """Return the name of the joint that moves a region (a drawer's slide), or None if it is fixed."""
    site = cell.env.object_sites_dict.get(region_name)
    return site.joints[0] if site is not None and site.joints else None


def joint_position(cell: Workcell, joint: str) -> float:
    """Return the position of a slide (m) or hinge (rad)."""
    return float(cell.scene.data.joint(joint).qpos[0])


def goals(cell: Workcell) -> list[Goal]:
    """Return the predicates of the problem, all of which have to hold at the end."""
    return [tuple(goal) for goal in cell.env.parsed_problem["goal_state"]]


def holds(cell: Workcell, goal: Goal) -> bool:
    """Return whether LIBERO's own check of a predicate is true now."""
    return bool(cell.env._eval_predicate(list(goal)))


class Drawer:
    """One drawer of a LIBERO cabinet: where its handle is and along which way it slides."""

    def __init__(self, cell: Workcell, region_name: str) -> None:
        """Read the drawer of a region such as "wooden_cabinet_1_top_region".

        Raises:
            ValueError: the region is not a drawer.
        """
        match = re.fullmatch(r"(.*cabinet_\d+)_(top|middle|bottom)_region", region_name)
        joint = joint_of(cell, region_name)
        if match is None or joint is None:
            raise ValueError(f"expected the region of a cabinet's drawer, got {region_name!r}")
        self._drawers = f"{match[1]}_cabinet_"
        self.body = f"{self._drawers}{match[2]}"
        self.joint = joint
        self._cell = cell

    @property
    def outwards(self) -> Array:
        """Unit vector [3] along which the drawer opens: LIBERO's cabinets slide along their own -y."""
        return -self._cell.scene.rotation(self.body)[:, 1]

    @property
    def handle(self) -> Array:
        """Middle [3] of the bar of the handle (m)."""
        cloud = self._cell.scene.cloud(self.body)
        along = cloud @ self.outwards
        bar = cloud[along > along.max() - BAR_DEPTH]
        return (bar.max(0) + bar.min(0)) / 2

    @property
    def opening(self) -> float:
        """How far the drawer is pulled out (m)."""
        return -joint_position(self._cell, self.joint)

    @property
    def has_others_above(self) -> bool:
        """Whether handles of other drawers protrude above it."""
        scene = self._cell.scene
        others = (f"{self._drawers}{level}" for level in ("top", "middle", "bottom"))
        return any(scene.bottom(other) > scene.bottom(self.body) for other in others if other in scene)


def widen_drawer(cell: Workcell, region_name: str) -> Skill:
    """Put open fingers behind the front of an open drawer and draw it out as far as it goes.

    Half open, it leaves what is lowered into it millimetres between its front and the handles above.
    """
    drawer, inside = Drawer(cell, region_name), region(cell, region_name)
    outwards = drawer.outwards
    behind = inside.centre + (float(np.abs(outwards) @ inside.half_extents) - HOOK_GAP) * outwards
    behind[2] = cell.scene.top(drawer.body) - HOOK_DEPTH
    rotation = down(comfortable_yaw(float(np.arctan2(outwards[1], outwards[0]))))
    yield from transit(cell, above(behind, ABOVE_GRASP), rotation, OPEN, clearance=0.03)
    yield from descend(cell, behind, rotation)
    yield from _pull(cell, drawer, rotation, WIDENED, OPEN)
    return (yield from cell.arm.move(above(cell.arm.position, 0.10), rotation, OPEN, CLEARING))


def open_drawer(cell: Workcell, region_name: str, opening: float = OPEN_FULLY) -> Skill:
    """Reach for the bar horizontally, one finger above and one below, and pull."""
    drawer = Drawer(cell, region_name)
    outwards, handle, rotation = drawer.outwards, drawer.handle, _pulling(drawer)
    approach = rotation[:, 2]
    ready = handle - 0.09 * approach
    via = ready + 0.10 * outwards
    via[2] = max(ready[2], handle[2] + 0.08)
    yield from cell.arm.move(via, rotation, OPEN, Reach(0.03, 0.25, steps=90, stalls=False))
    yield from cell.arm.move(ready, rotation, OPEN, Reach(0.01, 0.12, steps=60))
    at_bar = handle + 0.004 * approach
    yield from cell.arm.move(at_bar, rotation, OPEN, Reach(0.006, 0.12, speed=0.6, noise_share=0.3))
    yield from cell.arm.hold(at_bar, rotation, CLOSED, 10)
    yield from _pull(cell, drawer, rotation, opening)
    here = cell.arm.position
    yield from cell.arm.hold(here, rotation, OPEN, 6)
    yield from cell.arm.move(here - 0.08 * approach, rotation, OPEN, Reach(0.02, 9.0))
    return drawer.opening >= opening


def _pulling(drawer: Drawer) -> Array:
    """Return the rotation [3 3] of a hand at a drawer's bar, one finger above and one below."""
    yaw = float(np.arctan2(drawer.outwards[1], drawer.outwards[0])) - np.pi / 2
    return Rotation.from_euler("ZX", [yaw + np.deg2rad(25), np.deg2rad(-80)]).as_matrix() @ down(0.0)


def _pull(cell: Workcell, drawer: Drawer, rotation: Array, opening: float, gripper: float = CLOSED) -> Skill:
    """Draw the hand along the slide, 3 cm ahead of where it is, until the drawer is out."""
    start, outwards = cell.arm.position, drawer.outwards
    for _ in range(80):
        if drawer.opening > opening:
            return True
        drawn = max(0.0, float((cell.arm.position - start) @ outwards))
        goal = start + (drawn + 0.03) * outwards
        yield Command(cell.arm.command(goal, rotation, gripper), PRECISE.noise_share)
    return False


def close_drawer(cell: Workcell, region_name: str) -> Skill:
    """Push the bar of the handle with closed fingers until the drawer is shut.

    The hand leans, so that its palm stays clear of the drawers above.
    """
    drawer = Drawer(cell, region_name)
    inwards = -drawer.outwards
    rotation = leaning(inwards, PUSHING_PITCH)
    start = drawer.handle - 0.06 * inwards
    yield from transit(cell, above(start, ABOVE_GRASP), rotation, CLOSED, clearance=0.03)
    yield from cell.arm.move(start, rotation, CLOSED, Reach(0.01))
    yield from _push(cell, drawer, rotation)
    here = cell.arm.position
    yield from cell.arm.move(here - 0.08 * inwards, rotation, CLOSED, Reach(0.02, 9.0))
    return drawer.opening < -SHUT


def _push(cell: Workcell, drawer: Drawer, rotation: Array) -> Skill:
    """Push along the slide, 3 cm ahead of where the hand is, until the drawer is shut or nothing moves."""
    start, inwards = cell.arm.position, -drawer.outwards
    pushed: list[float] = []
    for _ in range(100):
        pushed.append(float((cell.arm.position - start) @ inwards))
        if drawer.opening < -SHUT:
            return True
        if len(pushed) > 15 and pushed[-1] - pushed[-15] < 0.002:
            return False
        goal = start + (pushed[-1] + 0.03) * inwards
        yield Command(cell.arm.command(goal, rotation, CLOSED), PRECISE.noise_share)
    return False


def turn_knob(cell: Workcell, fixture: str, direction: float) -> Skill:
    """Grip the ridge of a stove's knob from above and turn it about the knob's axis.

    `direction` +1 turns the stove on, -1 off.
    """
    knob = f"{fixture}_button"
    cloud, axis = cell.scene.cloud(knob), cell.scene.position(knob)
    top = cloud[:, 2].max()
    ridge = cloud[cloud[:, 2] > top - 0.012, :2]
    yaws = np.deg2rad(np.arange(-90.0, 90.0, 5.0))
    yaw = float(min(yaws, key=lambda angle: extents(ridge, closing_axis(angle))[0] + 0.002 * abs(angle)))
    middle = (ridge.max(0) + ridge.min(0)) / 2
    rotation, grip = down(yaw), np.array([middle[0], middle[1], top - 0.016])
    yield from transit(cell, above(grip, ABOVE_GRASP), rotation, OPEN, clearance=0.03)
    yield from descend(cell, grip, rotation)
    yield from cell.arm.hold(grip, rotation, CLOSED, 8)
    for step in range(41):
        turn = about_z(direction * min(0.04 * (step + 1), KNOB_TURN))
        goal = axis + turn @ (grip - axis)
        yield Command(cell.arm.command(goal, turn @ rotation, CLOSED), PRECISE.noise_share)
    here, turned = cell.arm.position, cell.arm.rotation
    yield from cell.arm.hold(here, turned, OPEN, OPENING_STEPS)
    return (yield from cell.arm.move(above(here, 0.08), turned, OPEN, Reach(0.02, 9.0)))


def open_side(cloud: Array, chamber: Region) -> Array:
    """Return the horizontal direction [3] in which a chamber has no wall.

    `cloud` [n 3] samples the walls (m, world), `chamber` is the space inside.
    """
    relative = cloud - chamber.centre
    level = np.abs(relative[:, 2]) < 0.5 * chamber.half_extents[2]

    def walled(side: Array) -> int:
        across = np.abs(relative @ np.array([-side[1], side[0], 0.0]))
        beyond = relative @ side > 0.8 * float(np.abs(side) @ chamber.half_extents)
        return int(np.count_nonzero(level & beyond & (across < 0.04)))

    return min(SIDES, key=walled)


def resting_place(cloud: Array, chamber: Region, inwards: Array) -> Array:
    """Return the point [3] on a chamber's floor midway between its side walls, just inside of its region.

    `cloud` [n 3] samples walls, floor and roof (m, world); the region may reach into a wall; `inwards` [3]
    points away from the open front.
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
    """Take a vessel by its handle or rim with a leaning hand and bring it in through the open front."""
    fixture = parent_of(cell, chamber_name)
    yield from _open_wide(cell, fixture)
    chamber, walls = region(cell, chamber_name), cell.scene.cloud(f"{fixture}_main")
    inwards = -open_side(walls, chamber)
    rotation = leaning(inwards, LEAN)
    held = yield from _grasp_leaning(cell, body, rotation)
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
    """Push a vessel that stands in the front of a chamber, from outside, until its origin is `inside`."""
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


def facing_handle(cloud: Array, rim: Rim, rotation: Array) -> Array | None:
    """Return where a hand of this `rotation` [3 3] grips a handle that points at it [3], or None without one.

    `cloud` [n 3] is the vessel, `rim` its rim. Fingers that close around a handle have centimetres to spare
    on both sides, fingers around a wall only millimetres.
    """
    across, outwards = rotation[:, 0], np.array([*-rotation[:2, 2], 0.0])
    outwards /= np.linalg.norm(outwards)
    relative = cloud - rim.middle
    out = relative @ outwards
    handle = relative[out > float(np.linalg.norm(rim.points[0] - rim.middle)) + HANDLE_GAP]
    if not len(handle) or extents(handle[:, :2], across[:2])[0] > HANDLE:
        return None
    aside = extents(handle[:, :2], across[:2])[1]
    grip = rim.middle + (out.max() - HANDLE_GRIP) * outwards + aside * across
    grip[2] += handle[:, 2].max() - HANDLE_REACH
    return grip


def _leaning_grip(cell: Workcell, body: str, rotation: Array, attempt: int) -> Array:
    """Return where to pinch a vessel [3]: its handle, else its wall at the side near the robot."""
    cloud, across = cell.scene.cloud(body), rotation[:, 0]
    rim = find_rim(cloud, cell.scene.rotation(body), cell.scene.position(body))
    handle = facing_handle(cloud, rim, rotation)
    if handle is not None and not attempt:
        return handle
    side = _side_near_robot(cell, body, across) * (-1.0 if attempt else 1.0)
    radius = float(np.linalg.norm(rim.points[0] - rim.middle))
    return rim.middle + side * radius * across + GRIP_DEPTH * rotation[:, 2]


def _grasp_leaning(cell: Workcell, body: str, rotation: Array) -> Skill:
    """Pinch a vessel with a leaning hand; True if it comes along."""
    for attempt in cell.attempts(2):
        grip = _leaning_grip(cell, body, rotation, attempt)
        ready = grip - 0.09 * rotation[:, 2]
        yield from transit(cell, above(ready, 0.02), rotation, OPEN, clearance=0.03)
        yield from cell.arm.approach(grip, rotation, OPEN, Reach(0.005, 0.06, speed=0.5, noise_share=0.3))
        yield from cell.arm.hold(grip, rotation, CLOSED, CLOSING_STEPS)
        before = cell.scene.bottom(body)
        yield from cell.arm.move(above(grip, ABOVE_GRASP), rotation, CLOSED, CLEARING)
        if cell.scene.bottom(body) > before + 0.025:
            return True
        yield from cell.arm.hold(cell.arm.position, rotation, OPEN, OPENING_STEPS)
        yield from cell.arm.move(cell.arm.position - 0.08 * rotation[:, 2], rotation, OPEN, CLEARING)
    return False


def _hand_for(cell: Workcell, body: str, point: Array) -> Array:
    """Return where the hand must be [3] for the held body to stand on `point` [3]."""
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
    def of(cls, cell: Workcell, fixture: str) -> Door:
        """Return the first hinged door of a fixture."""
        joint = cell.env.get_object(fixture).joints[0]
        data = cell.scene.data.joint(joint)
        body = cell.scene.model.body(cell.scene.model.joint(joint).bodyid[0]).name
        return cls(body, joint, np.array(data.xaxis), np.array(data.xanchor))


def close_door(cell: Workcell, fixture: str) -> Skill:
    """Push a door shut."""
    return (yield from _swing(cell, Door.of(cell, fixture), 0.0))


def _open_wide(cell: Workcell, fixture: str) -> Skill:
    """Push a door that stands ajar, if there is one, out of the way of a hand that goes in."""
    if not cell.env.get_object(fixture).joints:
        return True
    door = Door.of(cell, fixture)
    angle = joint_position(cell, door.joint)
    if not DOOR_SHUT < abs(angle) < WIDE:
        return True
    return (yield from _swing(cell, door, float(np.sign(angle)) * WIDE))


def _door_edge(cell: Workcell, fixture: str, sense: float) -> Array:
    """Return where [3] the door of a fixture is pushed open (`sense` 1) or shut (-1)."""
    door = Door.of(cell, fixture)
    return _pushed_point(cell, door, sense * np.sign(joint_position(cell, door.joint)) * door.axis)


def _swing(cell: Workcell, door: Door, wanted: float) -> Skill:
    """Push a door to the joint position `wanted` (rad) with closed fingers, below its upper edge."""
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
        if sign * (wanted - angle) < DOOR_SHUT:
            break
        turn = Rotation.from_rotvec((abs(first - angle) + LEAD) * sense)
        goal = door.anchor + turn.apply(contact - door.anchor)
        yield Command(cell.arm.command(goal, rotation, CLOSED, 0.6), PRECISE.noise_share)
    yield from cell.arm.move(above(cell.arm.position, 0.10), rotation, CLOSED, CLEARING)
    return sign * (wanted - joint_position(cell, door.joint)) < DOOR_SHUT


def _pushed_point(cell: Workcell, door: Door, sense: Array) -> Array:
    """Return where to put the closed fingers [3]: towards the free edge, behind, below the upper edge."""
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


def is_chamber(cell: Workcell, target: str) -> bool:
    """Return whether a region is closed above, as a microwave's: no drawer, no basket, nothing flat."""
    if is_object(cell, target) or target.endswith(CONTAINER) or joint_of(cell, target) is not None:
        return False
    return bool(region(cell, target).half_extents.min() > 0.05)


def part_poses(cell: Workcell, goal: Goal) -> list[tuple[Array, Array]]:
    """Return poses (position [3], rotation [3 3]) that the hand takes for a goal at a fixture.

    The last one is at its handle, knob or surface, above its door's edge or before its chamber.
    """
    kind, target = goal[0], goal[-1]
    rotation = down(0.0)
    if kind in ("turnon", "turnoff"):
        part = cell.scene.position(f"{target}_button")
        part[2] = cell.scene.top(f"{target}_button")
        way = above(part, ABOVE_GRASP)
    elif joint_of(cell, target) is not None:
        drawer = Drawer(cell, target)
        if kind == "in" and drawer.opening > 0.5 * OPEN_FULLY:
            way = part = above(region(cell, target).centre, ABOVE_GRASP)
        elif kind == "close":
            rotation, part = leaning(-drawer.outwards, PUSHING_PITCH), drawer.handle
            way = part + 0.06 * drawer.outwards
        else:
            rotation, part = _pulling(drawer), drawer.handle
            way = part - 0.09 * rotation[:, 2]
    elif kind in ("open", "close"):
        way = _door_edge(cell, target, -1.0)
        part = above(way, ABOVE_GRASP)
    elif is_chamber(cell, target):
        chamber, walls = region(cell, target), cell.scene.cloud(f"{parent_of(cell, target)}_main")
        inwards = -open_side(walls, chamber)
        rotation = leaning(inwards, LEAN)
        way = part = above(resting_place(walls, chamber, inwards) - 0.16 * inwards, ABOVE_GRASP)
    else:
        part = above(region(cell, target).centre, ABOVE_GRASP)
        way = above(part, ABOVE_GRASP)
    return [(way, rotation), (part, rotation)]


def overhang(cell: Workcell, body: str, target: str, opening: float) -> Array:
    """Return by how much [3] to pull `body` away from below the drawer `target`, opened by `opening` m."""
    drawer = Drawer(cell, target)
    outwards, cloud, walls = drawer.outwards, cell.scene.cloud(body), cell.scene.cloud(drawer.body)
    aside = np.array([-outwards[1], outwards[0], 0.0])
    apart = max((cloud @ aside).min() - (walls @ aside).max(), (walls @ aside).min() - (cloud @ aside).max())
    way = (walls @ outwards).max() + opening - drawer.opening + BEFORE_DRAWER - (cloud @ outwards).min()
    is_beside = apart > BEFORE_DRAWER or way < 0 or cloud[:, 2].min() > walls[:, 2].min()
    return np.zeros(3) if is_beside else way * outwards


def displacements(env: Any, states: Iterable[Array], cell: Workcell | None = None) -> Array:
    """Return the displacement of the demonstrator's target from the grip point, float32 [t 3].

    In metres along the axes of the robot's base, for the states of a LIBERO episode in order. The target is
    the object of the first goal that does not hold; while that is in the hand, the goal's place; and the
    handle, knob or edge of a fixture, or of a drawer or door that is opened before. `cell` is the workcell of
    `env`; None samples its shapes, which do not change between episodes.
    """
    cell, found, to_open = cell or Workcell.of(env.raw), [], dict[str, float]()
    held = deque[set[int]](maxlen=KEPT_HELD)
    for state in states:
        env.restore(state)
        env.refresh_contacts()
        held.append({env.model.body_rootid[body] for body in held_bodies(env.model, env.data)})
        way = _destination(cell, set().union(*held), to_open) - cell.arm.position
        found.append(way @ cell.scene.rotation("robot0_base"))
    return np.stack(found).astype(np.float32)


def _destination(cell: Workcell, held: set[int], to_open: dict[str, float]) -> Array:
    """Return where [3] the demonstrator goes with the root bodies `held` in the hand; see `displacements`.

    `to_open` is how far drawers and doors of this episode are still to be opened, by region, empty at first.
    """
    wanted = sorted(goals(cell), key=lambda goal: ORDER[goal[0]])
    objects = [goal for goal in wanted if goal[0] in ("on", "in")]
    carried = [goal for goal in objects if cell.scene.model.body(body_of(cell, goal[1])).rootid[0] in held]
    pending = carried or [goal for goal in wanted if not holds(cell, goal)]
    kind, *names = (pending or wanted[-1:])[0]
    if kind in ("turnon", "turnoff"):
        return cell.scene.position(f"{names[0]}_button")
    if kind in ("open", "close"):
        return Drawer(cell, names[0]).handle if joint_of(cell, names[0]) else _door_edge(cell, names[0], -1.0)
    name, target = names
    entrance, to_pull = _entrance(cell, target, to_open), np.zeros(3)
    if entrance is not None and joint_of(cell, target) is not None:
        to_pull = overhang(cell, body_of(cell, name), target, OPEN_TO_FILL)
    if np.linalg.norm(to_pull) > BEFORE_DRAWER:  # else it is only nearer than the demonstrator likes
        return _place_of(cell, name) + (to_pull if carried else 0.0)
    if entrance is not None:
        return entrance
    return _place_of(cell, target if carried or not pending else name)


def _entrance(cell: Workcell, target: str, to_open: dict[str, float]) -> Array | None:
    """Return the handle or edge [3] by which the way into `target` is opened; None where it is open."""
    if joint_of(cell, target) is not None:
        drawer = Drawer(cell, target)
        now = drawer.opening
        if target not in to_open:
            least = WIDENED if drawer.has_others_above else 0.0
            to_open[target] = least if holds(cell, ("open", target)) else OPEN_TO_FILL
    elif is_chamber(cell, target) and cell.env.get_object(fixture := parent_of(cell, target)).joints:
        drawer, now = None, abs(joint_position(cell, Door.of(cell, fixture).joint))
        to_open.setdefault(target, WIDE - DOOR_SHUT if now > DOOR_SHUT else 0.0)
    else:
        return None
    if now >= to_open[target]:
        to_open[target] = 0.0
    if not to_open[target]:
        return None
    return _door_edge(cell, parent_of(cell, target), 1.0) if drawer is None else drawer.handle
