"""Random layouts of LIBERO scenes: all that can be moved is drawn again over the table, or a part of it.

A random layout draws every object again, a partial one changes a few and leaves the rest of the reset as it
is. Fixtures stay where they are, and so does what stands on or in them; a partial layout may move one with
them, and one of the kind "fixtures" always does. What stands on each other, and what a relation of the
instruction names ("next to the ramekin"), moves as one. A draw in which the instruction is ambiguous or
already done, or in which the planners find no grasp, is replaced before the episode starts, and so is an
arrangement that the standard or swapped suite evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import Delaunay, QhullError
from scipy.spatial.transform import Rotation

from envs.demos.planner_arm import Array, about_z
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
    owner_of,
    part_poses,
    region,
)
from envs.demos.planner_grasping import NEAREST, Workcell
from envs.demos.tasks import clearance, thinned, unreachable
from envs.libero import official_places

if TYPE_CHECKING:
    from envs.libero import LiberoEnv

STREAM = 2  # separates the random numbers of layouts from the demonstrator's and the reset's
MAX_DRAWS, FROM_ONE_RESET = 100, 4  # whole layouts; how many of them start from the seed's own reset
HELD_OUT = 0.05  # m; an arrangement from which nothing differs by more than this is the same
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
COLLISION_SHAPES = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # geom groups; rays through visible meshes are slow
BEFORE = 0.98  # share of the way from the camera to a point at which something hides it
MOVED, TILTED = 0.01, 0.1  # m, rad: what moves by more while it comes to rest does not stand
BEFORE_DRAWER = 0.10  # m before a drawer that is pulled out
BESIDE_KNOB = 0.07  # m around a knob that a hand turns
FURTHER = (0.5, 0.3, 0.2)  # shares of partial layouts in which 0, 1 or 2 further groups change
EXCHANGED = 0.5  # share of the changed groups that exchange their places with another one
WITH_FIXTURE = 0.5  # share of partial layouts in which a fixture changes, where there is one
WANTED_FIXTURE = 0.75  # share of these in which it is one that the task needs, where there is one
MIRRORED = 0.5  # share of the fixtures that exchange no places that are tried on the table's other side
MAX_FIXTURE_PLACES = 12  # of a fixture in a layout
TURNS = (0.0, 0.5 * np.pi, np.pi, 1.5 * np.pi)  # rad, of a fixture
BELOW_ARM = 0.10  # m to each side of the arm as an episode starts that stay free of fixtures
FARTHEST = 0.85  # m from the robot's base to the middle of a fixture
SHAPELESS = 0.05  # m around the origin of an object whose shape is not known
GRID = 0.01  # m between points inside an outline
SIDES = re.compile(r"\b(left|right|front|back|middle)\b")
LEVEL_SIDES = re.compile(r"\b(left|right|front|back)\b")  # a drawer is in the middle whatever way it opens


class NoLayoutError(RuntimeError):
    """No random layout of a scene fits."""


@dataclass(frozen=True)
class Group:
    """Objects that move as one, with the fixture on or in which they stand if it moves as well."""

    members: tuple[str, ...]
    is_wanted: bool  # whether the task moves one of them, or something onto one
    is_mirrored: bool  # whether it may be mirrored left to right
    fixture: str = ""
    turns: tuple[float, ...] = (0.0,)  # rad about the vertical that keep the instruction true


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
    argument once all is at rest, and lets it come to rest again. `kind` is "random", "partial" or "fixtures".
    `radius` is how far (m) from where the reset put it an object may go; with a finite one, objects of a
    random layout that find no other place stay where they are. Layouts with an infinite radius are trained
    on: evaluated arrangements (`HELD_OUT`) are drawn again. Those with a finite one are evaluated near
    official states.

    Raises:
        NoLayoutError: If none of `MAX_DRAWS` layouts fits, or `kind` is "fixtures" and none may move.
    """
    reason = ""
    if kind == "fixtures" and not find_fixtures(env.raw, env.task.instruction):
        raise NoLayoutError(
            f"layout fixtures: expected a task with a fixture that may move; got {env.task.suite} "
            f"{env.task.index} ({env.task.instruction}). Use partial, or leave this task out with tasks=[...]"
        )
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng((seed, STREAM, draw))
        layout = Layout(env, rng, kind, radius)
        start(seed if draw < FROM_ONE_RESET else int(rng.integers(2**31)), layout.place)
        reason = layout.fault()
        if not reason and np.isinf(radius) and (suite := evaluated_in(env)):
            reason = f"{suite} evaluates it"
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
        self._kind = kind
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
        is_partial = self._kind != "random"
        if is_partial:
            groups += find_fixtures(raw, self._env.task.instruction)
        groups = [
            group for group in groups if not {*group.members} & {*self._shapeless} and _bodies(cell, group)
        ]
        (self._draw_part if is_partial else self._draw_all)(cell, groups)
        raw.sim.forward()

    def _draw_all(self, cell: Workcell, groups: Sequence[Group]) -> None:
        """Put every group anywhere in reach."""
        taken = self._staying(cell, groups) + [outline(points) for _, points in kept_free(cell)]
        order = [groups[index] for index in self._rng.permutation(len(groups))]
        for group in sorted(order, key=lambda group: (not group.is_wanted, -len(group.members))):
            placed = self._place_group(cell, group, taken)
            if placed is None:
                self._missing = f"no room for {', '.join(group.members)}"
                return
            taken.append(placed)

    def _draw_part(self, cell: Workcell, groups: Sequence[Group]) -> None:
        """Put a part of the groups anywhere or into another's place; the rest stays."""
        staying = self._staying(cell, groups)
        shapes = {group: outline(_cloud(cell, group)) for group in groups}
        changed = self._chosen(groups)
        if not changed:
            self._missing = "nothing can be moved"
        for group in changed:
            if not self._change(cell, group, shapes, staying):
                self._missing = f"no room for {', '.join([group.fixture, *group.members]).strip(', ')}"
                return
        for name in (name for group in groups for name in group.members):
            self._places[name] = np.array(self._joint(name).qpos)

    def _chosen(self, groups: Sequence[Group]) -> list[Group]:
        """Choose what changes: often a fixture, always something that the task needs, and often others."""
        order = [groups[index] for index in self._rng.permutation(len(groups))]
        fixtures = [group for group in order if group.fixture]
        objects = [group for group in order if not group.fixture]
        if self._kind == "fixtures" and not fixtures:  # their shapes are not known
            return []
        share = 1.0 if self._kind == "fixtures" else WITH_FIXTURE
        changed = []
        if fixtures and self._rng.random() < share:
            if self._rng.random() < WANTED_FIXTURE:
                fixtures.sort(key=lambda group: not group.is_wanted)
            changed = fixtures[:1]
        objects.sort(key=lambda group: not group.is_wanted)
        if not any(group.is_wanted for group in changed):
            changed += objects[:1]
        further = [group for group in objects if group not in changed]
        self._rng.shuffle(further)
        return changed + further[: self._rng.choice(len(FURTHER), p=FURTHER)]

    def _change(
        self, cell: Workcell, group: Group, shapes: dict[Group, Array], staying: Sequence[Array]
    ) -> bool:
        """Put a group into another's place or anywhere and update its outline; False without room."""
        if self._rng.random() < EXCHANGED and self._exchange(cell, group, shapes, staying):
            return True
        if group.fixture:
            return self._place_fixture(cell, group, shapes, staying)
        taken = [*staying, *(shape for other, shape in shapes.items() if other is not group)]
        taken += [outline(points) for _, points in kept_free(cell)]
        placed = self._place_group(cell, group, taken)
        if placed is not None:
            shapes[group] = placed
            cell.scene.refresh()
        return placed is not None

    def _exchange(
        self, cell: Workcell, group: Group, shapes: dict[Group, Array], staying: Sequence[Array]
    ) -> bool:
        """Exchange the places of a group and another one, the middles of their outlines, if any fits."""
        others = [other for other in shapes if other is not group]
        for index in self._rng.permutation(len(others)):
            other = others[index]
            here, there = _middle(shapes[group]), _middle(shapes[other])
            ways = [(turn, turned) for turn in group.turns for turned in other.turns]
            for turn, turned in ways if len(ways) == 1 else self._rng.permutation(ways):
                moves = {group: (there, turn), other: (here, turned)}
                if self._move(cell, moves, shapes, staying):
                    return True
        return False

    def _place_fixture(
        self, cell: Workcell, group: Group, shapes: dict[Group, Array], staying: Sequence[Array]
    ) -> bool:
        """Put a fixture on the other side of the table or anywhere, turned as fits; False without room."""
        low, high = _table(self._env.raw)
        spots = [*self._rng.uniform(low, high, (MAX_FIXTURE_PLACES, 2))]
        if self._rng.random() < MIRRORED:
            x, y = _middle(shapes[group])
            spots.insert(0, np.array([x, 2 * self._env.raw.workspace_offset[1] - y]))
        return any(
            self._move(cell, {group: (spot, turn)}, shapes, staying)
            for spot in spots
            for turn in self._rng.permutation(group.turns)
        )

    def _move(
        self,
        cell: Workcell,
        moves: Mapping[Group, tuple[Array, float]],
        shapes: dict[Group, Array],
        staying: Sequence[Array],
    ) -> bool:
        """Move the middles of groups to spots [2] and turn them (rad); if it does not fit, undo it: False."""
        carried = {group: (_middle(shapes[group]), *move) for group, move in moves.items()}
        moved = {group: _carried(shapes[group], *move) for group, move in carried.items()}
        if not all(self._fits_moved(cell, group, moved[group], *move) for group, move in carried.items()):
            return False
        rest = [*staying, *(shape for group, shape in shapes.items() if group not in moves)]
        for shape in moved.values():
            if clearance(shape, np.concatenate([np.zeros((0, 2)), *rest])) <= GAP:
                return False
            rest.append(shape)
        model, data = self._env.model, self._env.data
        arrays = model.body_pos, model.body_quat, data.qpos
        before = [array.copy() for array in arrays]
        for group, move in carried.items():
            self._carry(group, *move)
        cell.scene.refresh()
        if self._is_hindered(cell, moved) or self._part_fault(cell, moved):
            for array, values in zip(arrays, before, strict=True):
                array[:] = values
            cell.scene.refresh()
            return False
        shapes.update(moved)
        return True

    def _fits_moved(
        self, cell: Workcell, group: Group, shape: Array, middle: Array, spot: Array, turn: float
    ) -> bool:
        """Return whether a group would be on the table and in reach, carried from `middle` to `spot`."""
        if not group.fixture:
            way = spot - middle
            spots = {name: cell.scene.position(body_of(cell, name))[:2] + way for name in group.members}
            return self._fits(cell, group, spots, shape, float(np.linalg.norm(way)))
        cloud = _cloud(cell, group)
        flat = _carried(cloud[:, :2], middle, spot, turn)
        low, high = _whole_table(self._env.raw)
        base = cell.scene.position("robot0_base")[:2]
        arm = outline(_around(np.stack([cell.scene.position("robot0_base"), cell.arm.position]), BELOW_ARM))
        return bool(
            np.all(flat > low)
            and np.all(flat < high)
            and np.linalg.norm(spot - base) < FARTHEST
            and clearance(flat, arm) > 0
            and in_view(self._env, [*spot, cloud[:, 2].min()])
        )

    def _carry(self, group: Group, middle: Array, spot: Array, turn: float) -> None:
        """Carry a group, and leave its objects at rest."""
        turned = Rotation.from_euler("z", turn)
        poses = []
        if group.fixture:
            body = self._env.model.body(self._env.raw.fixtures_dict[group.fixture].root_body)
            poses.append((body.pos, body.quat))
        for name in group.members:
            joint = self._joint(name)
            joint.qvel[:] = 0.0
            poses.append((joint.qpos[:3], joint.qpos[3:]))
        for position, quaternion in poses:
            position[:2] = _carried(position[None, :2], middle, spot, turn)[0]
            rotation = turned * Rotation.from_quat(quaternion, scalar_first=True)
            quaternion[:] = rotation.as_quat(scalar_first=True)

    @staticmethod
    def _is_hindered(cell: Workcell, moved: Mapping[Group, Array]) -> bool:
        """Return whether drawers, doors, hands or goals have no room once groups are at outlines [n 2].

        Before a fixture that has moved nothing else may stand that is higher than the lowest part that moves.
        """
        objects = [shape for group, shape in moved.items() if not group.fixture]
        fixtures = {group.fixture: _bodies(cell, group) for group in moved if group.fixture}
        for owner, points in kept_free(cell):
            hindering = list(objects)
            if owner in fixtures:
                obstacles = cell.scene.obstacles([*fixtures[owner], f"{cell.env.workspace_name}_col"])
                hindering.append(obstacles[obstacles[:, 2] > points[:, 2].min(), :2])
            if clearance(outline(points), np.concatenate([np.zeros((0, 2)), *hindering])) <= 0.5 * GAP:
                return True
        return False

    def _part_fault(self, cell: Workcell, moved: Collection[Group]) -> str:
        """Return why the task can do nothing with a part of a fixture once groups have moved; or empty."""
        fixtures = {group.fixture: {*_bodies(cell, group)} for group in moved if group.fixture}
        for goal in goals(cell):
            owner = owner_of(cell, goal[-1])
            if not fixtures or owner not in cell.env.fixtures_dict:
                continue
            poses = part_poses(cell, goal)
            in_the_way = set().union(*(bodies for name, bodies in fixtures.items() if name != owner))
            if any(cell.clearance.touched(*pose) & in_the_way for pose in poses):
                return f"something stands in the way to {goal[-1]}"
            if owner in fixtures:
                part = poses[-1][0]
                if not in_view(self._env, part) or not is_clear(self._env, part):
                    return f"{goal[-1]} is not in view"
                if not all(cell.clearance.reaches(*pose) for pose in poses):
                    return f"the hand does not reach {goal[-1]}"
        return ""

    def _staying(self, cell: Workcell, groups: Sequence[Group]) -> list[Array]:
        """Return the outlines [n 2] of all but these groups."""
        away = [body for group in groups for body in _bodies(cell, group)]
        away.append(f"{self._env.raw.workspace_name}_col")  # a table whose body is not named like one
        taken = [outline(cloud) for cloud in cell.scene.standing(away)]
        for name in self._shapeless:  # it stays, and all else stays away
            taken.append(outline(_around(cell.scene.position(body_of(cell, name))[None], SHAPELESS)))
        return taken

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


