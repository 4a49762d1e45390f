"""Skills that every task is made of: transit, grasp, place, retreat. Each is a generator of commands."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from envs.demos.planner_arm import (
    ALIGNING,
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
)
from envs.demos.planner_grasping import Grasp, GraspWish, Scene, closing_axis, extents, plan_grasp

CLOSING_STEPS = 11  # until the fingers press with full force
OPENING_STEPS = 8
CORRIDOR = 0.10  # m to each side of the hand's path that must be free
ABOVE_GRASP = 0.06  # m
SLIPPED = 0.04  # m by which a held body has moved in the hand that no longer holds it
TIGHT = 0.066  # m; a body as wide as that leaves each open finger a few millimetres
STUCK = 0.02  # m above its goal at which a lowered thing sits on something
BESIDE, BESIDE_TRIES, RISE = 0.01, 3, 0.02  # m aside, how often, after rising by so many metres
NEAREST = 0.36  # m from the axis of the robot's base; a hand that rises nearer folds the elbow to its limit


@dataclass(frozen=True)
class Workcell:
    """The scene and the arm in it: all that a skill needs to know."""

    scene: Scene
    arm: Arm
    clearance: ArmClearance
    env: Any  # the raw robosuite environment, for what only a task knows (pegs, bins, goals)
    detour: Array = field(default_factory=lambda: np.zeros(3))  # x, y (m), yaw (rad) of the first approach

    @classmethod
    def of(cls, raw: Any, detour: Array | None = None) -> "Workcell":
        """The workcell of a raw robosuite 1.4 (or LIBERO) environment that has just been reset."""
        clearance = ArmClearance(raw.sim, raw.robots[0])
        return cls(Scene(raw.sim), Arm(raw.sim), clearance, raw, np.zeros(3) if detour is None else detour)


def corridor_top(points: Array, start: ArrayLike, end: ArrayLike, radius: float = CORRIDOR) -> float:
    """Height of the highest of `points` [n 3] beside or on the way from start to end, seen from above.

    Returns:
        Metres; -inf if the way is free.
    """
    first, last = np.asarray(start, dtype=np.float64)[:2], np.asarray(end, dtype=np.float64)[:2]
    way = last - first
    share = np.clip((points[:, :2] - first) @ way / (way @ way + 1e-9), 0.0, 1.0)
    aside = np.linalg.norm(points[:, :2] - (first + share[:, None] * way), axis=1)
    return float(points[aside < radius, 2].max(initial=-np.inf))


def away_from_base(cell: Workcell, position: Array) -> Array:
    """The point [3] itself, or the nearest one at its height that is not too near to the robot's base."""
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
    """Goes over everything in between to a point at or above `position`: up, then across.

    Args:
        cell: where.
        position: goal of the grip point [3] (m); the height is raised where the way asks for it.
        rotation: of the grip site at the goal [3 3].
        gripper: OPEN or CLOSED.
        carried: body in the hand, whose underside has to clear the way too.
        clearance: between the highest obstacle and the lowest carried point (m).
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
    """Aligns above a point, more exactly where it is `tight`, then goes straight down to it, slowly."""
    aligning = replace(ALIGNING, within=0.003, steps=30) if tight else ALIGNING
    yield from cell.arm.move(above(position, ABOVE_GRASP), rotation, gripper, aligning)
    return (yield from cell.arm.move(position, rotation, gripper, PRECISE))


def grasp(
    cell: Workcell, body: str, wish: GraspWish | None = None, tries: int = 3
) -> Generator[Command, None, Grasp | None]:
    """Grasps `body` and lifts it by 6 cm, planning again above it and after each failure.

    Returns:
        The grasp that holds, or None after `tries` failures.
    """
    wish = wish or GraspWish()

    def hindered(planned: Grasp) -> bool:
        return bool(cell.clearance.touched(planned.position, down(planned.yaw)) - {body})

    for _ in range(tries):
        planned = plan_grasp(cell.scene, body, wish, hindered)
        ready = above(planned.position, ABOVE_GRASP + 0.01)
        yield from transit(cell, ready, down(planned.yaw), OPEN, clearance=0.03)
        planned = plan_grasp(
            cell.scene, body, replace(wish, yaw=planned.yaw, yaw_limit=0.6, kind=planned.kind), hindered
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
        wish = replace(wish, avoided=(*wish.avoided, planned.offset))
        yield from cell.arm.hold(cell.arm.position, rotation, OPEN, OPENING_STEPS)
    return None


def hand_goal(cell: Workcell, body: str, xy: ArrayLike, underside: float) -> Array:
    """Where the grip point [3] must go for the held body to be over `xy`, its lowest point at a height."""
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
    """Carries the held `body` over its goal, measures how it hangs there, lowers it, lets go, retreats.

    The offset between hand and body is measured again after transit and after aligning, because the body
    settles in the fingers on the way.

    Returns:
        True, or False as soon as the body has slipped out of the hand, which is then open.
    """
    before = cell.scene.position(body) - cell.arm.position
    underside = placement.support + placement.drop
    goal = hand_goal(cell, body, placement.xy, underside)
    yield from transit(cell, above(goal, 0.05), rotation, CLOSED, carried=body, clearance=placement.clearance)
    if np.linalg.norm(cell.scene.position(body) - cell.arm.position - before) > SLIPPED:
        yield from release(cell, rotation, placement.retreat)
        return False
    goal = hand_goal(cell, body, placement.xy, underside)
    aligned = np.array([goal[0], goal[1], cell.arm.position[2]])
    yield from cell.arm.move(aligned, rotation, CLOSED, Reach(0.008, 0.1, steps=40, noise_share=0.6))
    goal[:2] = hand_goal(cell, body, placement.xy, underside)[:2]
    yield from _lower(cell, goal, rotation)
    if placement.let_go:
        yield from release(cell, rotation, placement.retreat, goal)
    return True


def _lower(cell: Workcell, goal: Array, rotation: Array) -> Skill:
    """Lowers what is held to `goal` [3]; where it sits on an edge, beside, where the edge pushes it."""
    lowered = yield from cell.arm.move(goal, rotation, CLOSED, LOWERING)
    for _ in range(BESIDE_TRIES):
        if lowered or cell.arm.position[2] < goal[2] + STUCK:
            return True
        pushed = cell.arm.position - goal
        pushed[2] = 0.0
        goal = goal + BESIDE * pushed / (np.linalg.norm(pushed) + 1e-9)
        high = np.array([*goal[:2], cell.arm.position[2] + RISE])
        yield from cell.arm.move(high, rotation, CLOSED, Reach(0.008, 9.0, noise_share=0.3))
        lowered = yield from cell.arm.move(goal, rotation, CLOSED, LOWERING)
    return lowered


def release(cell: Workcell, rotation: Array, retreat: float = 0.08, position: Array | None = None) -> Skill:
    """Opens the hand where it is (or at `position`) and goes straight up by `retreat` metres."""
    here = cell.arm.position if position is None else position
    yield from cell.arm.hold(here, rotation, OPEN, OPENING_STEPS)
    return (yield from cell.arm.move(above(here, retreat), rotation, OPEN, CLEARING))
