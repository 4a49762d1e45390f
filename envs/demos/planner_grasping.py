"""Grasps and the skills built on them: transit, descend, grasp, place, release.

Grasps are planned on point clouds of collision geometry. A skill is a generator of commands.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from envs.demos.planner_arm import (
    ALIGNED,
    CLEARING,
    CLOSED,
    LOWERING,
    OPEN,
    PASSING,
    PRECISE,
    Arm,
    ArmClearance,
    Array,
    Command,
    Reach,
    Skill,
    above,
    down,
    wrap,
)
from envs.rendering import load_mujoco

SPACING = 0.012  # m; less than the width of a finger (about 0.02), so no finger fits between points
ROBOT_PREFIXES = ("robot0", "gripper0", "mount0")
SUPPORTS = ("world", "floor", "table")  # endings of what objects stand on: no obstacle to a hand above it
MAX_WIDTH = 0.077  # m; the Panda opens 0.08
HALF_OPEN = 0.04  # m from the grip point to the inner face of an open finger
FINGER_REACH = 0.03  # m below the top of an object that the fingers go, where it is tall enough
RIM_REACH = 0.016
FLOOR_GAP = 0.011  # m that the grip point stays above the lowest point of the object
COMFORTABLE_REACH = 0.70  # m from the base of the robot; farther away the elbow nears its limit
MOST_PREDICTED = 40  # grasps for which the arm's posture is predicted, each in some milliseconds
NEIGHBOURHOOD = 0.25  # m around an object that the hand can touch while grasping it
# Two fingers look the same every half turn. The range ends where few objects want it, or equal poses of an
# object would be grasped with opposite turns. Beyond a quarter turn the wrist has more room at positive yaws.
YAWS = np.deg2rad(np.arange(-75.0, 105.0, 2.5))
MOST_YAW = float(YAWS.max())
RIGHT_RIM_COST = 0.1  # so that equally good sides of a rim are not chosen by chance
OTHER_SIDE_COST = 4.0  # of grasping a rim opposite to the requested side
RIM_ANGLES = np.deg2rad(np.arange(0.0, 360.0, 10.0))
CLOSING_STEPS = 11  # until the fingers press with full force
OPENING_STEPS = 8
CORRIDOR = 0.10  # m to each side of the hand's path that must be free
ABOVE_GRASP = 0.06  # m
SLIPPED = 0.04  # m by which a held body has moved in the hand that no longer holds it
TIGHT = 0.066  # m; a body as wide as that leaves each open finger a few millimetres
TIGHT_ALIGNED = 0.002  # m of error at which the hand goes down on it
HANDLE = 0.03  # m; a part as narrow as that can be grasped instead of a body that is tight
HANDLE_REACH = 0.02  # m below its top
HANDLE_STEP = 0.005  # m between the places where one is looked for
FINGER_WIDTH, PAD_HEIGHT = 0.036, 0.018  # m
STUCK = 0.02  # m above its goal at which a lowered object sits on something
BESIDE, BESIDE_TRIES, RISE = 0.01, 3, 0.02  # m aside, how often, after rising by these metres
NEAREST = 0.36  # m from the axis of the robot's base; a hand that rises nearer folds the elbow to its limit


def _samples(half_length: float) -> Array:
    count = max(2, int(np.ceil(2 * half_length / SPACING)) + 1)
    return np.linspace(-half_length, half_length, count)


def box_surface(half_extents: Array) -> Array:
    """Return points [n 3] on the six faces of a box centred at the origin with these half extents [3]."""
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
    """Return points [n 3] on the mantle of an upright cylinder centred at the origin, both rims included."""
    angles = np.linspace(0.0, 2 * np.pi, sides, endpoint=False)
    angle, height = np.meshgrid(angles, _samples(half_height))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=-1).reshape(-1, 3)


def sphere_surface(radius: float, sides: int = 16) -> Array:
    """Return points [n 3] on a sphere around the origin, on equally spaced rings, poles included."""
    heights = np.linspace(-radius, radius, sides // 2 + 1)
    rings = np.sqrt(np.maximum(radius**2 - heights**2, 0.0))
    angles = np.linspace(0.0, 2 * np.pi, sides, endpoint=False)
    x, y = np.outer(rings, np.cos(angles)), np.outer(rings, np.sin(angles))
    z = np.broadcast_to(heights[:, None], x.shape)
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)


class Scene:
    """Point clouds (world frame, metres) of every colliding body of one robosuite simulation.

    Shapes are sampled once; each query only places the sampled points at the bodies' present poses.
    """

    def __init__(self, sim: Any) -> None:
        """Sample the shapes of `sim`, the `MjSim` of a robosuite 1.4 environment."""
        self._mujoco = load_mujoco()
        self.model: Any = sim.model._model
        self.data: Any = sim.data._data
        self._shapes: dict[int, Array] = {}  # geom id -> points in the frame of the geom
        self._geoms: dict[str, list[int]] = {}  # body name -> ids of its colliding geoms
        for geom in range(self.model.ngeom):
            points = self._sample(geom)
            if points is not None:
                self._shapes[geom] = points
                self._geoms.setdefault(self.model.body(self.model.geom_bodyid[geom]).name, []).append(geom)

    def _sample(self, geom: int) -> Array | None:
        """Return surface points of one geom in its own frame; None where it never collides or is a plane."""
        model, size, kinds = self.model, self.model.geom_size[geom], self._mujoco.mjtGeom
        if model.geom_contype[geom] == 0 and model.geom_conaffinity[geom] == 0:
            return None
        match model.geom_type[geom]:
            case kinds.mjGEOM_BOX:
                return box_surface(size)
            case kinds.mjGEOM_CYLINDER:
                return cylinder_surface(size[0], size[1])
            case kinds.mjGEOM_CAPSULE:
                return cylinder_surface(size[0], size[0] + size[1])
            case kinds.mjGEOM_SPHERE:
                return sphere_surface(size[0])
            case kinds.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
                return np.array(model.mesh_vert[start : start + count], dtype=np.float64)
            case _:
                return None

    def refresh(self) -> None:
        """Bring poses in line with the joints: after a simulation step they lag one substep behind."""
        self._mujoco.mj_kinematics(self.model, self.data)

    def __contains__(self, body: str) -> bool:
        """Return whether `body` has collision geometry here."""
        return body in self._geoms

    def cloud(self, body: str) -> Array:
        """Return points [n 3] on `body`, where it is now."""
        if body not in self._geoms:
            known = sorted(self._geoms)
            raise KeyError(f"no body {body!r} with collision geometry in this scene; known: {known}")
        xmat, xpos = self.data.geom_xmat, self.data.geom_xpos
        return np.concatenate(
            [self._shapes[geom] @ xmat[geom].reshape(3, 3).T + xpos[geom] for geom in self._geoms[body]]
        )

    def obstacles(self, excluded: Collection[str] = ()) -> Array:
        """Return points [n 3] on all bodies except robot, supports and the `excluded` ones."""
        clouds = list(self.standing(excluded))
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))

    def standing(self, excluded: Collection[str] = ()) -> Iterator[Array]:
        """Yield points [n 3] on each of the bodies that `obstacles` joins."""
        for body in self._geoms:
            if not self._passes(body, excluded):
                yield self.cloud(body)

    @staticmethod
    def _passes(body: str, excluded: Collection[str]) -> bool:
        return body in excluded or body.endswith(SUPPORTS) or body.startswith(ROBOT_PREFIXES)

    def position(self, body: str) -> Array:
        """Return the origin [3] of `body` in the world (m)."""
        return np.array(self.data.body(body).xpos)

    def rotation(self, body: str) -> Array:
        """Return the rotation matrix [3 3] of `body` in the world."""
        return np.array(self.data.body(body).xmat).reshape(3, 3)

    def bottom(self, body: str) -> float:
        """Return the height of the lowest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].min())

    def top(self, body: str) -> float:
        """Return the height of the highest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].max())


@dataclass(frozen=True)
class Grasp:
    """A pose of a hand that looks straight down, ready to close."""

    position: Array  # [3] grip point, m, world
    yaw: float  # rad, of the closing axis from the world's y axis
    kind: str  # "centre": around the object; "rim": one finger inside, one outside; "handle": a narrow part
    obstruction: int  # foreign points where fingers or palm would be
    offset: Array = field(default_factory=lambda: np.zeros(2))  # [2] grip point from the middle of the rim, m


@dataclass(frozen=True)
class GraspRequest:
    """Constraints of a task on a grasp."""

    yaw: float = 0.0  # rad, preferred
    yaw_limit: float = MOST_YAW  # rad, largest distance from the preferred yaw
    depth: float | None = None  # m below the top; None takes the kind's own
    kind: str | None = None  # one of `Grasp`'s; None: the first that fits, centre, handle, rim
    avoided: tuple[Array, ...] = ()  # offsets [2] of rim grasps that failed before
    side: Array | None = None  # unit vector [2] from the middle of a rim to where it is best grasped


def closing_axis(yaw: float) -> Array:
    """Return the unit vector [2] along which the fingers close."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def side_axis(yaw: float) -> Array:
    """Return the unit vector [2] across the closing axis, in the plane of the table."""
    return np.array([np.cos(yaw), np.sin(yaw)])


