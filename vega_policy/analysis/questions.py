"""Questions about a scene with their answers, from the simulator's state.

Types follow VSI-Bench (arXiv 2412.14171): object count, absolute and relative distance, relative direction,
object size, appearance order; grounding follows ScanRefer (arXiv 1912.08830). A thing is only asked about
where a camera sees it, and only where the answer has a margin. Positions are in the robot's frame: x forward,
y to its left.

The first view of a scene is an overview; the others are close-ups in the order in which the camera pans.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vega_policy.analysis.scenes import Scene, Thing

KINDS = (
    "object_count",
    "absolute_distance",
    "object_size",
    "relative_distance",
    "relative_direction",
    "appearance_order",
    "grounding",
)
DIRECTIONS = ("front left", "front right", "back left", "back right")
SEEN = 0.002  # share of a picture's pixels from which on a thing counts as seen
MARGIN = 0.03  # m by which a nearest or outermost thing beats the next
RATIO = 1.25  # ... and the factor for distances
STRAIGHT = math.radians(12)  # directions closer to straight ahead, back or sideways are not asked for
BIN = 10.0  # cm; distances are balanced in bins of this width
BINS = tuple(f"{low:.0f} cm" for low in (10.0, 20.0, 30.0))

EXTREMES = {
    "nearest to the robot": (0, 1),
    "farthest from the robot": (0, -1),
    "leftmost for the robot": (1, -1),
    "rightmost for the robot": (1, 1),
}
"""How an outermost thing is told -> axis, and 1 for the lowest or -1 for the highest coordinate."""


@dataclass(frozen=True)
class Question:
    """One question about one scene; exactly one of `choice`, `number` and `box` is its answer.

    Attributes:
        scene: Index of the scene.
        kind: One of `KINDS`.
        text: The question, with its options in alphabetical order: all that is known without the picture.
        options: What may be answered, where there is a choice.
        choice: The right option.
        number: The right number (cm).
        box: Centre and sides [6] of the thing asked for, in the robot's frame (m).
        label: What is equalised among the questions of one text.
    """

    scene: int
    kind: str
    text: str
    options: tuple[str, ...] = ()
    choice: str | None = None
    number: float | None = None
    box: tuple[float, ...] | None = None
    label: str = ""


def ask(index: int, scene: Scene, categories: Sequence[str]) -> list[Question]:
    """Everything that may be asked about a scene.

    Args:
        index: The scene's number.
        scene: Overview and close-ups, with things and segments.
        categories: Movable things that may stand in any of the scenes; a count may be zero.
    """
    shares = seen_shares(scene)
    visible = [thing for thing, share in zip(scene.things, shares[0], strict=True) if share >= SEEN]
    single = _single(scene.things)
    unique = sorted((thing for thing in visible if thing.category in single), key=lambda t: t.category)
    return [
        *_counts(index, scene, visible, categories),
        *_distances(index, unique),
        *_sizes(index, scene, visible),
        *_nearest(index, unique),
        *_directions(index, unique),
        *_appearances(index, scene, shares, single),
        *_groundings(index, visible, unique),
    ]


def seen_shares(scene: Scene) -> np.ndarray:
    """Share of each view's pixels that show each thing, [n k]."""
    segments = scene.views.segments.reshape(len(scene.views), -1)
    return np.stack([(segments == k).mean(axis=1) for k in range(len(scene.things))], axis=1)


def distance(first: Thing, second: Thing) -> float:
    """Distance between the middles of two things (m)."""
    return math.dist(first.centre, second.centre)


def _single(things: Sequence[Thing]) -> set[str]:
    names = [thing.category for thing in things]
    return {name for name in names if names.count(name) == 1}


def _counts(
    index: int, scene: Scene, visible: Sequence[Thing], categories: Sequence[str]
) -> Iterator[Question]:
    movable = [thing for thing in scene.things if thing.movable]
    if any(thing not in visible for thing in movable):
        return  # a hidden thing would make the picture's answer a wrong one
    for category in categories:
        count = str(sum(thing.category == category for thing in movable))
        text = f"How many of these are there: {category}?"
        yield Question(index, "object_count", text, _NUMBERS, choice=count, label=count)
    text = "How many movable things are there in all?"
    count = str(len(movable))
    yield Question(index, "object_count", text, _NUMBERS, choice=count, label=count)


_NUMBERS = tuple(str(number) for number in range(10))


def _distances(index: int, unique: Sequence[Thing]) -> Iterator[Question]:
    for first, second in itertools.combinations(unique, 2):
        number = 100 * distance(first, second)
        label = f"{BIN * (number // BIN):.0f} cm"
        if label in BINS:
            text = f"How far apart are the middles of {first.category} and {second.category}, in cm?"
            yield Question(index, "absolute_distance", text, number=number, label=label)


