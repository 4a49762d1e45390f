"""Demonstrators of the LIBERO and robosuite tasks.

LIBERO and LIBERO-PRO share one, which reaches the goal predicate by predicate; each robosuite task has a
short program of skills.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.spatial import KDTree

from envs.demos.planner_arm import (
    CLEARING,
    CLOSED,
    OPEN,
    PRECISE,
    Array,
    Command,
    Reach,
    Skill,
    about_z,
    above,
    down,
    nearest_equivalent,
    wrap,
)
from envs.demos.planner_fixtures import (
    CONTAINER,
    OPEN_TO_FILL,
    ORDER,
    Drawer,
    Goal,
    body_of,
    close_door,
    close_drawer,
    goals,
    holds,
    insert,
    is_chamber,
    is_object,
    joint_of,
    open_drawer,
    overhang,
    parent_of,
    region,
    turn_knob,
    widen_drawer,
)
from envs.demos.planner_grasping import (
    ABOVE_GRASP,
    CLOSING_STEPS,
    COMFORTABLE_REACH,
    OPENING_STEPS,
    GraspRequest,
    NoGraspError,
    Placement,
    Workcell,
    closing_axis,
    corridor_top,
    descend,
    grasp,
    near,
    place,
    plan_grasp,
    release,
    side_axis,
    transit,
)

ROUNDS = 2  # a predicate that a later step made false is achieved again once
TURNS = np.deg2rad(np.arange(-180.0, 180.0, 5.0))
COMFORTABLE_YAW = np.deg2rad(95.0)
ENOUGH = 0.06  # m of free space around an object; more is no better
MARGIN = 0.015  # m of play that an object should have in its compartment
SPREAD = 0.7  # share of a region's half extents over which shared spots are spread
CARRIES = 2  # an object that slips out of the hand on the way is grasped again once
AT_GOAL = 0.025  # m; LIBERO's own limit is 0.04
LOST = 0.04  # m between a plate's edge and the hand that should hold it
RIM_GRIP, FLAT_LIFT = 0.010, 0.035  # m above the lowest point of a plate; m that its rim is lifted
DRAWN_AWAY = 0.10  # m that a plate may be drawn away from the robot
BESIDE_PLATE = 0.015  # m that must be free beside a plate that is drawn
CARRYING = Reach(0.006, 0.1, speed=0.6, noise_share=0.3)
IN_BELOW = 0.01  # m by which LIBERO's own check reaches below a region
STANDING = 0.04  # m above a region that separates objects on it from its own surface
SHIFTING = 20.0  # rad of turning that a shift by one metre is as bad as, in a drawer
SHIFTING_OPEN = 4.0  # the same in an open region
QUARTER = np.deg2rad(90.0)
OTHER_WAY = 1.0  # rad; turns to the right come after those to the left, so that alike scenes are solved alike
DIRECTIONS = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
JITTER = np.array([[0.0, 0.0, 0.0], [0.01, 0.0, 0.0], [-0.01, 0.0, 0.0], [0.0, 0.01, 0.0], [0.0, -0.01, 0.0]])
HOVER = 0.10  # m above what something is put on or into, where the hand has to get
WALL_GAP = 0.002  # m that stay free between an object and the walls of its drawer
BESIDE_OTHERS = 0.01  # m that stay free between an object and its neighbours in an open region
GRAZE = 0.001  # m; nearer than that, a lowered object touches what it passes
SIDEWAYS = np.deg2rad([20, -20, 40, -40, 60, -60, 90, -90, 120, -120, 150, -150, 180])
MOST_TURN = np.deg2rad(40.0)  # of an object above a drawer, which is grasped from the side that fits
ANGLES = np.deg2rad(np.arange(0.0, 360.0, 15.0))


def achieve_goals(cell: Workcell) -> Skill:
    """Make every predicate of the problem's goal true, in an order in which none hinders the next.

    Raises:
        ValueError: The goal has a predicate for which there is no skill.
    """
    wanted = goals(cell)
    unknown = [goal for goal in wanted if goal[0] not in ORDER]
    if unknown:
        raise ValueError(f"no skill for {unknown}; there are skills for {sorted(ORDER)}")
    for _ in cell.attempts(ROUNDS):
        for goal in sorted(wanted, key=lambda goal: ORDER[goal[0]]):
            if not holds(cell, goal):
                yield from _achieve(cell, goal)
        if all(holds(cell, goal) for goal in wanted):
            return True
    return False


def _achieve(cell: Workcell, goal: Goal) -> Skill:
    match goal:
        case ("open", target):
            return (yield from open_drawer(cell, target))
        case ("close", target):
            close = close_door if joint_of(cell, target) is None else close_drawer
            return (yield from close(cell, target))
        case ("turnon", fixture):
            return (yield from turn_knob(cell, fixture, 1.0))
        case ("turnoff", fixture):
            return (yield from turn_knob(cell, fixture, -1.0))
        case (_, name, target):
            yield from _make_room(cell, name, target)
            return (yield from put(cell, name, target))
    raise ValueError(f"no skill for {goal}")


def _make_room(cell: Workcell, name: str, target: str) -> Skill:
    """Open the drawer that an object is to be put into, if it is not open, or wider below other drawers."""
    if joint_of(cell, target) is None:
        return True
    if holds(cell, ("open", target)):
        return not Drawer(cell, target).has_others_above or (yield from widen_drawer(cell, target))
    yield from pull_from_below(cell, body_of(cell, name), target, OPEN_TO_FILL)
    return (yield from open_drawer(cell, target, OPEN_TO_FILL))


def fitting_turn(footprint: Array, room: Array, yaw: float) -> float:
    """Return the smallest turn (rad) that fits a footprint into an axis-aligned rectangle with some play.

    `footprint` [n 2] (m) samples the held object, `room` [2] are the rectangle's sides (m), `yaw` is the
    hand's (rad): the wrist limits the turn.
    """

    def cost(turn: float) -> float:
        sides = np.ptp(footprint @ about_z(turn)[:2, :2].T, axis=0)
        too_wide = float(np.maximum(sides + MARGIN - room, 0.0).sum())
        twisted = max(0.0, abs(yaw + turn) - COMFORTABLE_YAW)
        return 100.0 * too_wide + 0.1 * abs(turn) + 5.0 * twisted

    return float(min(TURNS, key=cost))


def open_fingers(yaw: float) -> Array:
    """Return points [n 2] under the open fingers, relative to the grip point."""
    along, aside = np.meshgrid([-0.075, -0.055, -0.035, 0.035, 0.055, 0.075], [-0.012, 0.0, 0.012])
    return along.reshape(-1, 1) * closing_axis(yaw) + aside.reshape(-1, 1) * side_axis(yaw)


def thinned(points: Array) -> Array:
    """Return those of `points` [n 2] that differ when rounded to 2 mm, as they are rounded."""
    return 0.002 * np.unique(np.round(points / 0.002), axis=0)


def clearance(footprint: Array, obstacles: Array) -> float:
    """Return the smallest distance (m) between two sets of points [n 2] and [m 2]; inf if one is empty."""
    if not len(footprint) or not len(obstacles):
        return float("inf")
    return float(KDTree(obstacles).query(footprint)[0].min())


def shared_spot(footprint: Array, obstacles: Array, centre: Array, half_extents: Array, base: Array) -> Array:
    """Return a spot [2] for one of several objects that share a region.

    A spot is good if it leaves 6 cm around the object and the fingers that let it go, then if it is far from
    the middle of the region, which leaves room for the next object, and not too far for the arm.

    `footprint` [n 2] is relative to the object's origin and includes the fingers, `obstacles` [m 2] stand
    there already, `centre` and `half_extents` [2] are the region's, `base` [2] is the robot's (all m).
    """
    steps = SPREAD * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    spots = [centre + half_extents * np.array([x, y]) for x in steps for y in steps]

    def cost(spot: Array) -> float:
        free = min(clearance(footprint + spot, obstacles), ENOUGH)
        stretched = max(0.0, float(np.linalg.norm(spot - base)) - COMFORTABLE_REACH)
        return -free - 0.1 * float(np.linalg.norm(spot - centre)) + 0.5 * stretched

    return min(spots, key=cost)


def put(cell: Workcell, name: str, target: str) -> Skill:
    """Bring object `name` to `target`, by the skill that fits the shapes of both."""
    body = body_of(cell, name)
    if _is_flat(cell.scene.cloud(body)) and not is_object(cell, target):
        return (yield from carry_flat(cell, body, region(cell, target).centre[:2]))
    if is_chamber(cell, target):
        return (yield from insert(cell, body, target))
    request = _request(cell, target)
    for _ in cell.attempts(CARRIES):
        held = yield from grasp(cell, body, request)
        if held is None:
            return False
        yield from slide_out(cell, body, down(held.yaw))
        turn, placement = _free_placement(cell, body, target, held.yaw)
        if (yield from place(cell, body, down(held.yaw + turn), placement)):
            return True
    return False


def unreachable(cell: Workcell, goal: Goal) -> str:
    """Return why the arm cannot take what a predicate names or bring it there; empty where nothing is known.

    Nothing moves: it is a check of a scene before an episode. What is pushed in is not checked.
    """
    if goal[0] not in ("on", "in"):
        return ""
    _, name, target = goal
    body = body_of(cell, name)
    if is_object(cell, target) or target.endswith(CONTAINER):
        owner = target if is_object(cell, target) else parent_of(cell, target)
        support = body_of(cell, owner)
        over = np.array([*cell.scene.position(support)[:2], cell.scene.top(support) + HOVER])
        if not cell.clearance.reaches(over, down(0.0)):
            return f"the hand does not reach over {owner}"
    if _is_flat(cell.scene.cloud(body)) and not is_object(cell, target):
        return _undrawable(cell, body, region(cell, target).centre[:2])
    if is_chamber(cell, target):
        return ""
    try:
        planned = plan_grasp(cell.scene, body, _request(cell, target), partial(cell.is_blocked, body))
    except NoGraspError as error:
        return str(error)
    if cell.is_blocked(body, planned):
        return f"the arm touches something at every grasp of {name}"
    if not cell.clearance.reaches(planned.position, down(planned.yaw)):
        return f"the hand does not reach {name}"
    return ""


def _undrawable(cell: Workcell, body: str, xy: Array) -> str:
    """Return why a plate cannot be drawn to `xy` [2] at the first try; empty where it can."""
    rim = cell.scene.bottom(body) + RIM_GRIP
    if _flat_lift(cell, body, xy, rim) > FLAT_LIFT:
        return f"something stands in the way of {body}"
    base, start = cell.scene.position("robot0_base")[:2], cell.scene.position(body)[:2]
    if np.linalg.norm(xy - base) > np.linalg.norm(start - base) + DRAWN_AWAY:
        return f"{body} would be pushed away from the robot"  # its far edge catches on the table
    return ""


def _request(cell: Workcell, target: str) -> GraspRequest:
    """Return the grasp for an object that goes to `target`: into a drawer the hand comes in from the side.

    A hand is wide along its closing axis. Across the drawer it passes what protrudes above it, and the
    object is not turned on the way.
    """
    if is_object(cell, target) or joint_of(cell, target) is None:
        return GraspRequest()
    outwards = Drawer(cell, target).outwards[:2]
    across = np.array([-outwards[1], outwards[0]])
    towards_robot = (cell.scene.position("robot0_base") - region(cell, target).centre)[:2] @ across
    return GraspRequest(side=across if towards_robot > 0 else -across)


def _is_flat(cloud: Array) -> bool:
    """A plate: too wide for the hand and too low for a rim that fingers could go around."""
    return bool(np.ptp(cloud[:, 2]) < 0.035 and np.ptp(cloud[:, :2], axis=0).min() > 0.09)


def _turn(cell: Workcell, body: str, target: str, yaw: float) -> float:
    """Return how far (rad) the held `body` has to be turned to fit into the compartment `target`."""
    if not target.endswith(CONTAINER):
        return 0.0
    return fitting_turn(cell.scene.cloud(body)[:, :2], 2 * region(cell, target).half_extents[:2], yaw)


def _free_placement(cell: Workcell, body: str, target: str, yaw: float) -> tuple[float, Placement]:
    """Return the turn (rad) and the placement of the held `body` with which the arm touches nothing.

    The first way that is free with a centimetre to spare, the plainest first; else the freest.
    """
    fitting = _turn(cell, body, target, yaw)
    turns = [fitting]
    in_drawer = joint_of(cell, target) is not None
    most, shifting = (MOST_TURN, SHIFTING) if in_drawer else (np.pi, SHIFTING_OPEN)
    if not target.endswith(CONTAINER):
        turns += [turn for turn in SIDEWAYS if abs(turn) <= most and abs(yaw + turn) < COMFORTABLE_YAW]
    ways = [(turn, shift) for turn in turns for shift in _shifts(cell, body, target)]

    standing = _neighbours(cell, body, target)

    def departure(way: tuple[float, Array]) -> float:
        turn, shifted = way[0] - fitting, float(np.linalg.norm(way[1]))
        if not len(standing) or not (turn or shifted):
            return abs(turn) + OTHER_WAY * (turn < 0) + shifting * shifted
        # One way beside a neighbour: a quarter turn takes the wide hand along it, as far away as possible.
        away = float(np.linalg.norm(standing - region(cell, target).centre[:2] - way[1], axis=1).min())
        return np.pi + abs(turn - QUARTER) - shifting * away

    ways.sort(key=departure)
    plain: dict[float, Placement] = {}
    best, fewest = (fitting, _placement(cell, body, target, yaw + fitting)), 2 * len(JITTER) + 1
    for turn, shift in ways:
        if turn not in plain:
            plain[turn] = _placement(cell, body, target, yaw + turn)
            if target.endswith(CONTAINER):  # an object's origin need not be its middle
                turned = _footprint(cell, body, turn)
                plain[turn] = replace(plain[turn], xy=plain[turn].xy - (turned.min(0) + turned.max(0)) / 2)
        shifted = replace(plain[turn], xy=plain[turn].xy + shift)
        touched = _touching(cell, body, yaw, turn, shifted)
        obstacles = _overhung if in_drawer else _crowded
        touched += len(JITTER) * obstacles(cell, body, target, turn, shifted)
        if touched < fewest:
            best, fewest = (turn, shifted), touched
        if not touched:
            break
    return best


def _shifts(cell: Workcell, body: str, target: str) -> list[Array]:
    """Return shifts [2] from the middle of `target` to try, none of which takes the object out of it."""
    middle = np.zeros(2)
    if is_object(cell, target) or target.endswith(CONTAINER):
        return [middle]
    half = region(cell, target).half_extents[:2]
    if joint_of(cell, target) is None:
        return [middle, *(share * half * direction for share in (0.5, 0.8) for direction in DIRECTIONS)]
    outwards = Drawer(cell, target).outwards[:2]  # the front of a drawer lies farther from its cabinet
    axes = np.stack([outwards, [-outwards[1], outwards[0]]])
    size = np.ptp(cell.scene.cloud(body)[:, :2] @ axes.T, axis=0)
    room = np.maximum(0.0, np.abs(axes) @ half - size / 2 - WALL_GAP)
    return [room * [out, aside] @ axes for out in (0.0, 0.5, 1.0) for aside in (0.0, 0.6, -0.6)]


def _footprint(cell: Workcell, body: str, turn: float) -> Array:
    """Return the points [n 2] under the held `body` turned by `turn` rad, relative to its origin (m)."""
    return (cell.scene.cloud(body) - cell.scene.position(body))[:, :2] @ about_z(turn)[:2, :2].T


def _overhung(cell: Workcell, body: str, target: str, turn: float, placement: Placement) -> bool:
    """Return whether `body` would meet what protrudes above the drawer `target` on its way down into it."""
    footprint = _footprint(cell, body, turn)
    obstacles = cell.scene.obstacles((body, Drawer(cell, target).body))
    above_it = obstacles[obstacles[:, 2] > placement.support + IN_BELOW, :2] - placement.xy
    above_it = above_it[np.abs(above_it).max(axis=1) < np.abs(footprint).max() + GRAZE]
    return clearance(thinned(footprint), thinned(above_it)) < GRAZE


def _others(cell: Workcell, body: str) -> Array:
    """Return the points [n 2] of the other objects."""
    bodies = [body_of(cell, name) for name in cell.env.objects_dict]
    return np.concatenate(
        [cell.scene.cloud(other)[:, :2] for other in bodies if other != body] or [np.zeros((0, 2))]
    )


def _neighbours(cell: Workcell, body: str, target: str) -> Array:
    """Return the points [n 2] of other objects around an open region that is for `body` alone, else none."""
    shared = sum(wanted[-1] == target for wanted in goals(cell)) > 1
    if shared or is_object(cell, target) or target.endswith(CONTAINER) or joint_of(cell, target) is not None:
        return np.zeros((0, 2))
    return _others(cell, body)


def _crowded(cell: Workcell, body: str, target: str, turn: float, placement: Placement) -> bool:
    """Return whether `body` in the open region `target` would meet another object, such as a plate's edge."""
    if is_object(cell, target) or target.endswith(CONTAINER):
        return False
    standing = _others(cell, body)
    return clearance(thinned(_footprint(cell, body, turn)), thinned(standing - placement.xy)) < BESIDE_OTHERS