def comfortable_yaw(yaw: float) -> float:
    """Return the yaw (rad) of the same hand, which looks alike every half turn, in the middle of `YAWS`."""
    middle = float(YAWS.max() + YAWS.min()) / 2
    return middle + wrap(yaw - middle, np.pi)


def extents(points: Array, axis: Array) -> tuple[float, float]:
    """Return the width (m) and middle (m) of points [n 2] projected on a unit vector [2]."""
    along = points @ axis
    low, high = float(along.min()), float(along.max())
    return high - low, (high + low) / 2


def obstruction(points: Array, position: Array, yaw: float) -> int:
    """Return the number of points [n 3] inside the space of the open fingers and the palm at a grasp pose.

    The boxes are the Panda hand's, widened by its controller's error: fingers of 4 x 3.6 cm from 1.4 cm below
    the grip point upwards, a palm of 21 x 7 cm from 2.2 cm above it.
    """
    relative = points - position
    across = np.abs(relative[:, :2] @ closing_axis(yaw))
    beside = np.abs(relative[:, :2] @ side_axis(yaw))
    height = relative[:, 2]
    fingers = (
        (across > HALF_OPEN - 0.008)
        & (across < HALF_OPEN + 0.03)
        & (beside < FINGER_WIDTH / 2)
        & (height > -0.014)
    )
    palm = (across < 0.107) & (beside < 0.034) & (height > 0.022)
    return int(fingers.sum() + palm.sum())