def _sizes(index: int, scene: Scene, visible: Sequence[Thing]) -> Iterator[Question]:
    """The longest side of a thing that is told by its place: by its name, it would need no picture."""
    movable = [thing for thing in scene.things if thing.movable]
    if len(movable) < 2 or any(thing not in visible for thing in movable):
        return
    for words, (axis, sign) in EXTREMES.items():
        ordered = sorted(movable, key=lambda thing, a=axis, s=sign: s * thing.centre[a])
        if abs(ordered[0].centre[axis] - ordered[1].centre[axis]) >= MARGIN:
            text = f"How long is the longest side of the movable thing {words}, in cm?"
            number, label = 100 * ordered[0].longest, ordered[0].category
            yield Question(index, "object_size", text, number=number, label=label)


def _nearest(index: int, unique: Sequence[Thing]) -> Iterator[Question]:
    for reference in unique:
        others = [thing for thing in unique if thing is not reference]
        for options in itertools.combinations(others, 3):
            near = sorted(options, key=lambda thing, r=reference: distance(thing, r))
            first, second = (distance(thing, reference) for thing in near[:2])
            if second >= RATIO * first and second - first >= MARGIN:
                names = tuple(thing.category for thing in options)
                text = f"Which of these is closest to {reference.category}: {', '.join(names)}?"
                yield _choice(index, "relative_distance", text, names, near[0].category)


def _directions(index: int, unique: Sequence[Thing]) -> Iterator[Question]:
    for stand, face, target in itertools.permutations(unique, 3):
        ahead = np.subtract(face.centre, stand.centre)[:2]
        there = np.subtract(target.centre, stand.centre)[:2]
        angle = math.atan2(ahead[0] * there[1] - ahead[1] * there[0], float(ahead @ there))  # left positive
        if min(abs(angle - k * math.pi / 2) for k in range(-2, 3)) < STRAIGHT:
            continue
        if min(np.linalg.norm(ahead), np.linalg.norm(there)) < 2 * MARGIN:
            continue
        answer = f"{'front' if abs(angle) < math.pi / 2 else 'back'} {'left' if angle > 0 else 'right'}"
        text = f"Standing at {stand.category} and facing {face.category}, where is {target.category}?"
        yield _choice(index, "relative_direction", text, DIRECTIONS, answer)


def _appearances(index: int, scene: Scene, shares: np.ndarray, single: set[str]) -> Iterator[Question]:
    first_seen: dict[str, int] = {}
    for thing, share in zip(scene.things, shares.T, strict=True):
        views = np.flatnonzero(share[1:] >= 2 * SEEN)
        hardly = np.flatnonzero(share[1:] > 0)
        if thing.category in single and len(views) and views[0] == hardly[0]:
            first_seen[thing.category] = int(views[0])
    for names in itertools.combinations(sorted(first_seen), 3):
        earliest = min(first_seen[name] for name in names)
        ahead = [name for name in names if first_seen[name] == earliest]
        if len(ahead) == 1:
            text = f"Which of these appears first while the camera pans: {', '.join(names)}?"
            yield _choice(index, "appearance_order", text, names, ahead[0])


def _choice(index: int, kind: str, text: str, options: tuple[str, ...], answer: str) -> Question:
    return Question(index, kind, text, options, choice=answer, label=answer)


def _groundings(index: int, visible: Sequence[Thing], unique: Sequence[Thing]) -> Iterator[Question]:
    for thing in unique:
        if thing.movable:
            yield _box(index, f"Where is the {thing.category}?", thing)
    movable = [thing for thing in visible if thing.movable]
    for category in sorted({thing.category for thing in movable}):
        same = [thing for thing in movable if thing.category == category]
        if len(same) != 2:
            continue
        left, right = sorted(same, key=lambda thing: -thing.centre[1])
        if left.centre[1] - right.centre[1] >= MARGIN:
            for side, thing in (("left", left), ("right", right)):
                yield _box(index, f"Where is the {category} on the {side}, as the robot sees it?", thing)
        for anchor in unique:
            near, far = sorted(same, key=lambda thing, a=anchor: distance(thing, a))
            if anchor.movable and distance(far, anchor) - distance(near, anchor) >= MARGIN:
                yield _box(index, f"Where is the {category} closer to {anchor.category}?", near)
                yield _box(index, f"Where is the {category} farther from {anchor.category}?", far)


def _box(index: int, text: str, thing: Thing) -> Question:
    return Question(index, "grounding", text, box=(*thing.centre, *thing.size))