def _touching(cell: Workcell, body: str, yaw: float, turn: float, placement: Placement) -> int:
    """Return how many poses near that in which the hand lets `body` go have the arm touch anything else."""
    offset = about_z(turn) @ (cell.arm.position - cell.scene.position(body))
    hanging = cell.arm.position[2] - cell.scene.bottom(body)
    height = placement.support + placement.drop + hanging
    hand, rotation = np.array([*(placement.xy + offset[:2]), height]), down(yaw + turn)
    return sum(bool(cell.clearance.touched(hand + shift, rotation) - {body}) for shift in JITTER)


def _spot(cell: Workcell, body: str, target: str, yaw: float) -> Array:
    """Return the spot [2] of the region `target` for the held `body`: its middle, unless others go there."""
    goal = region(cell, target)
    if sum(wanted[-1] == target for wanted in goals(cell)) < 2:
        return goal.centre[:2]
    origin = cell.scene.position(body)
    fingers = open_fingers(yaw) + (cell.arm.position - origin)[:2]
    footprint = np.concatenate([cell.scene.cloud(body)[:, :2] - origin[:2], fingers])
    standing = near(cell.scene.obstacles((body,)), goal.centre[None])
    standing = standing[standing[:, 2] > goal.centre[2] + STANDING]
    base = cell.scene.position("robot0_base")[:2]
    return shared_spot(footprint, standing[:, :2], goal.centre[:2], goal.half_extents[:2], base)


