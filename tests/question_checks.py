"""Answers to spatial questions computed a second time: from the words and a table of what stands where."""

import math
import re
from dataclasses import dataclass

import numpy as np


@dataclass
class Known:
    """One thing, from wherever the test has it."""

    category: str
    centre: np.ndarray
    size: np.ndarray
    longest: float
    movable: bool
    first_seen: int = -1


def the_only(things, category):
    found = [thing for thing in things if thing.category == category]
    assert len(found) == 1, f"{category} is ambiguous or absent"
    return found[0]


def apart(first, second):
    return float(np.sqrt(((first.centre - second.centre) ** 2).sum()))


def right_answer(text, things):
    """What is right, by reading the question's text."""
    for pattern, answer in CHECKS.items():
        match = re.fullmatch(pattern, text)
        if match:
            return answer(things, *match.groups())
    raise AssertionError(f"no check for {text!r}")


def how_many(things, category):
    return str(len([thing for thing in things if thing.movable and thing.category == category]))


def how_many_in_all(things):
    return str(len([thing for thing in things if thing.movable]))


def how_far(things, first, second):
    return 100 * apart(the_only(things, first), the_only(things, second))


def how_long(things, end, robot):
    movable = [thing for thing in things if thing.movable]
    forward, left = (np.array([thing.centre[axis] for thing in movable]) for axis in (0, 1))
    place = {
        "nearest to": forward.argmin(),
        "farthest from": forward.argmax(),
        "leftmost for": left.argmax(),
        "rightmost for": left.argmin(),
    }[end]
    return 100 * movable[place].longest


def which_is_closest(things, reference, options):
    middle = the_only(things, reference)
    return min(options.split(", "), key=lambda name: apart(the_only(things, name), middle))


def where_from_there(things, stand, face, target):
    origin = the_only(things, stand).centre
    ahead, there = (the_only(things, name).centre - origin for name in (face, target))
    left_of_ahead = np.array([-ahead[1], ahead[0]])  # x is forward, y is left
    side = "left" if there[:2] @ left_of_ahead > 0 else "right"
    return f"{'front' if there[:2] @ ahead[:2] > 0 else 'back'} {side}"


def which_is_first(things, options):
    return min(options.split(", "), key=lambda name: the_only(things, name).first_seen)


def box(thing):
    return (*thing.centre, *thing.size)


def where_is(things, category):
    return box(the_only(things, category))


def where_is_on_side(things, category, side):
    same = [thing for thing in things if thing.category == category]
    ends = {"left": max, "right": min}
    return box(ends[side](same, key=lambda thing: thing.centre[1]))


def where_is_relative(things, category, relation, anchor):
    same = [thing for thing in things if thing.category == category]
    ends = {"closer to": min, "farther from": max}
    return box(ends[relation](same, key=lambda thing: apart(thing, the_only(things, anchor))))


CHECKS = {
    r"How many of these are there: (.+)\?": how_many,
    r"How many movable things are there in all\?": how_many_in_all,
    r"How far apart are the middles of (.+) and (.+), in cm\?": how_far,
    r"How long is the longest side of the movable thing (\w+ \w+) the (robot), in cm\?": how_long,
    r"Which of these is closest to (.+): (.+)\?": which_is_closest,
    r"Standing at (.+) and facing (.+), where is (.+)\?": where_from_there,
    r"Which of these appears first while the camera pans: (.+)\?": which_is_first,
    r"Where is the (.+) on the (left|right), as the robot sees it\?": where_is_on_side,
    r"Where is the (.+) (closer to|farther from) (.+)\?": where_is_relative,
    r"Where is the (.+)\?": where_is,
}


def agree(question, things, tolerance=1e-6):
    """Whether a question's answer is the one computed here."""
    right = right_answer(question.text, things)
    if question.choice is not None:
        return question.choice == right
    if question.number is not None:
        return math.isclose(question.number, right, abs_tol=100 * tolerance)
    return bool(np.allclose(question.box, right, atol=tolerance))
