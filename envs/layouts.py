"""Random layouts of LIBERO scenes: all that can be moved is drawn again over the table, or a part of it.

A random layout draws every object again, a partial one changes a few and leaves the rest of the reset as it
is. Fixtures stay where they are, and so does what stands on or in them. What stands on each other, and what a
relation of the instruction names ("next to the ramekin"), moves as one. A draw in which the instruction is
ambiguous or already done, or in which the planners find no grasp, is replaced before the episode starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import Delaunay, QhullError
from scipy.spatial.transform import Rotation

from envs.demos.planner_arm import Array
from envs.demos.planner_fixtures import (
    OPEN_FULLY,
    WIDE,
    Door,
    Drawer,
    body_of,
    goals,
    holds,
    is_object,
    joint_of,
    region,
)
from envs.demos.planner_grasping import NEAREST, Workcell
from envs.demos.tasks import clearance, thinned, unreachable

if TYPE_CHECKING:
    from envs.libero import LiberoEnv

STREAM = 2  # separates the random numbers of layouts from the demonstrator's and the reset's
MAX_DRAWS, FROM_ONE_RESET = 100, 4  # whole layouts; how many of them start from the seed's own reset
MAX_PLACES = 60  # of one group in a layout
GAP = 0.03  # m between two objects: a finger fits in between
EDGE = 0.04  # m from the edge of the table
REACH = (NEAREST + 0.03, 0.74)  # m from the robot's base to what the task moves, and where to
WIDER_REACH = (0.28, 0.80)  # m to anything else
ASIDE = 0.38  # m to each side of the robot
IN_VIEW = 0.88  # share of the frame's half width within which every object stands
NEXT_TO = 0.16  # m from the middle of what a relation names to the object that is meant
APART = 0.12  # m that an object alike is farther from what the relation names than the object that is meant
RAYS, HIDDEN = 24, 0.5  # points of an object; share of them that something else may hide
BEFORE = 0.98  # share of the way from the camera to a point at which something hides it
MOVED, TILTED = 0.01, 0.1  # m, rad: what moves by more while it comes to rest does not stand
BEFORE_DRAWER = 0.10  # m before a drawer that is pulled out
BESIDE_KNOB = 0.07  # m around a knob that a hand turns
FURTHER = (0.5, 0.3, 0.2)  # shares of partial layouts in which 0, 1 or 2 further groups change
EXCHANGED = 0.5  # share of the changed groups that exchange their places with another one
SHAPELESS = 0.05  # m around the origin of an object whose shape is not known
GRID = 0.01  # m between points inside an outline
SIDES = re.compile(r"\b(left|right|front|back|middle)\b")


class NoLayoutError(RuntimeError):
    """No random layout of a scene fits."""


@dataclass(frozen=True)
class Group:
    """Objects that move as one."""

    members: tuple[str, ...]
    is_wanted: bool  # whether the task moves one of them, or something onto one
    is_mirrored: bool  # whether it may be mirrored left to right


@dataclass(frozen=True)
class Relation:
    """What tells the object that is meant from others of its kind: it is the nearest to all of `near`."""

    meant: str
    others: tuple[str, ...]
    near: tuple[str, ...]  # empty: it is near the middle of the table, where it stays


def draw_layout(
    env: LiberoEnv, seed: int, start: Callable[[int, Callable[[], None]], None], kind: str, radius: float
) -> int:
    """Start an episode with a random or a partial layout; return how many were drawn until one fits.

    The first four start from the reset of this seed, later ones from other resets (but for official states):
    in some, LIBERO drops an object onto another, and it rolls away. `start` resets by a seed, calls its other
    argument once all is at rest, and lets it come to rest again. `kind` is "random" or "partial". `radius` is
    how far (m) from where the reset put it an object may go; with a finite one, objects of a random layout
    that find no other place stay where they are.

    Raises:
        NoLayoutError: If none of `MAX_DRAWS` layouts fits.
    """
    reason = ""
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng((seed, STREAM, draw))
        layout = Layout(env, rng, kind, radius)
        start(seed if draw < FROM_ONE_RESET else int(rng.integers(2**31)), layout.place)
        reason = layout.fault()
        if not reason:
            return draw + 1
    raise NoLayoutError(
        f"none of {MAX_DRAWS} {kind} layouts of {env.task.name} with seed {seed} fits (the last: {reason}); "
        "use standard layouts for this task"
    )


class Layout:
    """One draw of a layout for an episode that is being reset."""

    def __init__(self, env: LiberoEnv, rng: np.random.Generator, kind: str, radius: float) -> None:
        self._env, self._rng, self._radius = env, rng, radius
        self._draw = {"random": self._draw_all, "partial": self._draw_part}[kind]
        self._shapeless: list[str] = []  # objects of which no shape is known
        self._places: dict[str, Array] = {}  # of each object that can be moved, its pose [7] as it was put
        self._missing = ""  # why nothing could be placed

    def place(self) -> None:
        """Put the groups where there is room; it is called once the reset objects are at rest."""
        raw = self._env.raw
        self._env.refresh()
        cell = Workcell.of(raw)
        groups, self._relation = find_groups(raw, self._env.task.instruction)
        self._shapeless = [name for name in raw.objects_dict if body_of(cell, name) not in cell.scene]
        groups = [group for group in groups if not {*group.members} & {*self._shapeless}]
        self._draw(cell, groups)
        raw.sim.forward()

    def _draw_all(self, cell: Workcell, groups: Sequence[Group]) -> None:
        """Put every group anywhere in reach."""
        taken = self._staying(cell, groups)
        order = [groups[index] for index in self._rng.permutation(len(groups))]
        for group in sorted(order, key=lambda group: (not group.is_wanted, -len(group.members))):
            placed = self._place_group(cell, group, taken)
            if placed is None:
                self._missing = f"no room for {', '.join(group.members)}"
                return
            taken.append(placed)

    def _draw_part(self, cell: Workcell, groups: Sequence[Group]) -> None:
        """Put one of the groups that the task needs, and often others, anywhere or into another's place."""
        for name in (name for group in groups for name in group.members):
            self._places[name] = np.array(self._joint(name).qpos)
        order = [groups[index] for index in self._rng.permutation(len(groups))]
        order.sort(key=lambda group: not group.is_wanted)
        first, further = order[:1], order[1:]
        self._rng.shuffle(further)
        staying = self._staying(cell, groups)
        shapes = {group: outline(_cloud(cell, group)) for group in groups}
        for group in first + further[: self._rng.choice(len(FURTHER), p=FURTHER)]:
            if self._rng.random() < EXCHANGED and self._exchange(cell, group, shapes, staying):
                continue
            taken = staying + [shape for other, shape in shapes.items() if other is not group]
            placed = self._place_group(cell, group, taken)
            if placed is None:
                self._missing = f"no room for {', '.join(group.members)}"
                return
            shapes[group] = placed
            cell.scene.refresh()
        if not first:
            self._missing = "nothing can be moved"

    def _staying(self, cell: Workcell, groups: Sequence[Group]) -> list[Array]:
        """Return the outlines [n 2] of all but these groups, and of what is kept free."""
        away = [body_of(cell, name) for group in groups for name in group.members]
        away.append(f"{self._env.raw.workspace_name}_col")  # a table whose body is not named like one
        taken = [outline(cloud) for cloud in cell.scene.standing(away)]
        taken += [outline(points) for points in kept_free(cell)]
        for name in self._shapeless:  # it stays, and all else stays away
            taken.append(outline(_around(cell.scene.position(body_of(cell, name))[None, :2], SHAPELESS)))
        return taken

    def _exchange(
        self, cell: Workcell, group: Group, shapes: dict[Group, Array], staying: Sequence[Array]
    ) -> bool:
        """Exchange the places of a group and another one, the middles of their outlines, if any fits."""
        groups = [other for other in shapes if other is not group]
        for index in self._rng.permutation(len(groups)):
            other = groups[index]
            way = _middle(shapes[other]) - _middle(shapes[group])
            moved = {group: shapes[group] + way, other: shapes[other] - way}
            spots = {
                one: {name: cell.scene.position(body_of(cell, name))[:2] + shift for name in one.members}
                for one, shift in ((group, way), (other, -way))
            }
            taken = [np.zeros((0, 2)), *staying, *(shapes[one] for one in groups if one is not other)]
            length = float(np.linalg.norm(way))
            if (
                all(self._fits(cell, one, spots[one], shape, length) for one, shape in moved.items())
                and clearance(moved[group], moved[other]) > GAP
                and clearance(np.concatenate([*moved.values()]), np.concatenate(taken)) > GAP
            ):
                self._put(spots[group] | spots[other])
                shapes.update(moved)
                cell.scene.refresh()
                return True
        return False

    def _place_group(self, cell: Workcell, group: Group, taken: Sequence[Array]) -> Array | None:
        """Move a group to the first drawn place with room and return its outline there, None without."""
        origins = {name: cell.scene.position(body_of(cell, name)) for name in group.members}
        anchor = origins[group.members[0]]
        clouds = {name: cell.scene.cloud(body_of(cell, name)) - origins[name] for name in group.members}
        low, high = _table(self._env.raw)
        low, high = np.maximum(low, anchor[:2] - self._radius), np.minimum(high, anchor[:2] + self._radius)
        obstacles = np.concatenate([np.zeros((0, 2)), *taken])
        ways = []  # as it is, and mirrored: where its members are from the first one, and its outline
        for mirror in ([1.0, 1.0], [1.0, -1.0])[: 1 + group.is_mirrored]:
            offsets = {name: mirror * (origins[name] - anchor)[:2] for name in group.members}
            points = [clouds[name][:, :2] + offset for name, offset in offsets.items()]
            ways.append((offsets, outline(np.concatenate(points))))
        for _ in range(MAX_PLACES):
            spot = self._rng.uniform(low, np.maximum(low, high))
            offsets, shape = ways[int(self._rng.random() * len(ways))]
            spots, shape = {name: spot + offset for name, offset in offsets.items()}, shape + spot
            if not self._fits(cell, group, spots, shape, float(np.linalg.norm(spot - anchor[:2]))):
                continue
            if clearance(shape, obstacles) < GAP:
                continue
            self._put(spots)
            return shape
        shape = ways[0][1] + anchor[:2]
        return shape if np.isfinite(self._radius) and clearance(shape, obstacles) > 0 else None

    def _fits(
        self, cell: Workcell, group: Group, spots: Mapping[str, Array], shape: Array, way: float
    ) -> bool:
        """Return whether a group would be on the table, in reach, in view and not too far from before."""
        low, high = _table(self._env.raw)
        nearest, farthest = REACH if group.is_wanted else WIDER_REACH
        base = cell.scene.position("robot0_base")[:2]
        distances = [float(np.linalg.norm(spot - base)) for spot in spots.values()]
        return bool(
            way <= self._radius
            and np.all(shape > low)
            and np.all(shape < high)
            and min(distances) > nearest
            and max(distances) < farthest
            and all(in_view(self._env, [*spot, self._height(cell, name)]) for name, spot in spots.items())
        )

    def _put(self, spots: Mapping[str, Array]) -> None:
        """Put objects to spots [2] at rest, as high and turned as they are."""
        for name, spot in spots.items():
            joint = self._joint(name)
            joint.qpos[:2], joint.qvel[:] = spot, 0.0
            self._places[name] = np.array(joint.qpos)

    def _joint(self, name: str) -> Any:
        return self._env.data.joint(self._env.raw.objects_dict[name].joints[0])

    @staticmethod
    def _height(cell: Workcell, name: str) -> float:
        return float(cell.scene.position(body_of(cell, name))[2])

    def fault(self) -> str:
        """Return why the layout does not do, now that it is at rest; empty where it does."""
        if self._missing:
            return self._missing
        env = self._env
        env.refresh()
        for name, placed in self._places.items():
            pose = self._joint(name).qpos
            turn = Rotation.from_quat(placed[3:], scalar_first=True).inv() * Rotation.from_quat(
                pose[3:], scalar_first=True
            )
            if np.linalg.norm((pose - placed)[:2]) > MOVED or turn.magnitude() > TILTED:
                return f"{name} does not stand"
        cell = Workcell.of(env.raw)
        wanted = {part for goal in goals(cell) for part in goal[1:]}
        for name in wanted & {*self._places}:
            if not is_visible(env, body_of(cell, name), cell.scene.cloud(body_of(cell, name))):
                return f"{name} is hidden"
        for goal in goals(cell):
            if goal[0] in ("on", "in") and holds(cell, goal):
                return f"{' '.join(goal)} holds already"
        if self._relation is not None and not holds_for_one(cell, self._relation):
            return f"{self._relation.meant} is not what the instruction means, or not alone"
        return next((fault for goal in goals(cell) if (fault := unreachable(cell, goal))), "")


