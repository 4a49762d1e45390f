"""Skills for what is built in: drawers, knobs."""

import re

import numpy as np

from envs.demonstrators.arm import CLOSED, OPEN, PRECISE, Command, Reach, Skill, above, down, leaning
from envs.demonstrators.grasping import closing_axis, extents
from envs.demonstrators.libero_scene import joint_of, joint_position
from envs.demonstrators.rotations import Array, about_x, about_z
from envs.demonstrators.skills import ABOVE_GRASP, OPENING_STEPS, Workcell, descend, transit

OPEN_FULLY, OPEN_TO_FILL = (
    0.155,
    0.125,
)  # m; a drawer pulled out farther is in the way of the hand that fills it
SHUT = 0.0005  # m past zero
PUSHING_PITCH = np.deg2rad(35)
BAR_DEPTH = 0.017  # m from the frontmost point of a drawer that belongs to the bar of its handle
KNOB_TURN = 1.2  # rad; the stove is on from 0.5


class Drawer:
    """One drawer of a LIBERO cabinet: where its handle is and along which way it slides."""

    def __init__(self, cell: Workcell, region_name: str) -> None:
        """Reads the drawer of a region such as "wooden_cabinet_1_top_region".

        Raises:
            ValueError: the region is not a drawer.
        """
        match = re.fullmatch(r"(.*cabinet_\d+)_(top|middle|bottom)_region", region_name)
        joint = joint_of(cell, region_name)
        if match is None or joint is None:
            raise ValueError(f"expected the region of a cabinet's drawer, got {region_name!r}")
        self.body = f"{match[1]}_cabinet_{match[2]}"
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


def open_drawer(cell: Workcell, region_name: str, opening: float = OPEN_FULLY) -> Skill:
    """Reaches for the bar horizontally, one finger above and one below, and pulls."""
    drawer = Drawer(cell, region_name)
    outwards, handle = drawer.outwards, drawer.handle
    yaw = float(np.arctan2(outwards[1], outwards[0])) - np.pi / 2
    rotation = about_z(yaw + np.deg2rad(25)) @ about_x(np.deg2rad(-80)) @ down(0.0)
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


def _pull(cell: Workcell, drawer: Drawer, rotation: Array, opening: float) -> Skill:
    """Draws the hand along the slide, 3 cm ahead of where it is, until the drawer is out."""
    start, outwards = cell.arm.position, drawer.outwards
    for _ in range(80):
        if drawer.opening > opening:
            return True
        drawn = max(0.0, float((cell.arm.position - start) @ outwards))
        goal = start + (drawn + 0.03) * outwards
        yield Command(cell.arm.command(goal, rotation, CLOSED), PRECISE.noise_share)
    return False


def close_drawer(cell: Workcell, region_name: str) -> Skill:
    """Pushes the bar of the handle with closed fingers until the drawer is shut.

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
    """Pushes along the slide, 3 cm ahead of where the hand is, until the drawer is shut or nothing moves."""
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
    """Grips the ridge of a stove's knob from above and turns it about the knob's axis.

    Args:
        cell: where.
        fixture: name of the stove.
        direction: +1 turns on, -1 turns off.
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