def _placement(cell: Workcell, body: str, target: str, yaw: float) -> Placement:
    """Return where the held `body` has to be set down for `target`."""
    scene = cell.scene
    if is_object(cell, target):
        support = body_of(cell, target)
        cloud, origin = scene.cloud(support), scene.position(support)
        below = np.linalg.norm(cloud[:, :2] - origin[:2], axis=1) < 0.035
        return Placement(origin[:2], float(cloud[below, 2].max()))
    goal = region(cell, target)
    hanging = cell.arm.position[2] - scene.bottom(body)
    if target.endswith(CONTAINER):
        rim = scene.top(body_of(cell, parent_of(cell, target)))
        # As deep as the hand can go without touching the rim.
        depth = max(rim - 0.06, rim + 0.012 - hanging)
        return Placement(goal.centre[:2], depth, drop=0.0, let_go=not _too_deep(cell, body, target))
    if joint_of(cell, target) is not None:
        floor, top = goal.centre[2] - goal.half_extents[2], goal.centre[2] + goal.half_extents[2]
        return Placement(goal.centre[:2], max(floor, top - 0.008 - hanging), drop=0.004)
    return Placement(_spot(cell, body, target, yaw), float(goal.centre[2]))


def _too_deep(cell: Workcell, body: str, target: str) -> bool:
    """Return whether LIBERO's check fails once `body` stands on the floor of the compartment `target`.

    The regions of the desk caddy end above its floor: an object counts as inside only while it is held.
    """
    goal, scene = region(cell, target), cell.scene
    walls = scene.cloud(body_of(cell, parent_of(cell, target)))
    inside = np.abs(walls - goal.centre)[:, :2] < 0.8 * goal.half_extents[:2]
    floor = walls[inside.all(1) & (walls[:, 2] < goal.centre[2]), 2]
    origin = float(scene.position(body)[2]) - scene.bottom(body)
    return bool(len(floor) and floor.max() + origin < goal.centre[2] - goal.half_extents[2] - IN_BELOW)


