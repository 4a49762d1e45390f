"""What a LIBERO problem adds to the geometry: named regions, joints of fixtures, goals."""

from dataclasses import dataclass

import numpy as np

from envs.demos.planner_arm import Array
from envs.demos.planner_skills import Workcell

type Goal = tuple[str, ...]
"""A predicate and its arguments in lower case, such as ("on", "plate_1", "flat_stove_1_cook_region")."""


@dataclass(frozen=True)
class Region:
    """A box-shaped site in which an object is asked to be."""

    centre: Array  # [3] m, world
    half_extents: Array  # [3] m, along the axes of the world, as LIBERO's own checks take them


def region(cell: Workcell, name: str) -> Region:
    """The region `name` where it is now."""
    site = cell.env.sim.model.site_name2id(name)
    rotation = np.array(cell.env.sim.data.site_xmat[site]).reshape(3, 3)
    half = np.abs(rotation @ np.array(cell.scene.model.site_size[site]))
    return Region(np.array(cell.env.sim.data.site_xpos[site]), half)


def body_of(cell: Workcell, name: str) -> str:
    """Name of the body that carries the collision geometry of a BDDL object."""
    return name if name in cell.scene else f"{name}_main"


def is_object(cell: Workcell, name: str) -> bool:
    """True if `name` is a thing with a body of its own, False if it is a region."""
    return body_of(cell, name) in cell.scene


def joint_of(cell: Workcell, region_name: str) -> str | None:
    """Name of the joint that moves a region (a drawer's slide), or None if the region stands still."""
    site = cell.env.object_sites_dict.get(region_name)
    return site.joints[0] if site is not None and site.joints else None


def joint_position(cell: Workcell, joint: str) -> float:
    """Position of a slide (m) or hinge (rad)."""
    return float(cell.scene.data.joint(joint).qpos[0])


def goals(cell: Workcell) -> list[Goal]:
    """The predicates that the problem asks for, all of which have to hold at the end."""
    return [tuple(goal) for goal in cell.env.parsed_problem["goal_state"]]


def holds(cell: Workcell, goal: Goal) -> bool:
    """LIBERO's own judgement of one predicate now."""
    return bool(cell.env._eval_predicate(list(goal)))
