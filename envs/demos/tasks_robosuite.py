"""Demonstrators of the robosuite tasks: each a short program of skills."""

from collections.abc import Callable, Generator

import numpy as np

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
from envs.demos.planner_grasping import (
    ABOVE_GRASP,
    CLOSING_STEPS,
    OPENING_STEPS,
    Placement,
    Workcell,
    descend,
    grasp,
    place,
    release,
    transit,
)

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
    for _ in range(3):
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
    for _ in range(3):
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