def centre_grasps(cloud: Array, obstacles: Array, request: GraspRequest) -> Iterator[tuple[float, Grasp]]:
    """Yield grasps around a whole object with their costs: narrow, near the requested yaw and free is cheap.

    `cloud` [n 3] is the object, `obstacles` [m 3] everything around it.
    """
    top, bottom = cloud[:, 2].max(), cloud[:, 2].min()
    depth = FINGER_REACH if request.depth is None else request.depth
    height = max(top - depth, bottom + FLOOR_GAP)
    for yaw in _allowed_yaws(request):
        width, middle = extents(cloud[:, :2], closing_axis(yaw))
        if width > MAX_WIDTH:
            continue
        _, beside = extents(cloud[:, :2], side_axis(yaw))
        centre = closing_axis(yaw) * middle + side_axis(yaw) * beside
        position = np.array([centre[0], centre[1], height])
        blocked = obstruction(obstacles, position, yaw)
        yield _cost(width, yaw, blocked, request), Grasp(position, float(yaw), "centre", blocked)


def _allowed_yaws(request: GraspRequest) -> Array:
    return YAWS[np.abs(YAWS - request.yaw) <= request.yaw_limit + 1e-3]


def _cost(width: float, yaw: float, blocked: int, request: GraspRequest) -> float:
    return 100.0 * width + 0.8 * abs(yaw - request.yaw) + 0.05 * min(blocked, 200)


