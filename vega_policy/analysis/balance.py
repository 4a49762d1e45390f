"""Question sets that cannot be answered without looking, and what a reader of the words alone still gets."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vega_policy.analysis.questions import BINS, KINDS, Question
from vega_policy.analysis.scores import score

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
