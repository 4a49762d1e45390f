"""Where to grasp: two-finger grasps from above, planned on point clouds of collision geometry."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.demos.planner_arm import Array, wrap
from envs.rendering import load_mujoco

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


ROBOT_PREFIXES = ("robot0", "gripper0", "mount0")
SUPPORTS = ("world", "floor", "table")  # endings of what objects stand on: no obstacle to a hand above it


class Scene:
    """Point clouds (world frame, metres) of every colliding body of one robosuite simulation.

    Shapes are sampled once; each query only places the sampled points at the bodies' present poses.
    """

    def __init__(self, sim: Any) -> None:
        """Samples the shapes of `sim`, the `MjSim` of a robosuite 1.4 environment."""
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
        """Surface points of one geom in its own frame; None where it never collides or is a plane."""
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
        """Brings poses in line with the joints: after a simulation step they lag one substep behind."""
        self._mujoco.mj_kinematics(self.model, self.data)

    def __contains__(self, body: str) -> bool:
        """True if `body` has collision geometry here."""
        return body in self._geoms

    @property
    def bodies(self) -> list[str]:
        """Names of all bodies with collision geometry, the robot's included."""
        return list(self._geoms)

    def geoms(self, body: str) -> list[int]:
        """Ids of the colliding geoms of `body`.

        Raises:
            KeyError: `body` has no collision geometry; the message lists those that have.
        """
        if body not in self._geoms:
            raise KeyError(
                f"no body {body!r} with collision geometry in this scene; known: {sorted(self._geoms)}"
            )
        return self._geoms[body]

    def geom_cloud(self, geom: int) -> Array:
        """Points [n 3] of one geom, placed in the world."""
        rotation = self.data.geom_xmat[geom].reshape(3, 3)
        return self._shapes[geom] @ rotation.T + self.data.geom_xpos[geom]

    def cloud(self, body: str) -> Array:
        """Points [n 3] on `body`, where it is now."""
        return np.concatenate([self.geom_cloud(geom) for geom in self.geoms(body)])

    def obstacles(self, excluded: Collection[str] = ()) -> Array:
        """Points [n 3] on everything that is neither robot, support, nor one of the `excluded` bodies."""
        clouds = [self.cloud(body) for body in self._geoms if not self._passes(body, excluded)]
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))

    @staticmethod
    def _passes(body: str, excluded: Collection[str]) -> bool:
        return body in excluded or body.endswith(SUPPORTS) or body.startswith(ROBOT_PREFIXES)

    def position(self, body: str) -> Array:
        """Origin [3] of `body` in the world (m)."""
        return np.array(self.data.body(body).xpos)

    def rotation(self, body: str) -> Array:
        """Rotation matrix [3 3] of `body` in the world."""
        return np.array(self.data.body(body).xmat).reshape(3, 3)

    def bottom(self, body: str) -> float:
        """Height of the lowest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].min())

    def top(self, body: str) -> float:
        """Height of the highest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].max())


MAX_WIDTH = 0.077  # m; the Panda opens 0.08
HALF_OPEN = 0.04  # m from the grip point to the inner face of an open finger
FINGER_REACH = 0.03  # m below the top of an object that the fingers go, where it is tall enough
RIM_REACH = 0.016
FLOOR_GAP = 0.011  # m that the grip point stays above the lowest point of the object
COMFORTABLE_REACH = 0.70  # m from the base of the robot; farther away the elbow nears its limit
MOST_ASKED = 40  # grasps for which the arm's posture is predicted, each in some milliseconds
NEIGHBOURHOOD = 0.25  # m around an object that the hand can touch while grasping it
YAWS = np.deg2rad(np.arange(-90.0, 91.0, 2.5))
RIM_ANGLES = np.deg2rad(np.arange(0.0, 360.0, 10.0))


