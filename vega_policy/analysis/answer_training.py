"""Trains models that answer spatial questions: few scenes a step, many questions about each."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vega_policy.analysis.answer_model import AnswerModel
from vega_policy.analysis.answers import Batch, Codec, Features
from vega_policy.parts import ModelConfig


@dataclass(frozen=True)
class AnswerTraining:
    """How an answer head is trained.

    Attributes:
        steps: Optimizer steps.
        scenes: Scenes a step.
        questions: Questions about each of them; types are drawn equally often.
        rate: Peak learning rate.
        decay: Weight decay.
        seed: Of weights and order.
    """

    steps: int = 400
    scenes: int = 16
    questions: int = 12
    rate: float = 1e-3
    decay: float = 1e-2
    seed: int = 0


class Draws:
    """Rows of a step's questions.

    Args:
        scene: Scene of each question, [q].
        kinds: Type of each question.
        how: Scenes a step, questions a scene, seed.
    """

    def __init__(self, scene: Tensor, kinds: Sequence[str], how: AnswerTraining) -> None:
        self._how, self._generator = how, torch.Generator().manual_seed(how.seed)
        counts = Counter(kinds)
        rows: dict[int, list[int]] = defaultdict(list)
        for row, index in enumerate(scene.tolist()):
            rows[index].append(row)
        self._rows = [torch.tensor(group) for group in rows.values()]
        weights = torch.tensor([1.0 / counts[kind] for kind in kinds])
        self._weights = [weights[group] for group in self._rows]

    def __call__(self) -> Tensor:
        """Rows [m]."""
        chosen = torch.randperm(len(self._rows), generator=self._generator)[: self._how.scenes]
        drawn = []
        for index in chosen.tolist():
            count = min(self._how.questions, len(self._rows[index]))
            places = self._weights[index].multinomial(count, generator=self._generator)
            drawn.append(self._rows[index][places])
        return torch.cat(drawn)


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
    model = AnswerModel(config, len(codec.names), features)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, how.rate, weight_decay=how.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, how.steps, pct_start=0.1)
    draw = Draws(questions.scene, questions.kinds, how)
    losses = []
    for _ in tqdm(range(how.steps), f"Training {label}", unit="step"):
        loss = model.loss(features, questions[draw()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-max(1, how.steps // 10) :]))


def trained(
    path: Path | None,
    config: ModelConfig,
    codec: Codec,
    questions: Batch,
    features: Features,
    how: AnswerTraining,
    label: str,
) -> tuple[AnswerModel, float]:
    """What `train` gives, from a file where it was trained before; else it is trained and kept.

    Args:
        path: Of what was learned; its name must tell all that the other arguments say. None keeps nothing.
        config: See `train`.
        codec: See `train`.
        questions: See `train`.
        features: See `train`.
        how: See `train`.
        label: See `train`.
    """
    if path is not None and path.is_file():
        stored = torch.load(path, weights_only=True)
        torch.manual_seed(how.seed)  # frozen encoders may be a seed's
        model = AnswerModel(config, len(codec.names), features)
        found = model.load_state_dict(stored["learned"], strict=False)  # frozen encoders are not kept
        learned = {name for name, part in model.named_parameters() if part.requires_grad}
        if found.unexpected_keys or learned & set(found.missing_keys):
            raise ValueError(f"{path} was learned by other code; delete it, and it is learned again")
        return model.eval(), stored["loss"]
    model, loss = train(config, codec, questions, features, how, label)
    if path is None:
        return model, loss
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    learned = {name: part for name, part in model.state_dict().items() if name not in frozen}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    torch.save({"learned": learned, "loss": loss}, draft)
    draft.rename(path)
    return model, loss


@torch.no_grad()
def answer(model: AnswerModel, codec: Codec, questions: Batch, features: Features) -> list[Any]:
    """Answers to questions, scene by scene so that each is read once, in the order of the questions."""
    order = questions.scene.argsort(stable=True)
    given: list[Any] = [None] * len(questions)
    for rows in order.split(512):
        batch = questions[rows]
        for row, one in zip(rows.tolist(), codec.answers(batch, *model(features, batch)), strict=True):
            given[row] = one
    return given
