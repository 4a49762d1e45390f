"""Spatial questions about scenes, with answers from the simulator's state; baselines, scores and tables.

Kinds follow VSI-Bench (arXiv 2412.14171): object count, absolute and relative distance, relative direction,
object size, appearance order; grounding follows ScanRefer (arXiv 1912.08830). A question is generated only if
its objects are visible and its answer has a margin. Positions are in the robot's frame: x forward, y to its
left. The first view of a scene is an overview; the others are close-ups in the order of a camera pan.
"""

import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from vega_policy.analysis.linear_probes import Estimate, difference, estimate, format_estimate
from vega_policy.data.scenes import Scene, SceneObject
from vega_policy.evaluation.report import Paragraph, Table
from vega_policy.evaluation.stats import student_interval

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
COUNTS = tuple(str(number) for number in range(10))
MIN_VISIBLE = 0.002  # fraction of an image's pixels from which on an object is visible
MARGIN = 0.03  # m by which a nearest or outermost object must beat the next one ...
RATIO = 1.25  # ... and the factor for distances
MIN_ANGLE = math.radians(12)  # directions closer to straight ahead, back or sideways are left out
BIN = 10.0  # cm; distances are balanced in bins of this width
BINS = tuple(f"{low:.0f} cm" for low in (10.0, 20.0, 30.0))
MIN_FREQUENCY = 0.05  # answers to a smaller fraction of a text's questions are left out
TEST_EVERY = 4  # every fourth scene of a task is a test scene

EXTREMES = {
    "nearest to the robot": (0, 1),
    "farthest from the robot": (0, -1),
    "leftmost for the robot": (1, -1),
    "rightmost for the robot": (1, 1),
}
"""Description of an outermost object -> axis, and 1 for the lowest or -1 for the highest coordinate."""


@dataclass(frozen=True)
class Question:
    """One question about one scene; exactly one of `choice`, `number` and `box` is its answer."""

    scene: int  # index of the scene
    kind: str  # one of `KINDS`
    text: str  # with its options in alphabetical order: all that a model without images gets
    options: tuple[str, ...] = ()  # of a multiple choice
    choice: str | None = None  # the correct option
    number: float | None = None  # cm
    box: tuple[float, ...] | None = None  # centre and sides [6] in the robot's frame (m)
    label: str = ""  # answer, or bin of it, by which the questions of one text are balanced
    objects: tuple[str, ...] = ()  # words of the text that name or describe an object, in its order


@dataclass(frozen=True)
class QuestionSet:
    """Questions about training and test scenes, each balanced on its own."""

    train: list[Question]
    test: list[Question]


