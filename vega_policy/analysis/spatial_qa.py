"""Questions about a scene with their answers, from the simulator's state.

Types follow VSI-Bench (arXiv 2412.14171): object count, absolute and relative distance, relative direction,
object size, appearance order; grounding follows ScanRefer (arXiv 1912.08830). A thing is only asked about
where a camera sees it, and only where the answer has a margin. Positions are in the robot's frame: x forward,
y to its left.

The first view of a scene is an overview; the others are close-ups in the order in which the camera pans.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vega_policy.data.scenes import Scene, SceneObject

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
    visible = [thing for thing, share in zip(scene.objects, shares[0], strict=True) if share >= SEEN]
    single = _single(scene.objects)
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
    return np.stack([(segments == k).mean(axis=1) for k in range(len(scene.objects))], axis=1)


def distance(first: SceneObject, second: SceneObject) -> float:
    """Distance between the middles of two things (m)."""
    return math.dist(first.centre, second.centre)


def _single(things: Sequence[SceneObject]) -> set[str]:
    names = [thing.category for thing in things]
    return {name for name in names if names.count(name) == 1}


def _counts(
    index: int, scene: Scene, visible: Sequence[SceneObject], categories: Sequence[str]
) -> Iterator[Question]:
    movable = [thing for thing in scene.objects if thing.movable]
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


def _distances(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
    for first, second in itertools.combinations(unique, 2):
        number = 100 * distance(first, second)
        label = f"{BIN * (number // BIN):.0f} cm"
        if label in BINS:
            text = f"How far apart are the middles of {first.category} and {second.category}, in cm?"
            yield Question(index, "absolute_distance", text, number=number, label=label)


def _sizes(index: int, scene: Scene, visible: Sequence[SceneObject]) -> Iterator[Question]:
    """The longest side of a thing that is told by its place: by its name, it would need no picture."""
    movable = [thing for thing in scene.objects if thing.movable]
    if len(movable) < 2 or any(thing not in visible for thing in movable):
        return
    for words, (axis, sign) in EXTREMES.items():
        ordered = sorted(movable, key=lambda thing, a=axis, s=sign: s * thing.centre[a])
        if abs(ordered[0].centre[axis] - ordered[1].centre[axis]) >= MARGIN:
            text = f"How long is the longest side of the movable thing {words}, in cm?"
            number, label = 100 * ordered[0].longest, ordered[0].category
            yield Question(index, "object_size", text, number=number, label=label)


def _nearest(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
    for reference in unique:
        others = [thing for thing in unique if thing is not reference]
        for options in itertools.combinations(others, 3):
            near = sorted(options, key=lambda thing, r=reference: distance(thing, r))
            first, second = (distance(thing, reference) for thing in near[:2])
            if second >= RATIO * first and second - first >= MARGIN:
                names = tuple(thing.category for thing in options)
                text = f"Which of these is closest to {reference.category}: {', '.join(names)}?"
                yield _choice(index, "relative_distance", text, names, near[0].category)


def _directions(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
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
    for thing, share in zip(scene.objects, shares.T, strict=True):
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


def _groundings(
    index: int, visible: Sequence[SceneObject], unique: Sequence[SceneObject]
) -> Iterator[Question]:
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


def _box(index: int, text: str, thing: SceneObject) -> Question:
    return Question(index, "grounding", text, box=(*thing.centre, *thing.size))


TOLERANCES = np.linspace(0.5, 0.05, 10)
OVERLAP = 0.25


def mean_relative_accuracy(guess: float, right: float) -> float:
    """Share of the tolerances 50%, 45%, ..., 5% within which a number lies (VSI-Bench, arXiv 2412.14171).

    Args:
        guess: What was answered.
        right: What is right; positive.
    """
    return float((abs(guess - right) / right < TOLERANCES).mean())


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes parallel to the axes, each centre and sides [6]."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    low = np.maximum(one[:3] - one[3:] / 2, two[:3] - two[3:] / 2)
    high = np.minimum(one[:3] + one[3:] / 2, two[:3] + two[3:] / 2)
    shared = np.clip(high - low, 0, None).prod()
    return float(shared / (one[3:].clip(0).prod() + two[3:].clip(0).prod() - shared))


def score(question: Question, answer: Any) -> float:
    """Score an answer in [0, 1].

    Right or wrong for a choice, mean relative accuracy for a number, and for a box whether it overlaps the
    right one by a quarter (ScanRefer's Acc@0.25, arXiv 1912.08830).
    """
    if question.choice is not None:
        return float(answer == question.choice)
    if question.number is not None:
        return mean_relative_accuracy(float(answer), question.number)
    assert question.box is not None
    return float(overlap(answer, question.box) >= OVERLAP)


RARE = 0.05  # an answer given to a smaller share of a text's questions is not asked for


def balanced(
    questions: Sequence[Question], rng: np.random.Generator, per_kind: int, texts: int
) -> list[Question]:
    """Questions of which, text by text, every answer is right equally often.

    Args:
        questions: All that could be asked.
        rng: Decides which are kept.
        per_kind: Most questions of one kind.
        texts: Most different texts of one kind, the ones with most questions.

    Returns:
        Questions in random order. Options are the answers that occur for the text. Grounding has no answers
        to equalise: things stand anywhere, and texts have as many questions as they have.
    """
    kept: list[Question] = []
    for kind in KINDS:
        of_text: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            if question.kind == kind:
                of_text[question.text].append(question)
        sets = [_equalised(asked, rng) for _, asked in sorted(of_text.items())]
        sets = sorted(sets, key=len, reverse=True)[:texts]
        kept += _capped([group for group in sets if group], rng, per_kind)
    return [kept[index] for index in rng.permutation(len(kept))]


def _equalised(asked: list[Question], rng: np.random.Generator) -> list[Question]:
    """Equally many questions for each answer of one text."""
    kind = asked[0].kind
    if kind == "grounding":
        return [asked[index] for index in rng.permutation(len(asked))]
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        groups[question.label].append(question)
    required = _required(asked, groups)
    if len(required) < 2:
        return []
    count = min(len(groups[label]) for label in required)
    drawn = [
        groups[label][index] for label in required for index in rng.permutation(len(groups[label]))[:count]
    ]
    order = [drawn[place * count + turn] for turn in range(count) for place in range(len(required))]
    if kind == "object_count":
        order = [replace(question, options=tuple(required)) for question in order]
    return order


def _required(asked: list[Question], groups: dict[str, list[Question]]) -> list[str]:
    """Answers that have to occur equally often; none where one of them never does."""
    kind = asked[0].kind
    if kind == "absolute_distance":
        wanted = list(BINS)
    elif kind in ("object_count", "object_size"):
        wanted = sorted(label for label, group in groups.items() if len(group) >= RARE * len(asked))
    else:
        wanted = list(asked[0].options)
    return wanted if all(groups.get(label) for label in wanted) else []


def _capped(sets: list[list[Question]], rng: np.random.Generator, most: int) -> list[Question]:
    """At most so many questions, the same share of every text, whole rounds of answers at a time."""
    total = sum(len(group) for group in sets)
    if total <= most:
        return [question for group in sets for question in group]
    kept = []
    for group in sets:
        round_size = len({question.label for question in group})
        rounds = int(len(group) * most / total) // round_size
        kept += group[: max(1, rounds) * round_size]
    return kept


def without_looking(train: Sequence[Question], test: Sequence[Question]) -> np.ndarray:
    """Scores of the best constant answer to each text.

    What it answers is what served best for the text in training; texts that training did not have get what
    served best for their kind.

    Returns:
        Score of each test question in [0, 1].
    """
    by_text, by_kind = defaultdict(list), defaultdict(list)
    for question in train:
        by_text[question.text].append(question)
        by_kind[question.kind].append(question)
    best: dict[str, object] = {}
    scores = []
    for question in test:
        if question.text not in best:
            best[question.text] = best_constant(by_text.get(question.text) or by_kind[question.kind])
        scores.append(score(question, best[question.text]))
    return np.array(scores)


def chance(train: Sequence[Question], test: Sequence[Question]) -> np.ndarray:
    """Score of each test question by somebody who knows its kind and options, but not its words.

    For choices one over the number of options; for numbers and boxes the best constant answer to the kind.
    """
    constants = {kind: best_constant([q for q in train if q.kind == kind]) for kind in {q.kind for q in test}}
    return np.array([1 / len(q.options) if q.options else score(q, constants[q.kind]) for q in test])


def best_constant(questions: Sequence[Question]) -> object:
    """The answer that serves best for all of some questions of one kind.

    Raises:
        ValueError: If there is no question.
    """
    if not questions:
        raise ValueError("no question of this kind was asked in training")
    if questions[0].choice is not None:
        names = [question.choice for question in questions]
        return max(sorted(set(map(str, names))), key=names.count)
    if questions[0].number is not None:
        numbers = sorted({round(float(question.number or 0.0), 1) for question in questions})
        candidates = numbers[:: max(1, len(numbers) // 40)]
        return max(candidates, key=lambda guess: sum(score(question, guess) for question in questions))
    return tuple(np.median([question.box for question in questions if question.box], axis=0).tolist())


STATE = 1  # a question comes with no proprioception: the state is one zero


@dataclass(frozen=True)
class Features:
    """What frozen encoders make of the scenes.

    Attributes:
        semantic: Output of the backbone's image encoder, [s v c gh gw].
        prior: Output of the prior, [s v d gh gw]; None without one.
    """

    semantic: Tensor
    prior: Tensor | None

    def mean(self) -> "Features":
        """Every scene's features replaced by their mean over scenes: nothing is seen."""
        mean = [None if part is None else part.mean(0, keepdim=True).expand_as(part) for part in self.parts]
        assert mean[0] is not None
        return Features(mean[0], mean[1])

    def __getitem__(self, scenes: Tensor) -> "Features":
        """Some of the scenes."""
        return Features(self.semantic[scenes], None if self.prior is None else self.prior[scenes])

    @property
    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Both streams."""
        return self.semantic, self.prior


@dataclass(frozen=True)
class Batch:
    """Questions as tensors.

    Attributes:
        scene: [b].
        texts: b questions.
        kinds: Their types.
        allowed: Which names may be answered, bool [b n]; none for numbers and boxes.
        choice: Index of the right name, or -1, [b].
        number: Standardised logarithm of the right number, or nan, [b].
        box: Standardised box, or nan, [b 6].
    """

    scene: Tensor
    texts: list[str]
    kinds: list[str]
    allowed: Tensor
    choice: Tensor
    number: Tensor
    box: Tensor

    def __getitem__(self, rows: Tensor) -> "Batch":
        """Some of the questions."""
        texts, kinds = ([words[row] for row in rows.tolist()] for words in (self.texts, self.kinds))
        parts = (self.allowed[rows], self.choice[rows], self.number[rows], self.box[rows])
        return Batch(self.scene[rows], texts, kinds, *parts)

    def __len__(self) -> int:
        return len(self.texts)


class Codec:
    """Between answers and numbers that a network gives; scales are those of the training questions.

    Args:
        questions: The training questions.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.names = sorted({name for question in questions for name in question.options})
        numbers = [np.log(question.number) for question in questions if question.number is not None]
        boxes = [question.box for question in questions if question.box is not None]
        self.number_scale = _scale(np.array(numbers)[:, None])
        self.box_scale = _scale(np.array(boxes).reshape(-1, 6))

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Questions whose options all occurred in training."""
        index = {name: place for place, name in enumerate(self.names)}
        allowed = torch.zeros(len(questions), len(self.names), dtype=torch.bool)
        choice = torch.full((len(questions),), -1)
        number = torch.full((len(questions),), float("nan"))
        box = torch.full((len(questions), 6), float("nan"))
        for row, question in enumerate(questions):
            allowed[row, [index[name] for name in question.options]] = True
            if question.choice is not None:
                choice[row] = index[question.choice]
            if question.number is not None:
                mean, deviation = self.number_scale
                number[row] = float((np.log(question.number) - mean[0]) / deviation[0])
            if question.box is not None:
                mean, deviation = self.box_scale
                box[row] = torch.from_numpy((np.array(question.box) - mean) / deviation)
        scene = torch.tensor([question.scene for question in questions])
        texts, kinds = [question.text for question in questions], [question.kind for question in questions]
        return Batch(scene, texts, kinds, allowed, choice, number, box)

    def answers(self, batch: Batch, logits: Tensor, number: Tensor, box: Tensor) -> list[Any]:
        """What the network answers to each question: a name, a number (cm) or a box [6] (m)."""
        places = logits.masked_fill(~batch.allowed, -torch.inf).argmax(dim=1).tolist()
        numbers = np.exp(number.numpy() * self.number_scale[1][0] + self.number_scale[0][0])
        boxes = box.numpy() * self.box_scale[1] + self.box_scale[0]
        kinds = zip(batch.allowed.any(dim=1).tolist(), batch.number.isfinite().tolist(), strict=True)
        return [
            self.names[places[row]] if chooses else float(numbers[row]) if counts else tuple(boxes[row])
            for row, (chooses, counts) in enumerate(kinds)
        ]


def _scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column; of nothing, 0 and 1."""
    if not len(values):
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    return values.mean(axis=0), values.std(axis=0) + 1e-6