def find_groups(raw: Any, instruction: str) -> tuple[list[Group], Relation | None]:
    """Return what can be moved, group by group, and the relation that the instruction needs, if any."""
    problem = raw.parsed_problem
    relations = [one for one in problem["initial_state"] if len(one) == 3]
    support = {name: target for kind, name, target in relations if kind in ("on", "in")}
    movable = [name for name in raw.objects_dict if _is_movable(raw, name, support)]
    relation = find_relation(raw, instruction, support)
    sets = [{name, support[name]} & {*movable} for name in movable]
    is_sided = SIDES.search(instruction) is not None
    twins = [set(names) & {*movable} for names in problem["objects"].values() if len(names) > 1]
    fixed = _named_by_goal_regions(raw)
    if relation is not None:
        sets.append({relation.meant, *relation.near} & {*movable})
        fixed |= set() if relation.near else {relation.meant}
    elif is_sided:
        sets += twins
    wanted = {part for goal in problem["goal_state"] for part in goal[1:]}
    sites = [raw.object_sites_dict[part] for part in wanted & {*raw.object_sites_dict}]
    wanted |= {site.parent_name for site in sites if hasattr(site, "parent_name")}  # a table's site has none
    mirrored = not (is_sided and relation is None)
    return [
        Group(tuple(members), bool(wanted & {*members}), mirrored and len(members) > 1)
        for members in _joined(sets, movable)
        if not fixed & {*members}
    ], relation