def make_question_set(
    scenes: Sequence[Scene], max_per_kind: int = 1500, max_texts: int = 60, seed: int = 0
) -> QuestionSet:
    """Generate and balance questions; every fourth scene of each task is a test scene.

    Training has at most `max_per_kind` questions of one kind, the test set half as many, and both at most
    `max_texts` different texts of one kind.
    """
    names = sorted({one.category for scene in scenes for one in scene.objects if one.movable})
    generated = [generate_questions(index, scene, names) for index, scene in enumerate(scenes)]
    rng = np.random.default_rng(seed)
    is_test = list(_choose_test_scenes(scenes))
    candidates = [q for group, tested in zip(generated, is_test, strict=True) if not tested for q in group]
    train = balance(candidates, rng, max_per_kind, max_texts)
    texts = {question.text for question in train}
    candidates = [q for group, tested in zip(generated, is_test, strict=True) if tested for q in group]
    candidates = [q for q in candidates if q.text in texts]
    test = balance(candidates, rng, max_per_kind // 2, max_texts)
    options = {name for question in train for name in question.options}
    return QuestionSet(train, [q for q in test if set(q.options) <= options])


def _choose_test_scenes(scenes: Sequence[Scene]) -> Iterator[bool]:
    """Yield for each scene whether it is a test scene; its name is its task's, a slash, and its number."""
    seen: Counter[str] = Counter()
    for scene in scenes:
        task = scene.name.rpartition("/")[0]
        yield seen[task] % TEST_EVERY == 0
        seen[task] += 1


def generate_questions(index: int, scene: Scene, categories: Sequence[str]) -> list[Question]:
    """Generate all questions about scene `index`, an overview and close-ups.

    `categories` are the movable objects of all scenes: a count may be zero.
    """
    fractions = visible_fractions(scene)
    visible = [one for one, part in zip(scene.objects, fractions[0], strict=True) if part >= MIN_VISIBLE]
    names = [one.category for one in scene.objects]
    single = {name for name in names if names.count(name) == 1}
    unique = sorted((one for one in visible if one.category in single), key=lambda one: one.category)
    return [
        *_object_counts(index, scene, visible, categories),
        *_absolute_distances(index, unique),
        *_object_sizes(index, scene, visible),
        *_relative_distances(index, unique),
        *_relative_directions(index, unique),
        *_appearance_orders(index, scene, fractions, single),
        *_groundings(index, visible, unique),
    ]


def visible_fractions(scene: Scene) -> np.ndarray:
    """Return the fraction of each view's pixels that show each object, [n k]."""
    segments = scene.views.segments.reshape(len(scene.views), -1)
    return np.stack([(segments == k).mean(axis=1) for k in range(len(scene.objects))], axis=1)


def distance(first: SceneObject, second: SceneObject) -> float:
    """Return the distance between the centres of two objects (m)."""
    return math.dist(first.centre, second.centre)


def _object_counts(
    index: int, scene: Scene, visible: Sequence[SceneObject], categories: Sequence[str]
) -> Iterator[Question]:
    movable = [one for one in scene.objects if one.movable]
    if any(one not in visible for one in movable):
        return  # with a hidden object the count in the image is another one
    texts = {f"How many of these are there: {name}?": name for name in categories}
    for text, name in [*texts.items(), ("How many movable things are there in all?", None)]:
        count = str(sum(name in (None, one.category) for one in movable))
        named = (name or "movable things",)
        yield Question(index, "object_count", text, COUNTS, choice=count, label=count, objects=named)


def _absolute_distances(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
    for first, second in itertools.combinations(unique, 2):
        number = 100 * distance(first, second)
        label = f"{BIN * (number // BIN):.0f} cm"
        if label in BINS:
            text = f"How far apart are the middles of {first.category} and {second.category}, in cm?"
            named = (first.category, second.category)
            yield Question(index, "absolute_distance", text, number=number, label=label, objects=named)


def _object_sizes(index: int, scene: Scene, visible: Sequence[SceneObject]) -> Iterator[Question]:
    """Yield sizes of objects described by their place: their name would give the answer away."""
    movable = [one for one in scene.objects if one.movable]
    if len(movable) < 2 or any(one not in visible for one in movable):
        return
    for words, (axis, sign) in EXTREMES.items():
        ordered = sorted(movable, key=lambda one, a=axis, s=sign: s * one.centre[a])
        if abs(ordered[0].centre[axis] - ordered[1].centre[axis]) >= MARGIN:
            text = f"How long is the longest side of the movable thing {words}, in cm?"
            number, label = 100 * ordered[0].longest, ordered[0].category
            named = (f"movable thing {words}",)
            yield Question(index, "object_size", text, number=number, label=label, objects=named)


def _relative_distances(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
    for reference in unique:
        others = [one for one in unique if one is not reference]
        for options in itertools.combinations(others, 3):
            near = sorted(options, key=lambda one, r=reference: distance(one, r))
            first, second = (distance(one, reference) for one in near[:2])
            if second >= RATIO * first and second - first >= MARGIN:
                names = tuple(one.category for one in options)
                text = f"Which of these is closest to {reference.category}: {', '.join(names)}?"
                named = (reference.category, *names)
                yield _choice(index, "relative_distance", text, names, near[0].category, named)


def _relative_directions(index: int, unique: Sequence[SceneObject]) -> Iterator[Question]:
    for origin, facing, target in itertools.permutations(unique, 3):
        ahead = np.subtract(facing.centre, origin.centre)[:2]
        there = np.subtract(target.centre, origin.centre)[:2]
        angle = math.atan2(ahead[0] * there[1] - ahead[1] * there[0], float(ahead @ there))  # left positive
        if min(abs(angle - k * math.pi / 2) for k in range(-2, 3)) < MIN_ANGLE:
            continue
        if min(np.linalg.norm(ahead), np.linalg.norm(there)) < 2 * MARGIN:
            continue
        answer = f"{'front' if abs(angle) < math.pi / 2 else 'back'} {'left' if angle > 0 else 'right'}"
        text = f"Standing at {origin.category} and facing {facing.category}, where is {target.category}?"
        named = (origin.category, facing.category, target.category)
        yield _choice(index, "relative_direction", text, DIRECTIONS, answer, named)


def _appearance_orders(
    index: int, scene: Scene, fractions: np.ndarray, single: set[str]
) -> Iterator[Question]:
    first_view: dict[str, int] = {}
    for one, fraction in zip(scene.objects, fractions.T, strict=True):
        clear = np.flatnonzero(fraction[1:] >= 2 * MIN_VISIBLE)
        any_pixel = np.flatnonzero(fraction[1:] > 0)
        if one.category in single and len(clear) and clear[0] == any_pixel[0]:
            first_view[one.category] = int(clear[0])
    for names in itertools.combinations(sorted(first_view), 3):
        earliest = min(first_view[name] for name in names)
        first = [name for name in names if first_view[name] == earliest]
        if len(first) == 1:
            text = f"Which of these appears first while the camera pans: {', '.join(names)}?"
            yield _choice(index, "appearance_order", text, names, first[0], names)


def _choice(
    index: int, kind: str, text: str, options: tuple[str, ...], answer: str, objects: tuple[str, ...]
) -> Question:
    return Question(index, kind, text, options, choice=answer, label=answer, objects=objects)


def _groundings(
    index: int, visible: Sequence[SceneObject], unique: Sequence[SceneObject]
) -> Iterator[Question]:
    for one in unique:
        if one.movable:
            yield _box(index, one.category, one)
    movable = [one for one in visible if one.movable]
    for category in sorted({one.category for one in movable}):
        same = [one for one in movable if one.category == category]
        if len(same) != 2:
            continue
        left, right = sorted(same, key=lambda one: -one.centre[1])
        if left.centre[1] - right.centre[1] >= MARGIN:
            for side, one in (("left", left), ("right", right)):
                yield _box(index, f"{category} on the {side}", one, ending=", as the robot sees it")
        for anchor in unique:
            near, far = sorted(same, key=lambda one, a=anchor: distance(one, a))
            if anchor.movable and distance(far, anchor) - distance(near, anchor) >= MARGIN:
                yield _box(index, f"{category} closer to {anchor.category}", near, anchor.category)
                yield _box(index, f"{category} farther from {anchor.category}", far, anchor.category)


def _box(index: int, words: str, target: SceneObject, *others: str, ending: str = "") -> Question:
    """Return the question where the object is that `words` describe; `others` are those they mention."""
    box = (*target.centre, *target.size)
    return Question(index, "grounding", f"Where is the {words}{ending}?", box=box, objects=(words, *others))


def balance(
    questions: Sequence[Question], rng: np.random.Generator, max_per_kind: int, max_texts: int
) -> list[Question]:
    """Select questions so that, for each text, every answer is correct equally often.

    Options become the answers that occur for the text. Grounding has no answers to balance: all questions of
    a text are kept. The texts with the most questions are kept, at most `max_texts` of a kind.
    """
    kept: list[Question] = []
    for kind in KINDS:
        of_text: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            if question.kind == kind:
                of_text[question.text].append(question)
        groups = [_balance_text(group, rng) for _, group in sorted(of_text.items())]
        groups = sorted(groups, key=len, reverse=True)[:max_texts]
        kept += _limit([group for group in groups if group], max_per_kind)
    return [kept[index] for index in rng.permutation(len(kept))]


def _balance_text(questions: list[Question], rng: np.random.Generator) -> list[Question]:
    """Draw equally many questions for each answer to one text, the answers in turn."""
    kind = questions[0].kind
    if kind == "grounding":
        return [questions[index] for index in rng.permutation(len(questions))]
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.label].append(question)
    labels = _labels_to_balance(questions, groups)
    if len(labels) < 2:
        return []
    count = min(len(groups[label]) for label in labels)
    drawn = [[groups[label][i] for i in rng.permutation(len(groups[label]))[:count]] for label in labels]
    order = [group[turn] for turn in range(count) for group in drawn]
    if kind == "object_count":
        order = [replace(question, options=tuple(labels)) for question in order]
    return order


def _labels_to_balance(questions: list[Question], groups: dict[str, list[Question]]) -> list[str]:
    """Return the answers that must occur equally often; none if one of them never occurs."""
    kind = questions[0].kind
    if kind == "absolute_distance":
        labels = list(BINS)
    elif kind in ("object_count", "object_size"):
        frequent = MIN_FREQUENCY * len(questions)
        labels = sorted(label for label, group in groups.items() if len(group) >= frequent)
    else:
        labels = list(questions[0].options)
    return labels if all(groups.get(label) for label in labels) else []


def _limit(groups: list[list[Question]], limit: int) -> list[Question]:
    """Keep at most `limit` questions: the same fraction of every text, in whole rounds of answers."""
    total = sum(len(group) for group in groups)
    if total <= limit:
        return [question for group in groups for question in group]
    kept = []
    for group in groups:
        round_size = len({question.label for question in group})
        rounds = int(len(group) * limit / total) // round_size
        kept += group[: max(1, rounds) * round_size]
    return kept


TOLERANCES = np.linspace(0.5, 0.05, 10)
MIN_IOU = 0.25


def score(question: Question, answer: Any) -> float:
    """Score an answer in [0, 1].

    0 or 1 for a choice, mean relative accuracy for a number, and for a box whether its IoU with the correct
    one is at least 0.25 (ScanRefer's Acc@0.25, arXiv 1912.08830).
    """
    if question.choice is not None:
        return float(answer == question.choice)
    if question.number is not None:
        return mean_relative_accuracy(float(answer), question.number)
    assert question.box is not None
    return float(box_iou(answer, question.box) >= MIN_IOU)


def mean_relative_accuracy(answer: float, correct: float) -> float:
    """Return the fraction of the tolerances 50%, 45%, ..., 5% that a number meets (VSI-Bench)."""
    return float((abs(answer - correct) / correct < TOLERANCES).mean())


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return intersection over union of two axis-aligned boxes, each centre and sides [6]."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    low = np.maximum(one[:3] - one[3:] / 2, two[:3] - two[3:] / 2)
    high = np.minimum(one[:3] + one[3:] / 2, two[:3] + two[3:] / 2)
    shared = np.clip(high - low, 0, None).prod()
    return float(shared / (one[3:].clip(0).prod() + two[3:].clip(0).prod() - shared))


def text_only_scores(train: Sequence[Question], test: Sequence[Question]) -> np.ndarray:
    """Score each test question under the best constant answer to its text in training.

    Texts that training does not have get the best constant answer to their kind.
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


def chance_scores(train: Sequence[Question], test: Sequence[Question]) -> np.ndarray:
    """Score each test question by guessing from its kind and options alone.

    One over the number of options for choices; the best constant answer to the kind for numbers and boxes.
    """
    constants = {kind: best_constant([q for q in train if q.kind == kind]) for kind in {q.kind for q in test}}
    return np.array([1 / len(q.options) if q.options else score(q, constants[q.kind]) for q in test])


def best_constant(questions: Sequence[Question]) -> object:
    """Return the one answer with the best score over questions of one kind.

    Raises:
        ValueError: If there is no question.
    """
    if not questions:
        raise ValueError("expected training questions of this kind, got none")
    if questions[0].choice is not None:
        names = [question.choice for question in questions]
        return max(sorted(set(map(str, names))), key=names.count)
    if questions[0].number is not None:
        numbers = sorted({round(float(question.number or 0.0), 1) for question in questions})
        candidates = numbers[:: max(1, len(numbers) // 40)]
        return max(candidates, key=lambda answer: sum(score(question, answer) for question in questions))
    return tuple(np.median([question.box for question in questions if question.box], axis=0).tolist())


@dataclass(frozen=True)
class Evaluation:
    """One point of a training curve; losses are means over kinds of question."""

    step: int
    training: float  # since the last point
    held_out: float  # of training scenes that are left out; nan if there are none

    def plain(self) -> dict[str, float | None]:
        """Return the values for JSON, which has no nan: None."""
        values = asdict(self)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def select_evaluation(curve: Sequence[Evaluation]) -> Evaluation:
    """Return the point of a curve whose weights are kept: the first with the lowest held-out loss.

    Where no held-out loss is a number, because no scene is left out, it is the last point.
    """
    known = [point for point in curve if math.isfinite(point.held_out)]
    return min(known, key=lambda point: point.held_out) if known else curve[-1]


FEWEST_SEEDS = 3
"""Training seeds from which on a gain has an interval over seeds."""


@dataclass
class QAScores:
    """Scores of every model on the same test questions."""

    questions: list[Question]
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # model -> score of each question in [0, 1]
    # Of trained models and their seeds; a model's score is the mean over its seeds.
    seeds: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)  # scores
    answers: dict[str, dict[int, list[Any]]] = field(default_factory=dict)
    curves: dict[str, dict[int, list[Evaluation]]] = field(default_factory=dict)

    def add(self, name: str, seed: int, answers: list[Any], curve: list[Evaluation]) -> None:
        """Add what a model answers that was trained with one seed."""
        scores = np.array([score(q, one) for q, one in zip(self.questions, answers, strict=True)])
        self.seeds.setdefault(name, {})[seed] = scores
        self.answers.setdefault(name, {})[seed] = answers
        self.curves.setdefault(name, {})[seed] = curve
        self.scores[name] = np.mean(list(self.seeds[name].values()), axis=0)

    @property
    def kinds(self) -> list[str]:
        """Kinds that occur among the questions."""
        return [kind for kind in KINDS if any(question.kind == kind for question in self.questions)]

    @property
    def kept(self) -> dict[str, dict[int, Evaluation]]:
        """Points of the training curves whose weights are kept, by model and seed."""
        return {
            name: {seed: select_evaluation(curve) for seed, curve in group.items()}
            for name, group in self.curves.items()
        }

    def mean(self, name: str, kind: str | None = None) -> Estimate:
        """Return a model's mean score of one kind, or the mean over kinds.

        It is the mean over seeds, with its interval over scenes, which does not include the variance between
        training seeds.
        """
        return estimate(self._sums(self.scores[name], kind), _mean_of_kinds)

    def gain(self, first: str, second: str, kind: str | None = None) -> Estimate:
        """Return the mean score of the first model minus that of the second, paired by scene.

        As in `mean`, the interval does not include the variance between training seeds: see `seed_gains`.
        """
        one, other = (self._sums(self.scores[name], kind) for name in (first, second))
        return difference(one, other, _mean_of_kinds)

    def seed_gains(self, first: str, second: str, kind: str | None = None) -> dict[int, float]:
        """Return `gain` of each seed that the first model was trained with.

        A second model without seeds, such as a constant answer, has the same scores for every seed.
        """
        others, gains = self.seeds.get(second), {}
        for seed, scores in self.seeds[first].items():
            other = self.scores[second] if others is None else others[seed]
            means = (_mean_of_kinds(self._sums(part, kind).sum(axis=0)) for part in (scores, other))
            gains[seed] = float(np.subtract(*means))
        return gains

    def seed_interval(self, first: str, second: str, kind: str | None = None) -> Estimate | None:
        """Return the mean of `seed_gains` with Student's 95% interval over seeds; None below three seeds.

        It says how another training run would come out on these test scenes, which `gain` does not.
        """
        gains = np.array(list(self.seed_gains(first, second, kind).values()))
        if len(gains) < FEWEST_SEEDS:
            return None
        return Estimate(float(gains.mean()), *student_interval(gains))

    def known(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the pairs of models that both have scores."""
        return [pair for pair in pairs if set(pair) <= self.scores.keys()]

    def summarize(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Return means of all models, gains of the known ones of `pairs`, losses and curves, for JSON."""
        kinds = {"mean": None} | {kind: kind for kind in self.kinds}
        known = {f"{first} minus {second}": (first, second) for first, second in self.known(pairs)}
        return {
            "scores": {
                name: {label: self.mean(name, kind).rounded() for label, kind in kinds.items()}
                for name in self.scores
            },
            "gains": {
                title: {label: self.gain(*pair, kind).rounded() for label, kind in kinds.items()}
                for title, pair in known.items()
            },
            "seed_gains": {
                title: {
                    label: {seed: round(gain, 5) for seed, gain in self.seed_gains(*pair, kind).items()}
                    for label, kind in kinds.items()
                }
                for title, pair in known.items()
            },
            "seed_intervals": {  # of the mean over seeds, where there are enough
                title: {
                    label: interval.rounded()
                    for label, kind in kinds.items()
                    if (interval := self.seed_interval(*pair, kind)) is not None
                }
                for title, pair in known.items()
                if len(self.seeds[pair[0]]) >= FEWEST_SEEDS
            },
            "held_out_loss": {  # of the weights that are kept; None without held-out scenes
                name: {
                    seed: {
                        "loss": round(point.held_out, 5) if math.isfinite(point.held_out) else None,
                        "step": point.step,
                    }
                    for seed, point in group.items()
                }
                for name, group in self.kept.items()
            },
            "curves": {
                name: {seed: [point.plain() for point in curve] for seed, curve in group.items()}
                for name, group in self.curves.items()
            },
        }

    def to_parquet(self) -> bytes:
        """Return a table with a row for each test question: its answer, and those of all models and seeds."""
        columns: dict[str, list[Any]] = {
            "scene": [question.scene for question in self.questions],
            "kind": [question.kind for question in self.questions],
            "question": [question.text for question in self.questions],
            "correct": [_to_text(q.choice or q.number or q.box) for q in self.questions],
        }
        for name, answers in self.answers.items():
            for seed, part in answers.items():
                columns[f"{name}, seed {seed}: answer"] = [_to_text(answer) for answer in part]
                columns[f"{name}, seed {seed}: score"] = self.seeds[name][seed].tolist()
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
        return buffer.getvalue()

    def _sums(self, scores: np.ndarray, kind: str | None) -> np.ndarray:
        """Return summed scores and counts, [scenes 2 kinds]."""
        kinds = [kind] if kind else self.kinds
        places = {scene: row for row, scene in enumerate(sorted({q.scene for q in self.questions}))}
        sums = np.zeros((len(places), 2 * len(kinds)))
        for question, number in zip(self.questions, scores, strict=True):
            if question.kind in kinds:
                row, column = places[question.scene], 2 * kinds.index(question.kind)
                sums[row, column : column + 2] += number, 1
        return sums


def _to_text(answer: Any) -> str:
    """Return a name, a number to the millimetre (cm) or a box to the millimetre (m)."""
    if isinstance(answer, str):
        return answer
    return f"{answer:.1f}" if isinstance(answer, float) else " ".join(f"{side:.3f}" for side in answer)


def _mean_of_kinds(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0::2] / sums[..., 1::2]).mean(axis=-1)


def qa_table(result: QAScores, pairs: Sequence[tuple[str, str]]) -> tuple[Table, Paragraph]:
    """Return the scores of every model by kind of question, and how much the first of each pair is better."""
    counts = [sum(question.kind == kind for question in result.questions) for kind in result.kinds]
    columns = (None, *result.kinds)
    rows = [("test questions", str(sum(counts)), *map(str, counts))]
    rows += [
        (name, *(format_estimate(result.mean(name, kind)) for kind in columns)) for name in result.scores
    ]
    rows += [
        (f"{first} minus {second}", *(format_estimate(result.gain(first, second, x)) for x in columns))
        for first, second in result.known(pairs)
    ]
    note = (
        "Accuracy for choices, mean relative accuracy for distances and sizes (VSI-Bench), Acc@0.25 for "
        "grounding (ScanRefer); means over training seeds. Intervals are over test scenes: they do not "
        "include the variance between seeds, for which see the gain of each training seed. Every answer to a "
        "text is correct equally often, so that the text alone should stay at chance."
    )
    return Table(_qa_header("model", result), rows), Paragraph(note, "quiet")


def seed_gains_table(result: QAScores, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return how much the first model of each pair is better with each training seed, by kind of question.

    From `FEWEST_SEEDS` on with the mean over seeds and its interval over seeds, beside that over scenes.
    """
    rows = []
    for pair in result.known(pairs):
        gains = [result.seed_gains(*pair, kind) for kind in (None, *result.kinds)]
        rows += [
            (f"{' minus '.join(pair)}, seed {seed}", *(f"{part[seed]:.3f}" for part in gains))
            for seed in gains[0]
        ]
        intervals = [result.seed_interval(*pair, kind) for kind in (None, *result.kinds)]
        if shown := [str(interval) for interval in intervals if interval is not None]:
            rows.append((f"{' minus '.join(pair)}, mean of {len(gains[0])} seeds", *shown))
    return Table(_qa_header("gain", result), rows)


def _qa_header(first: str, result: QAScores) -> tuple[str, ...]:
    return (first, "mean of kinds", *(kind.replace("_", " ") for kind in result.kinds))


def examples_table(questions: QuestionSet) -> Table:
    """Return one test question of each kind with its answer."""
    rows = []
    for kind in KINDS:
        one = next((question for question in questions.test if question.kind == kind), None)
        if one is not None:
            answer = one.choice or (f"{one.number:.1f}" if one.number else "")
            if one.box:
                answer = "box at " + ", ".join(f"{number:.2f}" for number in one.box)
            rows.append((kind.replace("_", " "), f"scene {one.scene}: {one.text}", answer))
    return Table(("kind", "question", "answer"), rows)


def held_out_table(result: QAScores) -> Table:
    """Return the held-out loss of each training and the step whose weights are kept, a column for each seed.

    A loss far above those of the same model's other seeds marks a training that has not converged.
    """
    seeds = list(dict.fromkeys(seed for group in result.kept.values() for seed in group))
    rows = [
        (name, *(f"{group[seed].held_out:.3f} (step {group[seed].step})" for seed in seeds))
        for name, group in result.kept.items()
    ]
    return Table(("model", *(f"seed {seed}" for seed in seeds)), rows)