@dataclass(frozen=True)
class Grasp:
    """A pose of a hand that looks straight down, ready to close."""

    position: Array  # [3] grip point, m, world
    yaw: float  # rad, of the closing axis from the world's y axis
    kind: str  # "centre": around the object; "rim": one finger inside, one outside
    obstruction: int  # foreign points where fingers or palm would be
    offset: Array = field(default_factory=lambda: np.zeros(2))  # [2] grip point from the middle of the rim, m


@dataclass(frozen=True)
class GraspWish:
    """What a task asks of a grasp."""

    yaw: float = 0.0  # rad, preferred
    yaw_limit: float = np.pi / 2  # rad, largest distance from the preferred yaw
    depth: float | None = None  # m below the top; None takes the kind's own
    kind: str | None = None  # "centre", "rim" or None for the first that fits, centre before rim
    avoided: tuple[Array, ...] = ()  # offsets [2] of rim grasps that failed before


def closing_axis(yaw: float) -> Array:
    """Unit vector [2] along which the fingers close."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def side_axis(yaw: float) -> Array:
    """Unit vector [2] across the closing axis, in the plane of the table."""
    return np.array([np.cos(yaw), np.sin(yaw)])


def extents(points: Array, axis: Array) -> tuple[float, float]:
    """Width (m) and middle (m) of points [n 2] projected on a unit vector [2]."""
    along = points @ axis
    low, high = float(along.min()), float(along.max())
    return high - low, (high + low) / 2


def obstruction(points: Array, position: Array, yaw: float) -> int:
    """Number of points [n 3] inside the space of the open fingers and the palm at a grasp pose.

    The boxes are the Panda hand's, widened by its controller's error: fingers of 4 x 3.6 cm from 1.4 cm below
    the grip point upwards, a palm of 21 x 7 cm from 2.2 cm above it.
    """
    relative = points - position
    across = np.abs(relative[:, :2] @ closing_axis(yaw))
    beside = np.abs(relative[:, :2] @ side_axis(yaw))
    height = relative[:, 2]
    fingers = (
        (across > HALF_OPEN - 0.008) & (across < HALF_OPEN + 0.03) & (beside < 0.018) & (height > -0.014)
    )
    palm = (across < 0.107) & (beside < 0.034) & (height > 0.022)
    return int(fingers.sum() + palm.sum())


def centre_grasps(cloud: Array, obstacles: Array, wish: GraspWish) -> Iterator[tuple[float, Grasp]]:
    """Grasps around a whole object, each with its cost: narrow, near the wished yaw and free is cheap.

    Args:
        cloud: points [n 3] of the object.
        obstacles: points [m 3] of everything around it.
        wish: preferred yaw, its limit and the depth.
    """
    top, bottom = cloud[:, 2].max(), cloud[:, 2].min()
    depth = FINGER_REACH if wish.depth is None else wish.depth
    height = max(top - depth, bottom + FLOOR_GAP)
    for yaw in _allowed_yaws(wish):
        width, middle = extents(cloud[:, :2], closing_axis(yaw))
        if width > MAX_WIDTH:
            continue
        _, beside = extents(cloud[:, :2], side_axis(yaw))
        centre = closing_axis(yaw) * middle + side_axis(yaw) * beside
        position = np.array([centre[0], centre[1], height])
        blocked = obstruction(obstacles, position, yaw)
        cost = 100.0 * width + 0.8 * abs(yaw - wish.yaw) + 0.05 * min(blocked, 200)
        yield cost, Grasp(position, float(yaw), "centre", blocked)


def _allowed_yaws(wish: GraspWish) -> Array:
    return YAWS[np.abs(YAWS - wish.yaw) <= wish.yaw_limit + 1e-3]


@dataclass(frozen=True)
class Rim:
    """The upper edge of a round vessel."""

    middle: Array  # [3] m, world
    points: Array  # [k 3] candidates on the edge, m, world


def find_rim(cloud: Array, rotation: Array, origin: Array) -> Rim:
    """The rim of a vessel that may stand tilted: the top 8 mm along the body axis closest to vertical.

    Args:
        cloud: points [n 3] of the object (world).
        rotation: of the object's body [3 3].
        origin: of the object's body [3].
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
    rim: Rim, bottom: float, obstacles: Array, base: Array, wish: GraspWish
) -> Iterator[tuple[float, Grasp]]:
    """Radial grasps of a rim, each with its cost: free, near the robot and not on the low side is cheap.

    Args:
        rim: candidates.
        bottom: height of the lowest point of the object (m).
        obstacles: points [m 3] of everything around it.
        base: of the robot [2] (m); far grasps make the arm stick at its limits.
        wish: preferred yaw, its limit, the depth and the offsets not to try again.
    """
    depth = RIM_REACH if wish.depth is None else wish.depth
    for point in rim.points:
        offset = (point - rim.middle)[:2]
        radial = np.arctan2(offset[1], offset[0])
        distance = float(np.linalg.norm(point[:2] - base))
        reach_cost = (
            distance + 25 * max(0.0, distance - COMFORTABLE_REACH) + 10 * abs(point[2] - rim.middle[2])
        )
        reach_cost += 4.0 * sum(float(np.linalg.norm(offset - failed)) < 0.022 for failed in wish.avoided)
        for yaw in (wrap(radial - np.pi / 2), wrap(radial + np.pi / 2)):
            away = abs(yaw - wish.yaw)
            if away > min(wish.yaw_limit, np.pi / 2) + 1e-6:
                continue
            position = np.array([point[0], point[1], max(point[2] - depth, bottom + FLOOR_GAP)])
            blocked = obstruction(obstacles, position, yaw)
            cost = reach_cost + 0.5 * away + 0.04 * min(blocked, 2000)
            yield cost, Grasp(position, yaw, "rim", blocked, offset)


