"""Do the prior's tokens help to answer spatial questions? Models, controls, and scores on unseen scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.analysis.answers import (
    STATE,
    AnswerModel,
    AnswerTraining,
    Codec,
    Features,
    answer,
    train,
)
from vega_policy.analysis.balance import balanced, chance, without_looking
from vega_policy.analysis.bootstrap import Estimate, difference, estimate
from vega_policy.analysis.questions import KINDS, Question, ask
from vega_policy.analysis.scenes import Scene
from vega_policy.analysis.scores import score
from vega_policy.observation import resize
from vega_policy.parts import BackboneConfig, ExpertConfig, FusionConfig, ModelConfig, PriorConfig

SMALLEST_EXPERT = ExpertConfig(width=32, depth=1, heads=2)  # built and dropped: answers need none
TEST_SHARE = 4  # every fourth scene is never trained on


@dataclass(frozen=True)
class QuestionSet:
    """Questions about seen and unseen scenes, both balanced on their own.

    Attributes:
        train: Questions about the scenes that are trained on.
        test: Questions about the others.
    """

    train: list[Question]
    test: list[Question]


def question_set(
    scenes: Sequence[Scene], per_kind: int = 1500, texts: int = 60, seed: int = 0
) -> QuestionSet:
    """Ask and balance.

    Args:
        scenes: Every fourth is for the test.
        per_kind: Most training questions of one kind; half as many are tested.
        texts: Most texts of one kind.
        seed: Decides which questions are kept.
    """
    names = {thing.category for scene in scenes for thing in scene.things if thing.movable}
    asked = [ask(index, scene, sorted(names)) for index, scene in enumerate(scenes)]
    rng = np.random.default_rng(seed)
    seen = [q for index, group in enumerate(asked) if index % TEST_SHARE for q in group]
    kept = balanced(seen, rng, per_kind, texts)
    known = {question.text for question in kept}
    unseen = [q for group in asked[::TEST_SHARE] for q in group if q.text in known]
    tested = balanced(unseen, rng, per_kind // 2, texts)
    options = {name for question in kept for name in question.options}
    return QuestionSet(kept, [q for q in tested if set(q.options) <= options])


@dataclass(frozen=True)
class Eyes:
    """What all models of a comparison share.

    Attributes:
        backbone: The policy's backbone.
        fusion: The policy's fusion.
        frame_size: Side of the frames in pixels.
        views: Views a scene.
    """

    backbone: BackboneConfig
    fusion: FusionConfig
    frame_size: int
    views: int

    def model(self, prior: PriorConfig) -> ModelConfig:
        """Config of a model with some prior."""
        return ModelConfig(
            views=self.views,
            state_dim=STATE,
            action_dim=1,
            chunk_size=1,
            frame_size=self.frame_size,
            prior=prior,
            fusion=self.fusion,
            backbone=self.backbone,
            expert=SMALLEST_EXPERT,
        )


@torch.no_grad()
def features_of(scenes: Sequence[Scene], config: ModelConfig, batch: int = 8) -> Features:
    """Features of all scenes by the frozen encoders of a model.

    Raises:
        ValueError: If the image encoder learns: then its features cannot be computed once.
    """
    if not config.backbone.frozen_features:
        raise ValueError("questions are answered on cached features; set backbone.freeze_image_encoder=true")
    eyes = AnswerModel(config, 1).eyes.eval()
    semantic, prior = [], []
    for start in tqdm(range(0, len(scenes), batch), f"Looking, prior {config.prior.name}", unit="batch"):
        frames = torch.stack([_frames(scene, config.frame_size) for scene in scenes[start : start + batch]])
        semantic.append(eyes.backbone.encode(frames))
        if eyes.prior is not None:
            prior.append(eyes.prior(frames[:, :, None]).float())
    return Features(torch.cat(semantic), torch.cat(prior) if prior else None)


def _frames(scene: Scene, size: int) -> Tensor:
    """Views of a scene, [v 3 size size] in [0, 1]."""
    return resize(torch.from_numpy(scene.views.frames).permute(0, 3, 1, 2).float() / 255, size, size)


@dataclass
class Answers:
    """Scores of every model on the same unseen scenes.

    Attributes:
        questions: The tested questions.
        scores: Model -> score of each question in [0, 1].
        losses: Trained model -> its last training loss.
    """

    questions: list[Question]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def row(self, name: str, kind: str | None = None) -> Estimate:
        """Mean score with its interval over scenes; of all kinds, each with the same weight."""
        return estimate(self._sums(name, kind), _mean_of_kinds)

    def gain(self, first: str, second: str, kind: str | None = None) -> Estimate:
        """Mean score of the first model minus that of the second, paired over scenes."""
        return difference(self._sums(first, kind), self._sums(second, kind), _mean_of_kinds)

    def _sums(self, name: str, kind: str | None) -> np.ndarray:
        """Summed scores and counts, [scenes 2 kinds]."""
        kinds = [kind] if kind else [k for k in KINDS if any(q.kind == k for q in self.questions)]
        scenes = sorted({question.scene for question in self.questions})
        sums = np.zeros((len(scenes), 2 * len(kinds)))
        for question, number in zip(self.questions, self.scores[name], strict=True):
            if question.kind in kinds:
                row, column = scenes.index(question.scene), 2 * kinds.index(question.kind)
                sums[row, column : column + 2] += number, 1
        return sums


def _mean_of_kinds(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0::2] / sums[..., 1::2]).mean(axis=-1)


@dataclass(frozen=True)
class Reasoning:
    """Result of the comparison.

    Attributes:
        answers: Scores.
        model: The fused model, whose gate can be looked at.
        questions: What was asked.
    """

    answers: Answers
    model: AnswerModel
    questions: QuestionSet


def compare(
    scenes: Sequence[Scene], asked: QuestionSet, eyes: Eyes, prior: PriorConfig, how: AnswerTraining
) -> Reasoning:
    """Train and test: semantic only, fused, fused with a random prior, fused without sight.

    Controls take the prior away from the fused model at test time.

    Args:
        scenes: All scenes.
        asked: Questions about them.
        eyes: Backbone and fusion.
        prior: The prior of the fused model.
        how: Training.
    """
    codec = Codec(asked.train)
    batches = codec.batch(asked.train), codec.batch(asked.test)
    answers = Answers(asked.test)
    answers.scores["chance"] = chance(asked.train, asked.test)
    answers.scores["words alone (constant)"] = without_looking(asked.train, asked.test)
    configs = {
        "semantic only": eyes.model(PriorConfig(name="none")),
        "fused, random prior": eyes.model(PriorConfig(name="random")),
        "fused": eyes.model(prior),
    }
    seen: dict[str, Features] = {}
    for name, config in configs.items():
        seen[name] = features_of(scenes, config)
        model, answers.losses[name] = train(config, codec, batches[0], seen[name], how, name)
        answers.scores[name] = _scores(model, codec, batches[1], seen[name], asked.test)
    fused = model
    for name, control in prior_controls(seen["fused"]).items():
        answers.scores[f"fused, prior {name}"] = _scores(fused, codec, batches[1], control, asked.test)
    unseen = seen["fused"].mean()
    blind, answers.losses["fused, blind"] = train(configs["fused"], codec, batches[0], unseen, how, "blind")
    answers.scores["fused, blind"] = _scores(blind, codec, batches[1], unseen, asked.test)
    return Reasoning(answers, fused, asked)


def prior_controls(features: Features, seed: int = 0) -> Mapping[str, Features]:
    """The prior's features taken away: zeros, noise of their mean and deviation, those of other scenes."""
    prior = features.prior
    assert prior is not None
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prior.shape, generator=generator) * prior.std() + prior.mean()
    others = prior.roll(1, dims=0)
    changed = {"zeroed": torch.zeros_like(prior), "noise": noise, "shuffled": others}
    return {name: replace(features, prior=part) for name, part in changed.items()}


def _scores(
    model: AnswerModel, codec: Codec, batch: object, features: Features, questions: Sequence[Question]
) -> np.ndarray:
    given = answer(model, codec, batch, features)  # type: ignore[arg-type]
    return np.array([score(question, one) for question, one in zip(questions, given, strict=True)])
