"""A small answer head on the policy's own eyes: image encoder, prior, fusion and backbone of `VegaModel`.

The head reads the fused context with three learned queries, one a kind of answer: a choice among all names
that occur, a number, a box. Features of the frozen encoders are computed once a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.questions import Question
from vega_policy.attention import Attention
from vega_policy.model import VegaModel
from vega_policy.observation import Observation
from vega_policy.parts import ModelConfig

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
        allowed: Which names may be answered, bool [b n]; none for numbers and boxes.
        choice: Index of the right name, or -1, [b].
        number: Standardised logarithm of the right number, or nan, [b].
        box: Standardised box, or nan, [b 6].
    """

    scene: Tensor
    texts: list[str]
    allowed: Tensor
    choice: Tensor
    number: Tensor
    box: Tensor

    def __getitem__(self, rows: Tensor) -> "Batch":
        """Some of the questions."""
        chosen = [self.texts[row] for row in rows.tolist()]
        parts = (self.allowed[rows], self.choice[rows], self.number[rows], self.box[rows])
        return Batch(self.scene[rows], chosen, *parts)

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
        return Batch(scene, [question.text for question in questions], allowed, choice, number, box)

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


class AnswerModel(nn.Module):
    """The policy's eyes and backbone with an answer head in the place of its action expert.

    Args:
        config: The eyes; `state_dim` is 1.
        names: Number of names that may be answered.
    """

    def __init__(self, config: ModelConfig, names: int) -> None:
        super().__init__()
        self.eyes = VegaModel(config)
        self.eyes.expert = nn.Identity()  # no actions here
        width = self.eyes.backbone.width
        self.queries = nn.Parameter(torch.randn(3, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, config.backbone.heads)
        self.name, self.number, self.box = nn.Linear(width, names), nn.Linear(width, 1), nn.Linear(width, 6)

    def forward(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of names [b n], numbers [b], boxes [b 6]; each scene of the batch is fused once."""
        context, mask = self.read(features, batch)
        queries = self.queries.expand(len(batch), -1, -1)
        answer = queries + self.attention(queries, self.norm(context), mask)
        return self.name(answer[:, 0]), self.number(answer[:, 1])[:, 0], self.box(answer[:, 2])

    def read(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The policy's context of each question, [b s d], and its mask [b s]."""
        scenes, back = batch.scene.unique(return_inverse=True)
        asked = self.eyes.prior is not None and self.eyes.fusion.reads_instruction
        if asked:  # then tokens differ from question to question
            scenes, back = batch.scene, torch.arange(len(batch))
        words = batch.texts if asked else [""] * len(scenes)
        observation = Observation(
            frames=None,
            state=torch.zeros(len(scenes), STATE),
            instruction=words,
            semantic=features.semantic[scenes],
            prior=None if features.prior is None else features.prior[scenes],
        )
        tokens = self.eyes.fuse(features.semantic[scenes], observation)[back]
        return self.eyes.backbone.read(
            tokens, batch.texts, torch.zeros(len(batch), STATE), features.semantic[batch.scene]
        )

    def loss(self, features: Features, batch: Batch) -> Tensor:
        """Mean over the questions: cross entropy among the options, absolute error of numbers and boxes."""
        logits, number, box = self(features, batch)
        chooses = batch.choice >= 0
        logits = logits.masked_fill(~batch.allowed, -1e4)
        total = functional.cross_entropy(logits[chooses], batch.choice[chooses], reduction="sum")
        known = batch.number.isfinite()
        total = total + (number[known] - batch.number[known]).abs().sum()
        placed = batch.box.isfinite().all(dim=1)
        return (total + (box[placed] - batch.box[placed]).abs().mean(dim=1).sum()) / len(batch)


@dataclass(frozen=True)
class AnswerTraining:
    """How an answer head is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Questions a step.
        rate: Peak learning rate.
        decay: Weight decay.
        seed: Of weights and order.
    """

    steps: int = 400
    batch: int = 64
    rate: float = 1e-3
    decay: float = 1e-2
    seed: int = 0


def train(
    config: ModelConfig,
    codec: Codec,
    questions: Batch,
    features: Features,
    how: AnswerTraining,
    label: str = "answers",
) -> tuple[AnswerModel, float]:
    """Train one model, its progress shown under a label.

    Returns:
        The model in evaluation mode, and the mean loss of its last tenth of steps.
    """
    torch.manual_seed(how.seed)
    model = AnswerModel(config, len(codec.names))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, how.rate, weight_decay=how.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, how.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(how.seed)
    last = []
    for step in tqdm(range(how.steps), f"Training {label}", unit="step"):
        rows = torch.randint(len(questions), (how.batch,), generator=generator)
        loss = model.loss(features, questions[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        if step >= 0.9 * how.steps:
            last.append(loss.item())
    return model.eval(), float(np.mean(last))


@torch.no_grad()
def answer(model: AnswerModel, codec: Codec, questions: Batch, features: Features) -> list[Any]:
    """Answers to questions, in batches."""
    given = []
    for rows in torch.arange(len(questions)).split(256):
        batch = questions[rows]
        given += codec.answers(batch, *model(features, batch))
    return given