def find_fixtures(raw: Any, instruction: str) -> list[Group]:
    """Return the fixtures on the table that may move, each with what stands on or in it."""
    problem = raw.parsed_problem
    relations = [one for one in problem["initial_state"] if len(one) == 3]
    support = {name: target for kind, name, target in relations if kind in ("on", "in")}
    wanted = {part for goal in problem["goal_state"] for part in goal[1:]}
    kinds = {name: kind for kind, names in problem["fixtures"].items() for name in names}
    regions = [part.replace("_", " ") for part in wanted if part.startswith(raw.workspace_name)]
    turns = (0.0,) if LEVEL_SIDES.search(instruction) else TURNS
    groups = []
    for fixture in raw.fixtures_dict:
        is_named_by_region = any(is_named(kinds[fixture], region) for region in regions)
        if is_named_by_region or not support.get(fixture, "").startswith(raw.workspace_name):
            continue
        members = tuple(name for name in raw.objects_dict if _stands_on(name, fixture, support))
        is_wanted = any(part.startswith(fixture) or part in members for part in wanted)
        groups.append(Group(members, is_wanted, is_mirrored=False, fixture=fixture, turns=turns))
    return groups


def _stands_on(name: str, fixture: str, support: dict[str, str]) -> bool:
    """Return whether an object stands on or in a fixture, or on what does."""
    below = support.get(name, "")
    return below.startswith(fixture) or (below in support and _stands_on(below, fixture, support))


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