def slide_out(cell: Workcell, body: str, rotation: Array) -> Skill:
    """Slide a held object out horizontally if something overhangs it, before it is lifted."""
    cloud, obstacles = cell.scene.cloud(body), cell.scene.obstacles((body,))
    centre, radius = cloud[:, :2].mean(0), np.ptp(cloud[:, 0]) / 2 + 0.004
    above_it = obstacles[:, 2] > cloud[:, 2].max() + 0.004
    if not np.any(above_it & (np.linalg.norm(obstacles[:, :2] - centre, axis=1) < radius)):
        return True
    base = cell.scene.position("robot0_base")[:2]
    high = obstacles[obstacles[:, 2] > cloud[:, 2].min() + 0.02, :2]

    def cost(shift: Array) -> float:
        hit = np.count_nonzero(np.linalg.norm(high - centre - shift, axis=1) < radius)
        return (
            hit + 100.0 * float(np.linalg.norm(shift)) + 20.0 * float(np.linalg.norm(centre + shift - base))
        )

    shifts = [r * np.array([np.cos(a), np.sin(a)]) for a in ANGLES for r in (0.04, 0.07, 0.10, 0.13)]
    shift = min(shifts, key=cost)
    goal = cell.arm.position + np.array([*shift, 0.0])
    return (yield from cell.arm.move(goal, rotation, CLOSED, Reach(0.015)))


