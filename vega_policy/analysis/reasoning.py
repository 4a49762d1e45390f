"""Do the prior's tokens help to answer spatial questions? Models, controls, and scores on unseen scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from vega_policy.analysis.answer_model import AnswerModel
from vega_policy.analysis.answer_training import AnswerTraining, answer, trained
from vega_policy.analysis.answers import STATE, Codec, Features
from vega_policy.analysis.balance import balanced, chance, without_looking
from vega_policy.analysis.bootstrap import Estimate, difference, estimate
from vega_policy.analysis.looking import Looker
from vega_policy.analysis.measures import cache_key
from vega_policy.analysis.questions import KINDS, Question, ask
from vega_policy.analysis.readouts import has_untrained_copy
from vega_policy.analysis.scenes import Scene
from vega_policy.analysis.scores import score
from vega_policy.parts import BackboneConfig, ExpertConfig, FusionConfig, ModelConfig, PriorConfig

SMALLEST_EXPERT = ExpertConfig(width=32, depth=1, heads=2)  # built and dropped: answers need none
WORDS = "words alone (constant)"
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
    looker: Looker, asked: QuestionSet, eyes: Eyes, prior: PriorConfig, how: AnswerTraining
) -> Reasoning:
    """Train and test: semantic only, fused, fused with an untrained or random prior, fused without sight.

    Controls take the prior away from the fused model at test time.

    Args:
        looker: Sees all scenes.
        asked: Questions about them.
        eyes: Backbone and fusion.
        prior: The prior of the fused model.
        how: Training.
    """
    answers = Answers(asked.test)
    answers.scores["chance"] = chance(asked.train, asked.test)
    answers.scores[WORDS] = without_looking(asked.train, asked.test)
    contest = _Contest(looker, asked, eyes, how, answers)
    semantic = looker.semantic(eyes.backbone)
    grid = semantic.shape[-2], semantic.shape[-1]
    seen = Features(semantic, looker.prior(prior, grid))
    others = {"random prior": (PriorConfig(name="random"), False)}
    if has_untrained_copy(prior):
        others["untrained copy"] = (prior, True)
    contest.enter("semantic only", PriorConfig(name="none"), Features(semantic, None))
    for name, (other, untrained) in others.items():
        contest.enter(f"fused, {name}", other, Features(semantic, looker.prior(other, grid, untrained)))
    fused = contest.enter("fused", prior, seen)
    for name, control in prior_controls(seen).items():
        answers.scores[f"fused, prior {name}"] = contest.scores(fused, control)
    contest.enter("fused, blind", prior, seen.mean())
    return Reasoning(answers, fused, asked)


class _Contest:
    """Trains models on the same questions and scores them on the same test."""

    def __init__(
        self, looker: Looker, asked: QuestionSet, eyes: Eyes, how: AnswerTraining, answers: Answers
    ) -> None:
        self._looker, self._asked, self._eyes, self._how, self._answers = looker, asked, eyes, how, answers
        self._codec = Codec(asked.train)
        self._train, self._test = self._codec.batch(asked.train), self._codec.batch(asked.test)

    def enter(self, name: str, prior: PriorConfig, features: Features) -> AnswerModel:
        """Train (or load) a model, score it, note its loss."""
        config, cache = self._eyes.model(prior), self._looker.cache
        path = None
        if cache is not None:
            path = cache / f"answers-{self._key(name, config, features)}.pt"
        model, loss = trained(path, config, self._codec, self._train, features, self._how, name)
        self._answers.losses[name] = loss
        self._answers.scores[name] = self.scores(model, features)
        return model

    def scores(self, model: AnswerModel, features: Features) -> np.ndarray:
        """Score of each tested question."""
        given = answer(model, self._codec, self._test, features)
        return np.array([score(q, one) for q, one in zip(self._asked.test, given, strict=True)])

    def _key(self, name: str, config: ModelConfig, features: Features) -> str:
        """Names all that decides what a model learns; its features by their sums."""
        sums = [None if part is None else part.double().sum().item() for part in features.parts]
        asked = [(q.scene, q.text, q.label, q.number, q.box) for q in self._asked.train]
        values = {"config": asdict(config), "how": asdict(self._how), "features": sums, "asked": asked}
        return cache_key(answers=1, model=name, scenes=self._looker.key, **values)


def prior_controls(features: Features, seed: int = 0) -> Mapping[str, Features]:
    """The prior's features taken away: zeros, noise of their mean and deviation, those of other scenes."""
    prior = features.prior
    assert prior is not None
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prior.shape, generator=generator) * prior.std() + prior.mean()
    others = prior.roll(1, dims=0)
    changed = {"zeroed": torch.zeros_like(prior), "noise": noise, "shuffled": others}
    return {name: replace(features, prior=part) for name, part in changed.items()}