def evaluated_in(env: LiberoEnv) -> str:
    """Return the suite that evaluates the present arrangement, within `HELD_OUT`; empty if none does."""
    return next((suite for suite, apart in distances_to_official(env).items() if apart < HELD_OUT), "")


def distances_to_official(env: LiberoEnv) -> dict[str, float]:
    """Return how far the present arrangement is from the nearest in which a suite evaluates this task, m.

    Suites are those of `envs.libero.official_places`. The distance is that of what differs most: of an object
    from its place in an official state, or of a fixture from where the suite draws it. Turns do not count.
    """
    raw, distances = env.raw, dict[str, float]()
    starts = tuple(int(env.model.joint(one.joints[0]).qposadr[0]) for one in raw.objects_dict.values())
    here = np.stack([env.data.qpos[start : start + 2] for start in starts])
    for suite, (objects, fixtures) in official_places(env.task, raw.workspace_name, starts).items():
        ways = [np.linalg.norm(objects - here, axis=-1).max(axis=1).min()]
        for name, areas in fixtures.items():
            spot = env.model.body(raw.fixtures_dict[name].root_body).pos[:2] - raw.workspace_offset[:2]
            outside = np.maximum(areas[:, :2] - spot, spot - areas[:, 2:]).clip(min=0.0)
            ways.append(np.linalg.norm(outside, axis=1).min())
        distances[suite] = float(max(ways))
    return distances


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