def handle_grasps(cloud: Array, obstacles: Array, request: GraspRequest) -> Iterator[tuple[float, Grasp]]:
    """Yield grasps of parts that are much narrower than the object with their costs, as `centre_grasps`.

    Nothing of the object may be where the open hand is.
    """
    bottom = cloud[:, 2].min()
    for yaw in _allowed_yaws(request):
        along = cloud[:, :2] @ side_axis(yaw)
        for place in np.arange(along.min(), along.max(), HANDLE_STEP):
            part = cloud[np.abs(along - place) < FINGER_WIDTH / 2]
            if not len(part):
                continue
            width, middle = extents(part[:, :2], closing_axis(yaw))
            height = max(part[:, 2].max() - HANDLE_REACH, bottom + FLOOR_GAP)
            if width > HANDLE or part[:, 2].min() > height - PAD_HEIGHT / 2:
                continue
            position = np.array([*(closing_axis(yaw) * middle + side_axis(yaw) * place), height])
            if obstruction(cloud, position, yaw):
                continue
            blocked = obstruction(obstacles, position, yaw)
            yield _cost(width, yaw, blocked, request), Grasp(position, float(yaw), "handle", blocked)


@dataclass(frozen=True)
class Rim:
    """Return the upper edge of a round vessel."""

    middle: Array  # [3] m, world
    points: Array  # [k 3] candidates on the edge, m, world


def find_rim(cloud: Array, rotation: Array, origin: Array) -> Rim:
    """Return the rim of a vessel that may stand tilted: the top 8 mm along the body axis closest to vertical.

    `cloud` [n 3] is in the world, `rotation` [3 3] and `origin` [3] are those of the object's body.
    """
    local = (cloud - origin) @ rotation
    up = int(np.argmax(np.abs(rotation[2])))
    upwards = np.sign(rotation[2, up])
    flat = [axis for axis in range(3) if axis != up]
    height = (local[:, up] * upwards).max()
    edge = local[local[:, up] * upwards > height - 0.008]
    middle = (edge.max(0) + edge.min(0)) / 2
    middle[up] = height * upwards
    radius = float(np.percentile(np.linalg.norm((edge - middle)[:, flat], axis=1), 90)) - 0.004
    ring = np.repeat(middle[None], len(RIM_ANGLES), axis=0)
    ring[:, flat[0]] += radius * np.cos(RIM_ANGLES)
    ring[:, flat[1]] += radius * np.sin(RIM_ANGLES)
    return Rim(middle @ rotation.T + origin, ring @ rotation.T + origin)


def rim_grasps(
    rim: Rim, bottom: float, obstacles: Array, base: Array, request: GraspRequest
) -> Iterator[tuple[float, Grasp]]:
    """Yield radial grasps of a rim with their costs: free, near the robot, not on the low side is cheap.

    `bottom` is the height of the object's lowest point (m), `obstacles` [m 3] everything around it, `base`
    [2] the robot's (m).
    """
    depth = RIM_REACH if request.depth is None else request.depth
    for point in rim.points:
        offset = (point - rim.middle)[:2]
        radial = np.arctan2(offset[1], offset[0])
        distance = float(np.linalg.norm(point[:2] - base))
        reach_cost = (
            distance + 25 * max(0.0, distance - COMFORTABLE_REACH) + 10 * abs(point[2] - rim.middle[2])
        )
        reach_cost += 4.0 * sum(float(np.linalg.norm(offset - failed)) < 0.022 for failed in request.avoided)
        if request.side is None:
            reach_cost += RIGHT_RIM_COST * (offset[1] < 0)
        else:
            reach_cost += OTHER_SIDE_COST * (1 - float(offset @ request.side) / float(np.linalg.norm(offset)))
        yaw = comfortable_yaw(radial - np.pi / 2)
        away = abs(yaw - request.yaw)
        if away > request.yaw_limit + 1e-6:
            continue
        position = np.array([point[0], point[1], max(point[2] - depth, bottom + FLOOR_GAP)])
        blocked = obstruction(obstacles, position, yaw)
        cost = reach_cost + 0.5 * away + 0.04 * min(blocked, 2000)
        yield cost, Grasp(position, yaw, "rim", blocked, offset)