def carry_flat(cell: Workcell, body: str, xy: Array) -> Skill:
    """Pinch a plate's rim on the side that faces its goal, lift that side and take the plate there.

    Where the way is free, the far edge stays on the table and the plate is drawn; else it is lifted over
    everything in between, hanging aslant. Up to three times, until its origin is at `xy` [2].
    """
    radius = float(np.ptp(cell.scene.cloud(body)[:, 0])) / 2

    def is_there() -> bool:
        return bool(np.linalg.norm(xy - cell.scene.position(body)[:2]) < AT_GOAL)

    if is_there():
        return True
    for _ in cell.attempts(3):
        centre = cell.scene.position(body)
        way = xy - centre[:2]
        heading = np.array([*(way / np.linalg.norm(way)), 0.0])
        rotation = down(wrap(float(np.arctan2(way[1], way[0])) - np.pi / 2, np.pi))
        rim = centre + heading * radius
        rim[2] = cell.scene.bottom(body) + RIM_GRIP
        lift = _flat_lift(cell, body, xy, rim[2])
        yield from transit(cell, above(rim, ABOVE_GRASP), rotation, OPEN, clearance=0.03)
        yield from descend(cell, rim, rotation)
        yield from cell.arm.hold(rim, rotation, CLOSED, CLOSING_STEPS)
        yield from cell.arm.move(above(rim, lift), rotation, CLOSED, Reach(0.01, 9.0, speed=0.5))
        for height in (lift, lift, 0.0):
            rest = xy - cell.scene.position(body)[:2]
            goal = np.array([*(cell.arm.position[:2] + rest), rim[2] + height])
            if np.linalg.norm(cell.arm.position[:2] - cell.scene.position(body)[:2]) < radius + LOST:
                yield from cell.arm.move(goal, rotation, CLOSED, CARRYING)
        yield from release(cell, rotation, ABOVE_GRASP)
        if is_there():
            return True
    return False


