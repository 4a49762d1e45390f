"""Between questions with their answers and the tensors that a network reads and gives.

An answer is a choice among all names that occur, a number, or a box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vega_policy.analysis.questions import Question

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