class FailedAttemptError(Exception):
    """Something did not succeed at once, in a recording that must not show failures."""


class NoGraspError(Exception):
    """No grasp of an object fits in its present pose; the episode fails, as it does for a robot."""


def plan_grasp(
    scene: Scene,
    body: str,
    request: GraspRequest | None = None,
    is_blocked: Callable[[Grasp], bool] = lambda planned: False,
) -> Grasp:
    """Return the cheapest grasp of `body` in its present pose and surroundings; NoGraspError without any.

    `is_blocked` says whether the arm cannot be where a grasp needs it. It is called from the cheapest grasp
    onwards, until one is free; if none is, the cheapest is taken.
    """
    request = request or GraspRequest()
    cloud = scene.cloud(body)
    obstacles = near(scene.obstacles((body,)), cloud)
    grasps: list[tuple[float, Grasp]] = []
    if request.kind in (None, "centre"):
        grasps = list(centre_grasps(cloud, obstacles, request))
    tight = all(extents(cloud[:, :2], closing_axis(planned.yaw))[0] > TIGHT for _, planned in grasps)
    if request.kind == "handle" or (grasps and tight and request.kind is None):
        grasps = list(handle_grasps(cloud, obstacles, request)) or grasps
    if not grasps and request.kind in (None, "rim"):
        rim = find_rim(cloud, scene.rotation(body), scene.position(body))
        base = scene.position("robot0_base")[:2]
        grasps = list(rim_grasps(rim, float(cloud[:, 2].min()), obstacles, base, request))
    if not grasps:
        kind = request.kind or "possible"
        raise NoGraspError(
            f"no {kind} grasp of {body!r} within {request.yaw_limit:.2f} rad of yaw {request.yaw:.2f}"
        )
    ranked = [planned for _, planned in sorted(grasps, key=lambda pair: pair[0])]
    return next((planned for planned in ranked[:MOST_PREDICTED] if not is_blocked(planned)), ranked[0])


def near(points: Array, cloud: Array) -> Array:
    """Return those of `points` [n 3] within reach of a hand that grasps `cloud` [m 3], seen from above."""
    low, high = cloud[:, :2].min(0) - NEIGHBOURHOOD, cloud[:, :2].max(0) + NEIGHBOURHOOD
    return points[np.all((points[:, :2] > low) & (points[:, :2] < high), axis=1)]


@dataclass(frozen=True)
class Workcell:
    """The scene and the arm in it: the state that skills read."""

    scene: Scene
    arm: Arm
    clearance: ArmClearance
    env: Any  # the raw robosuite environment, for task-specific geometry (pegs, bins, goals)
    detour: Array = field(default_factory=lambda: np.zeros(3))  # x, y (m), yaw (rad) of the first approach
    retries: bool = True  # whether a failed grasp is tried again

    @classmethod
    def of(cls, raw: Any, detour: Array | None = None, retries: bool = True) -> Workcell:
        """Return the workcell of a raw robosuite 1.4 (or LIBERO) environment that has just been reset."""
        clearance = ArmClearance(raw.sim, raw.robots[0])
        detour = np.zeros(3) if detour is None else detour
        return cls(Scene(raw.sim), Arm(raw.sim), clearance, raw, detour, retries)

    def attempts(self, most: int) -> Iterator[int]:
        """Yield the numbers of up to `most` attempts; FailedAttemptError at a second one without retries."""
        for attempt in range(most):
            if attempt and not self.retries:
                raise FailedAttemptError("an attempt failed, and the demonstrator has no retries")
            yield attempt

    def is_blocked(self, body: str, planned: Grasp) -> bool:
        """Return whether the arm touches anything but `body` where a grasp needs it."""
        return bool(self.clearance.touched(planned.position, down(planned.yaw)) - {body})