class NoGraspError(Exception):
    """A thing lies so that no grasp of it fits: this episode is lost, as it is for a robot."""


def plan_grasp(
    scene: Scene,
    body: str,
    wish: GraspWish | None = None,
    hindered: Callable[[Grasp], bool] = lambda planned: False,
) -> Grasp:
    """The cheapest grasp of `body` in its present pose and surroundings.

    Args:
        scene: what stands where.
        body: what is grasped.
        wish: what a task asks of the grasp.
        hindered: whether the arm cannot be where a grasp needs it; asked from the cheapest grasp onwards,
            until one is free. If none is, the cheapest is taken.

    Raises:
        NoGraspError: no grasp satisfies the wish.
    """
    wish = wish or GraspWish()
    cloud = scene.cloud(body)
    obstacles = near(scene.obstacles((body,)), cloud)
    grasps: list[tuple[float, Grasp]] = []
    if wish.kind != "rim":
        grasps = list(centre_grasps(cloud, obstacles, wish))
    if not grasps and wish.kind != "centre":
        rim = find_rim(cloud, scene.rotation(body), scene.position(body))
        base = scene.position("robot0_base")[:2]
        grasps = list(rim_grasps(rim, float(cloud[:, 2].min()), obstacles, base, wish))
    if not grasps:
        kind = wish.kind or "possible"
        raise NoGraspError(
            f"no {kind} grasp of {body!r} within {wish.yaw_limit:.2f} rad of yaw {wish.yaw:.2f}"
        )
    ranked = [planned for _, planned in sorted(grasps, key=lambda pair: pair[0])]
    return next((planned for planned in ranked[:MOST_ASKED] if not hindered(planned)), ranked[0])


def near(points: Array, cloud: Array) -> Array:
    """Those of `points` [n 3] within reach of a hand that grasps `cloud` [m 3], seen from above."""
    low, high = cloud[:, :2].min(0) - NEIGHBOURHOOD, cloud[:, :2].max(0) + NEIGHBOURHOOD
    return points[np.all((points[:, :2] > low) & (points[:, :2] < high), axis=1)]