def _flat_lift(cell: Workcell, body: str, xy: Array, rim: float) -> float:
    """Return how far (m) to lift the edge, at height `rim`, of a plate that has to go to `xy` [2]."""
    cloud = cell.scene.cloud(body)
    diameter = float(np.ptp(cloud[:, 0]))
    obstacles = cell.scene.obstacles((body,))
    top = corridor_top(obstacles, cell.scene.position(body), xy, diameter / 2 + BESIDE_PLATE)
    return FLAT_LIFT if top < rim + FLAT_LIFT else top + diameter - rim


def pull_from_below(cell: Workcell, body: str, target: str, opening: float) -> Skill:
    """Take `body` away from where the drawer `target` will overhang it, once it is opened by `opening` m."""
    to_pull = overhang(cell, body, target, opening)
    if not to_pull.any():
        return True
    held = yield from grasp(cell, body)
    if held is None:
        return False
    goal = cell.arm.position + to_pull
    yield from cell.arm.move(goal, down(held.yaw), CLOSED, CARRYING)
    lowered = above(goal, held.position[2] - goal[2])
    yield from cell.arm.move(lowered, down(held.yaw), CLOSED, CARRYING)
    return (yield from release(cell, down(held.yaw), ABOVE_GRASP))


LIFT_HEIGHT = 0.10  # m; the check requires 0.04 above the table
NUT_SETTLING_STEPS = 12  # the nut drops about 6 cm after reset
NUT = "SquareNut_main"
FARTHEST_HAND = 0.80  # m from the base; beyond it an arm that points down is stretched out
PEG_SINK = 0.05  # m that the nut must be below the peg's top before it is let go


