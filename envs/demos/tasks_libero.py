"""The demonstrator of every LIBERO and LIBERO-PRO task: achieves the goal predicate by predicate."""

from envs.demos.libero_scene import Goal, body_of, goals, holds, joint_of
from envs.demos.planner_arm import Skill
from envs.demos.planner_fixtures import OPEN_TO_FILL, close_door, close_drawer, open_drawer, turn_knob
from envs.demos.planner_placing import pull_from_below, put
from envs.demos.planner_skills import Workcell

ORDER = {"open": 0, "turnon": 1, "turnoff": 1, "on": 2, "in": 2, "close": 3}
ROUNDS = 2  # what a later step has spoilt is done again once


def achieve_goals(cell: Workcell) -> Skill:
    """Makes every predicate of the problem's goal true, in an order in which none hinders the next.

    Raises:
        ValueError: the goal has a predicate for which there is no skill.
    """
    wanted = goals(cell)
    unknown = [goal for goal in wanted if goal[0] not in ORDER]
    if unknown:
        raise ValueError(f"no skill for {unknown}; there are skills for {sorted(ORDER)}")
    for _ in range(ROUNDS):
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
        case (_, thing, target):
            yield from _make_room(cell, thing, target)
            return (yield from put(cell, thing, target))
    raise ValueError(f"no skill for {goal}")


def _make_room(cell: Workcell, thing: str, target: str) -> Skill:
    """Opens the drawer that something is to be put into, if it is not open enough."""
    if joint_of(cell, target) is None or holds(cell, ("open", target)):
        return True
    yield from pull_from_below(cell, body_of(cell, thing), target, OPEN_TO_FILL)
    return (yield from open_drawer(cell, target, OPEN_TO_FILL))
