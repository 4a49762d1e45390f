"""The model that answers spatial questions: the policy's eyes and backbone, and a small head that asks.

A scene is read once, without words; a question's queries then look things up in that context. Frozen encoders
are not asked here: their features come computed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.correspondence import Estimate, difference, estimate
from vega_policy.analysis.linear_probes import cache_key, has_untrained_copy, untrained_copy
from vega_policy.analysis.spatial_qa import (
    KINDS,
    STATE,
    Batch,
    Codec,
    Features,
    Question,
    ask,
    balanced,
    chance,
    score,
    without_looking,
)
from vega_policy.backbones import make_backbone
from vega_policy.data.scenes import Scene
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.model.layers import Attention, Mlp
from vega_policy.model.observation import Observation, resize
from vega_policy.model.vega import VegaModel
from vega_policy.priors import make_prior, resolve

QUERIES = 4  # of a question: it may name three things
LOUDNESS = 10.0
"""Factor on the first weights of both projectors. Positions have unit amplitude and a fresh projector gives
a fifth of that; at first, what a token shows was not found in hundreds of steps.
"""
SHARPNESS = 3.0  # factor on the first weights of queries and keys: even attention hears all tokens alike
FRESH = ("project", "backbone.project_image")


class Standard(nn.Module):
    """Features of a frozen encoder, each channel with mean 0 and deviation 1 over all scenes.

    Args:
        features: [s v c gh gw].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        axes = (0, 1, 3, 4)
        self.register_buffer("mean", features.mean(axes)[:, None, None])
        self.register_buffer("deviation", features.std(axes).clamp_min(1e-4)[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        """[s v c gh gw] -> [s v c gh gw]."""
        return (features - self.mean) / self.deviation


class Lookup(nn.Module):
    """Queries of many questions look into the contexts of few scenes.

    Args:
        width: Token width d.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        with torch.no_grad():
            self.attention.query.weight.mul_(SHARPNESS)
            self.attention.key_value.weight[:width].mul_(SHARPNESS)

    def forward(self, queries: Tensor, scene: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Look up, keys being made once a scene.

        Args:
            queries: [b k d].
            scene: Which context each question is about, [b].
            context: [u n d].
            mask: [u n] (True: may be read).

        Returns:
            [b k d].
        """
        counts = torch.bincount(scene, minlength=len(context))
        order, place = scene.argsort(stable=True), torch.empty_like(scene)
        place[order] = torch.arange(len(scene)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        table = queries.new_zeros(len(context), int(counts.max()), *queries.shape[1:])
        table = table.index_put((scene, place), self.norm_query(queries))
        found = self.attention(table.flatten(1, 2), self.norm_context(context), mask)
        return queries + found.unflatten(1, table.shape[1:3])[scene, place]


class AnswerModel(nn.Module):
    """The policy's eyes and backbone with an answer head in the place of its action head.

    Args:
        config: The eyes; `state_dim` is 1.
        names: Number of names that may be answered.
        features: What the frozen encoders see, for the scale of their channels.
    """

    def __init__(self, config: ModelConfig, names: int, features: Features) -> None:
        super().__init__()
        self.eyes = VegaModel(config)
        self.eyes.head = nn.Identity()  # no actions here
        fresh = {
            name: part for name, part in self.eyes.named_modules() if name in FRESH and isinstance(part, Mlp)
        }
        with torch.no_grad():
            for projector in fresh.values():
                projector[-1].weight.mul_(LOUDNESS)  # pyright: ignore[reportArgumentType, reportCallIssue]
        read_raw = "backbone.project_image" not in fresh  # a pre-trained projector knows its encoder's scale
        self.semantic = nn.Identity() if read_raw else Standard(features.semantic)
        self.prior = None if features.prior is None else Standard(features.prior)
        width = self.eyes.backbone.width
        self.queries = nn.Parameter(torch.randn(QUERIES, width))
        self.telling = nn.BatchNorm1d(width, affine=False)  # what tells questions apart, not what all share
        self.ask = nn.Linear(width, QUERIES * width)
        self.lookup = Lookup(width, config.backbone.heads)
        whole = QUERIES * width
        self.norm, self.mix = nn.LayerNorm(whole), Mlp(whole, 2 * width, whole)
        self.conclude = nn.Sequential(nn.LayerNorm(whole), nn.Linear(whole, 2 * width), nn.GELU())
        self.name, self.number, self.box = (nn.Linear(2 * width, size) for size in (names, 1, 6))

    def forward(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of names [b n], numbers [b], boxes [b 6]."""
        context, mask, scene = self.read(features, batch)
        told = self.telling(self.eyes.backbone.pool(batch.texts))
        queries = self.queries + self.ask(told).unflatten(1, self.queries.shape)
        found = self.lookup(queries, scene, context, mask).flatten(1)
        answer = self.conclude(found + self.mix(self.norm(found)))
        return self.name(answer), self.number(answer)[:, 0], self.box(answer)

    def read(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's contexts [u s d], their mask [u s], and which one each question is about, [b]."""
        scenes, back = batch.scene.unique(return_inverse=True)
        words = [""] * len(scenes)
        if self.eyes.prior is not None and self.eyes.fusion.reads_instruction:
            scenes, back, words = batch.scene, torch.arange(len(batch)), batch.texts  # tokens hang on words
        tokens = self.see(features[scenes], words)
        state = torch.zeros(len(scenes), STATE)
        return *self.eyes.backbone.encode_context(tokens, words, state, features.semantic[scenes]), back

    def see(self, features: Features, words: list[str]) -> Tensor:
        """Fused tokens of some scenes, [s v n d]."""
        semantic = self.semantic(features.semantic)
        prior = None if self.prior is None or features.prior is None else self.prior(features.prior)
        state = torch.zeros(len(words), STATE)
        observation = Observation(None, state, words, semantic=semantic, prior=prior)
        return self.eyes.fuse(semantic, observation)

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


PICTURES = 16  # at once


@dataclass(frozen=True)
class Looker:
    """Looks at scenes with one encoder after the other.

    Args:
        scenes: The scenes.
        key: Names them.
        frame_size: Side of the frames in pixels.
        cache: Folder of what was seen before; None keeps nothing.
    """

    scenes: Sequence[Scene]
    key: str
    frame_size: int
    cache: Path | None = None

    def semantic(self, config: BackboneConfig) -> Tensor:
        """Output of a backbone's image encoder, [s v c gh gw].

        Raises:
            ValueError: If the image encoder learns: then its features cannot be computed once.
        """
        if not config.frozen_features:
            raise ValueError(
                "questions are answered on cached features; set backbone.freeze_image_encoder=true"
            )
        path = self._path(semantic=asdict(config))
        if path is not None and path.is_file():
            return _load(path)
        backbone = make_backbone(config, 1, len(self.scenes[0].views), self.frame_size)
        return self._look("semantic", lambda frames: backbone.encode(frames[None])[0], path)

    def prior(self, config: PriorConfig, grid: tuple[int, int], untrained: bool = False) -> Tensor:
        """Output of a prior, or of its untrained copy, [s v d gh gw]."""
        prior = (
            untrained_copy(replace(resolve(config), engine="plain"), grid)
            if untrained
            else make_prior(config, grid)
        )
        identity = {"weights": prior.fingerprint, "layer": prior.layer, "noise_level": prior.noise_level}
        path = self._path(**identity, seed=config.seed, input_size=config.input_size, untrained=untrained)
        if path is not None and path.is_file():
            return _load(path)
        label = f"untrained {config.name}" if untrained else config.name
        return self._look(label, lambda frames: prior(frames[:, None, None])[:, 0].float(), path)

    def _path(self, **identity: object) -> Path | None:
        if self.cache is None:
            return None
        return self.cache / f"{cache_key(scenes=self.key, frame_size=self.frame_size, **identity)}.npy"

    @torch.no_grad()
    def _look(self, label: str, read: Callable[[Tensor], Tensor], path: Path | None) -> Tensor:
        views = len(self.scenes[0].views)
        frames = np.concatenate([scene.views.frames for scene in self.scenes])
        maps = []
        for start in tqdm(range(0, len(frames), PICTURES), f"Looking: {label}", unit="batch"):
            part = torch.from_numpy(frames[start : start + PICTURES]).permute(0, 3, 1, 2).float() / 255
            maps.append(read(resize(part, self.frame_size, self.frame_size)))
        features = torch.cat(maps).unflatten(0, (-1, views))
        if path is not None:
            _save(path, features)
        return features


def _load(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def _save(path: Path, features: Tensor) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.save(file, features.numpy())
    draft.rename(path)


SMALLEST_EXPERT = ActionHeadConfig(width=32, depth=1, heads=2)  # built and dropped: answers need none
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
    names = {thing.category for scene in scenes for thing in scene.objects if thing.movable}
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
            head=SMALLEST_EXPERT,
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