def _is_movable(raw: Any, name: str, support: dict[str, str]) -> bool:
    """Return whether an object stands on the table, or on what does."""
    below = support.get(name, "")
    return below.startswith(raw.workspace_name) or (
        below in raw.objects_dict and _is_movable(raw, below, support)
    )


def _joined(sets: Sequence[set[str]], order: Sequence[str]) -> list[list[str]]:
    """Return the unions of sets that share a member, the members in `order`."""
    unions: list[set[str]] = []
    for one in sets:
        touching = [union for union in unions if union & one]
        unions = [union for union in unions if not union & one] + [one.union(*touching)]
    return [[name for name in order if name in union] for union in unions if union]


def find_relation(raw: Any, instruction: str, support: dict[str, str]) -> Relation | None:
    """Return what tells the object to take from others of its kind; None if it has none, or sides tell it."""
    taken, _, _ = instruction.partition(" and place")
    meant = next((name for name in raw.parsed_problem["obj_of_interest"] if name in raw.objects_dict), "")
    kinds = raw.parsed_problem["objects"]
    alike = next((names for names in kinds.values() if meant in names), [])
    if len(alike) < 2 or SIDES.search(taken):
        return None
    near = [
        name
        for kind, names in kinds.items()
        if meant not in names and is_named(kind, taken)
        for name in names
    ]
    is_central = "center" in support.get(meant, "")
    if not near and not is_central:
        return None
    others = tuple(name for name in alike if name != meant)
    return Relation(meant, others, tuple(near))