def lift(cell: Workcell) -> Skill:
    """Lift, LiftWide: grasp the cube across its nearest pair of faces and raise it, up to three times.

    The hand turns by at most 45 degrees for every cube pose.
    """
    if cell.detour.any():
        yield from _approach_beside(cell, "cube_main")
    for _ in cell.attempts(3):
        yaw = nearest_equivalent(_body_yaw(cell, "cube_main"), cell.arm.yaw, np.pi / 2)
        rotation = down(wrap(yaw))
        position = cell.scene.position("cube_main")
        yield from cell.arm.move(above(position, ABOVE_GRASP), rotation, OPEN, Reach(0.012, 0.08))
        yield from cell.arm.move(position, rotation, OPEN, PRECISE)
        yield from cell.arm.hold(position, rotation, CLOSED, 8)
        raised = above(position, LIFT_HEIGHT)
        yield from cell.arm.move(raised, rotation, CLOSED, Reach(0.015, 9.0))
        if cell.scene.position("cube_main")[2] > position[2] + LIFT_HEIGHT / 2:
            return (yield from cell.arm.hold(raised, rotation, CLOSED, 5))
    return False


def _approach_beside(cell: Workcell, body: str) -> Skill:
    """Go above `body`, off by the detour, so that the recording shows a correction."""
    shift, turn = [*cell.detour[:2], ABOVE_GRASP], cell.detour[2]
    yaw = nearest_equivalent(_body_yaw(cell, body), cell.arm.yaw, np.pi / 2)
    beside = cell.scene.position(body) + shift
    return (yield from cell.arm.move(beside, down(wrap(yaw + turn)), OPEN, Reach(0.02, 0.15)))


def stack(cell: Workcell) -> Skill:
    """Stack: set cube A on cube B, let go and retreat."""
    held = yield from grasp(cell, "cubeA_main")
    if held is None:
        return False
    below = cell.scene.position("cubeB_main")
    goal = Placement(below[:2], cell.scene.top("cubeB_main"), drop=0.004)
    return (yield from place(cell, "cubeA_main", down(held.yaw), goal))


def pick_place_can(cell: Workcell) -> Skill:
    """PickPlaceCan: carry the can over the wall between the bins and set it into its quarter."""
    held = yield from grasp(cell, "Can_main")
    if held is None:
        return False
    target = cell.env.target_bin_placements[cell.env.object_to_id["can"]]
    goal = Placement(np.array(target[:2]), float(cell.env.bin2_pos[2]), drop=0.02, retreat=0.15)
    return (yield from place(cell, "Can_main", down(held.yaw), goal))