def kept_free(cell: Workcell) -> Iterator[tuple[str, Array]]:
    """Yield points [n 3] where drawers, doors, hands and goals of this task need room, after their owner."""
    for kind, *names in goals(cell):
        target = names[-1]
        owner = owner_of(cell, target)
        if kind in ("turnon", "turnoff"):
            yield owner, _around(cell.scene.cloud(f"{target}_button"), BESIDE_KNOB)
        elif joint_of(cell, target) is not None and not is_object(cell, target):
            drawer = Drawer(cell, target)
            cloud = cell.scene.cloud(drawer.body)
            way = OPEN_FULLY - drawer.opening + BEFORE_DRAWER
            yield owner, np.concatenate([cloud, cloud + way * drawer.outwards])
        elif kind == "close":
            yield from ((owner, points) for points in _swept(cell, target))
        elif not is_object(cell, target) and target.startswith(cell.env.workspace_name):
            goal = region(cell, target)
            yield owner, _around(goal.centre[None], float(goal.half_extents[:2].max()) + GAP)


def _around(points: Array, distance: float) -> Array:
    """Return the corners [4 3] of the box around points [n 3], wider by a distance, at its floor."""
    low, high = points.min(axis=0), points.max(axis=0)
    low[:2], high[:2] = low[:2] - distance, high[:2] + distance
    return np.array([[x, y, low[2]] for x, y in (low[:2], (low[0], high[1]), high[:2], (high[0], low[1]))])


