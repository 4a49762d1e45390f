"""Scores of answers: right or wrong, VSI-Bench's mean relative accuracy, overlap of boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vega_policy.analysis.questions import Question

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