def is_named(kind: str, text: str) -> bool:
    """Return whether the noun of a kind of object, such as "porcelain_ramekin", is in a text."""
    noun = kind.rpartition("_")[-1].rstrip("s")
    return re.search(rf"\b{noun}", text) is not None


def _named_by_goal_regions(raw: Any) -> set[str]:
    """Return the objects beside which the goal has a fixed region of the table, such as a plate."""
    regions = {
        goal[-1] for goal in raw.parsed_problem["goal_state"] if goal[-1].startswith(raw.workspace_name)
    }
    return {
        name
        for kind, names in raw.parsed_problem["objects"].items()
        for name in names
        if any(is_named(kind, one.replace("_", " ")) for one in regions)
    }


def holds_for_one(cell: Workcell, relation: Relation) -> bool:
    """Return whether the object that is meant is where the relation says, and none alike."""
    meant, *others = (
        cell.scene.position(body_of(cell, name))[:2] for name in (relation.meant, *relation.others)
    )
    near = [cell.scene.position(body_of(cell, name))[:2] for name in relation.near]
    anchor = np.mean(near, axis=0) if near else meant
    away = float(np.linalg.norm(meant - anchor))
    return away < NEXT_TO and all(float(np.linalg.norm(other - anchor)) > away + APART for other in others)