def _swept(cell: Workcell, fixture: str) -> Iterator[Array]:
    """Yield where a door is between wide open and shut."""
    door = Door.of(cell, fixture)
    angle = float(cell.scene.data.joint(door.joint).qpos[0])
    arms = cell.scene.cloud(door.body) - door.anchor
    for goal in np.linspace(0.0, np.sign(angle) * WIDE, 8):
        turn = Rotation.from_rotvec((goal - angle) * door.axis)
        yield door.anchor + turn.apply(arms)


def _bodies(cell: Workcell, group: Group) -> list[str]:
    """Return the bodies of a group whose shapes are known."""
    bodies = [body_of(cell, name) for name in group.members]
    if group.fixture:
        model = cell.scene.model
        root = model.body(cell.env.fixtures_dict[group.fixture].root_body).id
        names = [model.body(body).name for body in np.flatnonzero(model.body_rootid == root)]
        bodies += [name for name in names if name in cell.scene]
    return bodies


def _cloud(cell: Workcell, group: Group) -> Array:
    """Return points [n 3] on a group."""
    return np.concatenate([cell.scene.cloud(body) for body in _bodies(cell, group)])


def _carried(points: Array, middle: Array, spot: Array, turn: float) -> Array:
    """Return points [n 2] turned about `middle` (rad) and carried from there to `spot`."""
    return (points - middle) @ about_z(turn)[:2, :2].T + spot