def nut_assembly_square(cell: Workcell) -> Skill:
    """NutAssemblySquare: take the nut by its handle, turn it square to the peg, lower it over the peg."""
    yield from cell.arm.hold(cell.arm.position, cell.arm.rotation, OPEN, NUT_SETTLING_STEPS)
    yaw = yield from _grasp_handle(cell)
    if yaw is None:
        return False
    peg_xy, peg_top = cell.scene.position("peg1")[:2], cell.scene.top("peg1")
    rotation = down(yaw + _turn_to_square(cell, peg_xy, yaw))
    here = cell.arm.position
    height = max(here[2], peg_top + 0.06)
    yield from cell.arm.move([here[0], here[1], height], rotation, CLOSED, Reach(0.02, 0.05, steps=60))
    for _ in range(3):
        goal = _above_peg(cell, peg_xy, height)
        yield from cell.arm.move(goal, rotation, CLOSED, Reach(0.004, 0.04, steps=100))
    threaded = yield from _lower_over_peg(cell, peg_xy, peg_top, rotation)
    yield from release(cell, rotation, 0.10)
    return threaded


def _grasp_handle(cell: Workcell) -> Generator[Command, None, float | None]:
    """Grasp the nut by its handle and lift it; return the hand's yaw (rad), or None after three tries."""
    site = cell.env.sim.model.site_name2id("SquareNut_handle_site")
    for _ in cell.attempts(3):
        handle = np.array(cell.env.sim.data.site_xpos[site])
        along = (handle - cell.scene.position(NUT))[:2]
        # The fingers close across the handle: the closing axis is a quarter turn from the handle's direction.
        yaw = wrap(float(np.arctan2(along[1], along[0])), np.pi)
        rotation = down(yaw)
        position = np.array([handle[0], handle[1], cell.scene.top(NUT) - 0.012])
        yield from transit(cell, above(position, ABOVE_GRASP), rotation, OPEN, clearance=0.03)
        yield from descend(cell, position, rotation)
        yield from cell.arm.hold(position, rotation, CLOSED, CLOSING_STEPS)
        before = cell.scene.bottom(NUT)
        yield from cell.arm.move(above(position, 0.10), rotation, CLOSED, CLEARING)
        if cell.scene.bottom(NUT) > before + 0.05:
            return yaw
        yield from cell.arm.hold(cell.arm.position, rotation, OPEN, OPENING_STEPS)
    return None


def _body_yaw(cell: Workcell, body: str) -> float:
    """Return the heading (rad) of the body's x axis, seen from above."""
    rotation = cell.scene.rotation(body)
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _turn_to_square(cell: Workcell, peg_xy: Array, hand_yaw: float) -> float:
    """Return the turn (rad) that makes the nut parallel to the world's axes within reach of arm and wrist."""
    offset = (cell.arm.position - cell.scene.position(NUT))[:2]
    base = cell.scene.position("robot0_base")[:2]

    def cost(turn: float) -> float:
        hand_xy = peg_xy + about_z(turn)[:2, :2] @ offset
        too_far = max(0.0, float(np.linalg.norm(hand_xy - base)) - FARTHEST_HAND)
        return abs(hand_yaw + turn) + 0.3 * abs(turn) + 50.0 * too_far

    return min((wrap(quarter * np.pi / 2 - _body_yaw(cell, NUT)) for quarter in range(4)), key=cost)


def _above_peg(cell: Workcell, peg_xy: Array, height: float) -> Array:
    """Return the hand position [3] that centres the held nut over the peg."""
    offset = (cell.scene.position(NUT) - cell.arm.position)[:2]
    return np.array([*(peg_xy - offset), height])


def _lower_over_peg(cell: Workcell, peg_xy: Array, peg_top: float, rotation: Array) -> Skill:
    """Lower the nut step by step, keeping it centred; True once it is below the peg's top."""
    for _ in range(60):
        if cell.scene.bottom(NUT) < peg_top - PEG_SINK:
            return True
        below = _above_peg(cell, peg_xy, cell.arm.position[2] - 0.02)
        yield Command(cell.arm.command(below, rotation, CLOSED), PRECISE.noise_share)
    return False


DEMONSTRATORS: dict[str, Callable[[Workcell], Skill]] = {
    "lift": lift,
    "lift_wide": lift,
    "stack": stack,
    "pick_place_can": pick_place_can,
    "nut_assembly_square": nut_assembly_square,
}