def outline(points: Array) -> Array:
    """Return points [n 2] that fill the convex outline of `points` [m 2 or 3], seen from above."""
    flat = thinned(points[:, :2])
    low, high = flat.min(axis=0), flat.max(axis=0)
    axes = [np.arange(start, stop, GRID) for start, stop in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    try:
        inside = Delaunay(flat).find_simplex(grid) >= 0
    except QhullError:  # a line: nothing is inside
        return flat
    return np.concatenate([flat, grid[inside]])


def kept_free(cell: Workcell) -> Iterator[Array]:
    """Yield the points [n 2] over which drawers, doors, hands and goals of this task need room."""
    for kind, *names in goals(cell):
        target = names[-1]
        if kind in ("turnon", "turnoff"):
            knob = cell.scene.cloud(f"{target}_button")[:, :2]
            yield _around(knob, BESIDE_KNOB)
        elif joint_of(cell, target) is not None and not is_object(cell, target):
            drawer = Drawer(cell, target)
            cloud = cell.scene.cloud(drawer.body)
            way = OPEN_FULLY - drawer.opening + BEFORE_DRAWER
            yield np.concatenate([cloud, cloud + way * drawer.outwards])[:, :2]
        elif kind == "close":
            yield from _swept(cell, target)
        elif not is_object(cell, target) and target.startswith(cell.env.workspace_name):
            goal = region(cell, target)
            yield _around(goal.centre[None, :2], float(goal.half_extents[:2].max()) + GAP)


def _around(points: Array, distance: float) -> Array:
    """Return the corners of the box around points [n 2], wider by a distance to each side."""
    low, high = points.min(axis=0) - distance, points.max(axis=0) + distance
    return np.array([low, [low[0], high[1]], high, [high[0], low[1]]])


def _swept(cell: Workcell, fixture: str) -> Iterator[Array]:
    """Yield where a door is between wide open and shut."""
    door = Door.of(cell, fixture)
    angle = float(cell.scene.data.joint(door.joint).qpos[0])
    arms = cell.scene.cloud(door.body) - door.anchor
    for goal in np.linspace(0.0, np.sign(angle) * WIDE, 8):
        turn = Rotation.from_rotvec((goal - angle) * door.axis)
        yield (door.anchor + turn.apply(arms))[:, :2]


def _cloud(cell: Workcell, group: Group) -> Array:
    """Return points [n 3] on the members of a group."""
    return np.concatenate([cell.scene.cloud(body_of(cell, name)) for name in group.members])


def _middle(shape: Array) -> Array:
    """Return the middle [2] of an outline."""
    return (shape.max(axis=0) + shape.min(axis=0)) / 2


def _table(raw: Any) -> tuple[Array, Array]:
    """Return the lowest and the highest x and y where the outline of an object may be (m, world)."""
    middle = np.array(raw.workspace_offset[:2], dtype=np.float64)
    base = np.array(raw.sim.data.get_body_xpos("robot0_base"))[:2]
    # a scene on the floor has no table's size
    size = getattr(raw, f"{raw.workspace_name.removeprefix('main_')}_full_size", (4.0, 4.0))
    low, high = (middle + sign * (np.array(size[:2]) / 2 - EDGE) for sign in (-1.0, 1.0))
    near = base + np.array([WIDER_REACH[0] - 0.05, -ASIDE])
    far = base + np.array([WIDER_REACH[1] + 0.05, ASIDE])
    return np.maximum(low, near), np.minimum(high, far)


def in_view(env: LiberoEnv, point: ArrayLike) -> bool:
    """Return whether a point [3] (m, world) is well inside the frame of the scene's camera."""
    camera = env.model.camera("agentview").id
    relative = env.data.cam_xmat[camera].reshape(3, 3).T @ (np.asarray(point) - env.data.cam_xpos[camera])
    most = IN_VIEW * np.tan(np.radians(env.model.cam_fovy[camera]) / 2) * -relative[2]  # it looks along -z
    return bool(np.abs(relative[:2]).max() < most)


def is_visible(env: LiberoEnv, body: str, cloud: Array) -> bool:
    """Return whether nothing else hides most of the points [n 3] on a body from the scene's camera."""
    mujoco, root = env._mujoco, env.model.body(body).rootid[0]
    start = np.array(env.data.cam_xpos[env.model.camera("agentview").id])
    groups = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # collision shapes; rays through visible meshes are slow
    hit, hidden = np.zeros(1, np.int32), 0
    points = cloud[:: max(1, len(cloud) // RAYS)]
    for point in points:
        share = mujoco.mj_ray(env.model, env.data, start, point - start, groups, 1, -1, hit)
        is_own = hit[0] >= 0 and env.model.body_rootid[env.model.geom_bodyid[hit[0]]] == root
        hidden += bool(0 <= share < BEFORE and not is_own)
    return hidden < HIDDEN * len(points)