def _middle(shape: Array) -> Array:
    """Return the middle [2] of an outline [n 2]."""
    return (shape.max(axis=0) + shape.min(axis=0)) / 2


def _table(raw: Any) -> tuple[Array, Array]:
    """Return the lowest and the highest x and y where the outline of an object may be (m, world)."""
    base = np.array(raw.sim.data.get_body_xpos("robot0_base"))[:2]
    low, high = _whole_table(raw)
    near = base + np.array([WIDER_REACH[0] - 0.05, -ASIDE])
    far = base + np.array([WIDER_REACH[1] + 0.05, ASIDE])
    return np.maximum(low + EDGE, near), np.minimum(high - EDGE, far)


def _whole_table(raw: Any) -> tuple[Array, Array]:
    """Return the lowest and the highest x and y of the table (m, world)."""
    middle = np.array(raw.workspace_offset[:2], dtype=np.float64)
    # a scene on the floor has no table's size
    size = getattr(raw, f"{raw.workspace_name.removeprefix('main_')}_full_size", (4.0, 4.0))
    half = np.array(size[:2]) / 2
    return middle - half, middle + half


def in_view(env: LiberoEnv, point: ArrayLike) -> bool:
    """Return whether a point [3] (m, world) is well inside the frame of the scene's camera."""
    camera = env.model.camera("agentview").id
    relative = env.data.cam_xmat[camera].reshape(3, 3).T @ (np.asarray(point) - env.data.cam_xpos[camera])
    most = IN_VIEW * np.tan(np.radians(env.model.cam_fovy[camera]) / 2) * -relative[2]  # it looks along -z
    return bool(np.abs(relative[:2]).max() < most)


def is_clear(env: LiberoEnv, point: Array) -> bool:
    """Return whether nothing stands between the scene's camera and a point [3] (m, world)."""
    start = np.array(env.data.cam_xpos[env.model.camera("agentview").id])
    hit = np.zeros(1, np.int32)
    share = env._mujoco.mj_ray(env.model, env.data, start, point - start, COLLISION_SHAPES, 1, -1, hit)
    return not 0 <= share < BEFORE


def is_visible(env: LiberoEnv, body: str, cloud: Array) -> bool:
    """Return whether nothing else hides most of the points [n 3] on a body from the scene's camera."""
    mujoco, root = env._mujoco, env.model.body(body).rootid[0]
    start = np.array(env.data.cam_xpos[env.model.camera("agentview").id])
    hit, hidden = np.zeros(1, np.int32), 0
    points = cloud[:: max(1, len(cloud) // RAYS)]
    for point in points:
        share = mujoco.mj_ray(env.model, env.data, start, point - start, COLLISION_SHAPES, 1, -1, hit)
        is_own = hit[0] >= 0 and env.model.body_rootid[env.model.geom_bodyid[hit[0]]] == root
        hidden += bool(0 <= share < BEFORE and not is_own)
    return hidden < HIDDEN * len(points)