def corridor_top(points: Array, start: ArrayLike, end: ArrayLike, radius: float = CORRIDOR) -> float:
    """Return the height (m) of the highest of `points` [n 3] on or beside the way; -inf if it is free."""
    first, last = np.asarray(start, dtype=np.float64)[:2], np.asarray(end, dtype=np.float64)[:2]
    way = last - first
    share = np.clip((points[:, :2] - first) @ way / (way @ way + 1e-9), 0.0, 1.0)
    aside = np.linalg.norm(points[:, :2] - (first + share[:, None] * way), axis=1)
    return float(points[aside < radius, 2].max(initial=-np.inf))


def away_from_base(cell: Workcell, position: Array) -> Array:
    """Return the point [3] itself, or the nearest one at its height far enough from the robot's base."""
    base = cell.scene.position("robot0_base")[:2]
    out = position[:2] - base
    short = NEAREST / float(np.linalg.norm(out))
    return position if short < 1.0 else np.array([*(base + short * out), position[2]])


def transit(
    cell: Workcell,
    position: ArrayLike,
    rotation: Array,
    gripper: float,
    carried: str | None = None,
    clearance: float = 0.05,
) -> Skill:
    """Go over everything in between to a point at or above `position`: up, then across.

    `position` [3] (m) and `rotation` [3 3] are the goal of the grip site, `carried` is the body in the hand
    and `clearance` (m) the distance between the highest obstacle and the lowest carried point.
    """
    goal, here = np.asarray(position, dtype=np.float64), cell.arm.position
    hanging = here[2] - cell.scene.bottom(carried) if carried else 0.012
    obstacles = cell.scene.obstacles((carried,) if carried else ())
    height = max(goal[2], corridor_top(obstacles, here, goal) + hanging + clearance)
    if here[2] < height - 0.02:
        upright = rotation if carried else cell.arm.rotation
        risen = away_from_base(cell, np.array([here[0], here[1], height]))
        yield from cell.arm.move(risen, upright, gripper, CLEARING)
    return (yield from cell.arm.move([goal[0], goal[1], height], rotation, gripper, PASSING))


def descend(
    cell: Workcell, position: Array, rotation: Array, gripper: float = OPEN, tight: bool = False
) -> Skill:
    """Go down to a point, the lower the better the hand is above it; see `Arm.approach`."""
    aligned = TIGHT_ALIGNED if tight else ALIGNED
    return (yield from cell.arm.approach(position, rotation, gripper, PRECISE, aligned))


def grasp(
    cell: Workcell, body: str, request: GraspRequest | None = None, tries: int = 3
) -> Generator[Command, None, Grasp | None]:
    """Grasp `body` and lift it by 6 cm, planning again above it and after each failure.

    Returns the grasp that holds, or None after `tries` failures.
    """
    request = request or GraspRequest()
    is_blocked = partial(cell.is_blocked, body)
    for _ in cell.attempts(tries):
        planned = plan_grasp(cell.scene, body, request, is_blocked)
        ready = above(planned.position, ABOVE_GRASP + 0.01)
        yield from transit(cell, ready, down(planned.yaw), OPEN, clearance=0.03)
        planned = plan_grasp(
            cell.scene, body, replace(request, yaw=planned.yaw, yaw_limit=0.6, kind=planned.kind), is_blocked
        )
        rotation = down(planned.yaw)
        width, _ = extents(cell.scene.cloud(body)[:, :2], closing_axis(planned.yaw))
        yield from descend(cell, planned.position, rotation, tight=planned.kind == "centre" and width > TIGHT)
        yield from cell.arm.hold(planned.position, rotation, CLOSED, CLOSING_STEPS)
        before = cell.scene.bottom(body)
        outside = away_from_base(cell, planned.position)
        if outside is not planned.position:
            yield from cell.arm.move(outside, rotation, CLOSED, Reach(0.015, 9.0, speed=0.5))
        lifted = above(outside, ABOVE_GRASP)
        yield from cell.arm.move(lifted, rotation, CLOSED, replace(CLEARING, within=0.015))
        if cell.scene.bottom(body) > before + 0.025:
            return planned
        request = replace(request, avoided=(*request.avoided, planned.offset))
        yield from cell.arm.hold(cell.arm.position, rotation, OPEN, OPENING_STEPS)
    return None


def hand_goal(cell: Workcell, body: str, xy: ArrayLike, underside: float) -> Array:
    """Return the grip point [3] that puts the held body over `xy`, its lowest point at `underside` (m)."""
    hand = cell.arm.position
    offset = cell.scene.position(body) - hand
    hanging = hand[2] - cell.scene.bottom(body)
    goal = np.asarray(xy, dtype=np.float64)[:2]
    return np.array([goal[0] - offset[0], goal[1] - offset[1], underside + hanging])


@dataclass(frozen=True)
class Placement:
    """Where and how to set down what is held."""

    xy: Array  # [2] m, for the origin of the body
    support: float  # m, height of the surface below
    drop: float = 0.008  # m above the surface at which the hand opens
    clearance: float = 0.04  # m above obstacles on the way
    retreat: float = 0.08  # m upwards after letting go
    let_go: bool = True


def place(cell: Workcell, body: str, rotation: Array, placement: Placement) -> Skill:
    """Carry the held `body` over its goal, lower it, let go and retreat; False if it slips out of the hand.

    The offset between hand and body is measured all the time, because the body settles in the fingers on the
    way.
    """
    before = cell.scene.position(body) - cell.arm.position
    underside = placement.support + placement.drop
    goal = hand_goal(cell, body, placement.xy, underside)
    yield from transit(cell, above(goal, 0.05), rotation, CLOSED, carried=body, clearance=placement.clearance)
    if np.linalg.norm(cell.scene.position(body) - cell.arm.position - before) > SLIPPED:
        yield from release(cell, rotation, placement.retreat)
        return False
    height = hand_goal(cell, body, placement.xy, underside)[2]

    def goal_now() -> Array:
        return np.array([*hand_goal(cell, body, placement.xy, underside)[:2], height])

    lowered = yield from cell.arm.approach(goal_now, rotation, CLOSED, LOWERING)
    goal = goal_now()
    if not lowered:
        yield from _free(cell, goal, rotation)
    if placement.let_go:
        yield from release(cell, rotation, placement.retreat, goal)
    return True


def _free(cell: Workcell, goal: Array, rotation: Array) -> Skill:
    """Lower what sits on an edge on its way to `goal` [3] beside it, where the edge pushes it."""
    for _ in range(BESIDE_TRIES):
        if cell.arm.position[2] < goal[2] + STUCK:
            return True
        pushed = cell.arm.position - goal
        pushed[2] = 0.0
        goal = goal + BESIDE * pushed / (np.linalg.norm(pushed) + 1e-9)
        high = np.array([*goal[:2], cell.arm.position[2] + RISE])
        yield from cell.arm.move(high, rotation, CLOSED, Reach(0.008, 9.0, noise_share=0.3))
        if (yield from cell.arm.move(goal, rotation, CLOSED, LOWERING)):
            return True
    return False


def release(cell: Workcell, rotation: Array, retreat: float = 0.08, position: Array | None = None) -> Skill:
    """Open the hand where it is (or at `position`) and go straight up by `retreat` metres."""
    here = cell.arm.position if position is None else position
    yield from cell.arm.hold(here, rotation, OPEN, OPENING_STEPS)
    return (yield from cell.arm.move(above(here, retreat), rotation, OPEN, CLEARING))
