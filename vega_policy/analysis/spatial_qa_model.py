"""Model that answers spatial questions: the policy's encoder and backbone under a question-answering head.

A scene is encoded once, without the question; the question's queries then attend to that context. Frozen
encoders are not run here: their features are computed before.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.features import FeatureCache, cache_key, has_untrained_copy
from vega_policy.analysis.linear_probes import Estimate, difference, estimate
from vega_policy.analysis.spatial_qa import (
    KINDS,
    Question,
    QuestionSet,
    chance_scores,
    score,
    text_only_scores,
)
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.model.layers import Attention, Mlp
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.run_dir import atomic_file

STATE_DIM = 1  # there is no proprioception: the state is one zero
QUERIES = 4  # per question: it may name three objects
ANSWER_BATCH = 512
TEXT_ONLY = "text only (constant)"
CONTROLS = ("semantic only", "fused, random prior", "fused, untrained copy", "fused, blind", TEXT_ONLY)
"""Models that the fused one is compared with."""

# Position embeddings have unit amplitude and a fresh projector's output a fifth of that: with the default
# initialisation, models did not find the content of tokens in hundreds of steps.
PROJECTOR_GAIN = 10.0
ATTENTION_GAIN = 3.0  # of queries and keys; default weights attend to all tokens alike
PROJECTORS = ("project", "backbone.project_image")


@dataclass(frozen=True)
class Features:
    """Outputs of the frozen encoders for s scenes."""

    semantic: Tensor  # of the backbone's image encoder, [s v c gh gw]
    prior: Tensor | None  # [s v d gh gw]

    def mean(self) -> "Features":
        """Replace every scene's features by their mean over scenes (blind ablation)."""
        semantic, prior = (
            None if part is None else part.mean(0, keepdim=True).expand_as(part)
            for part in (self.semantic, self.prior)
        )
        assert semantic is not None
        return Features(semantic, prior)

    def __getitem__(self, scenes: Tensor) -> "Features":
        """Select scenes."""
        return Features(self.semantic[scenes], None if self.prior is None else self.prior[scenes])


@dataclass(frozen=True)
class QuestionBatch:
    """Questions as tensors."""

    scene: Tensor  # [b]
    texts: list[str]
    kinds: list[str]
    allowed: Tensor  # bool [b n], names that are options; none for numbers and boxes
    choice: Tensor  # [b], index of the correct name, or -1
    number: Tensor  # [b], standardised logarithm of the correct number, or nan
    box: Tensor  # [b 6], standardised box, or nan

    def __getitem__(self, rows: Tensor) -> "QuestionBatch":
        """Select questions."""
        texts, kinds = ([words[row] for row in rows.tolist()] for words in (self.texts, self.kinds))
        parts = (self.allowed[rows], self.choice[rows], self.number[rows], self.box[rows])
        return QuestionBatch(self.scene[rows], texts, kinds, *parts)

    def __len__(self) -> int:
        return len(self.texts)


class AnswerCodec:
    """Converts between answers and network outputs; names and scales are those of the training questions."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.names = sorted({name for question in questions for name in question.options})
        numbers = [np.log(question.number) for question in questions if question.number is not None]
        boxes = [question.box for question in questions if question.box is not None]
        self.number_scale = _mean_and_std(np.array(numbers)[:, None])
        self.box_scale = _mean_and_std(np.array(boxes).reshape(-1, 6))

    def encode(self, questions: Sequence[Question]) -> QuestionBatch:
        """Encode questions whose options all occur in training."""
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
        return QuestionBatch(scene, texts, kinds, allowed, choice, number, box)

    def decode(self, batch: QuestionBatch, logits: Tensor, number: Tensor, box: Tensor) -> list[Any]:
        """Decode network outputs to a name, a number (cm) or a box [6] (m) for each question."""
        choices = logits.masked_fill(~batch.allowed, -torch.inf).argmax(dim=1).tolist()
        numbers = np.exp(number.numpy() * self.number_scale[1][0] + self.number_scale[0][0])
        boxes = box.numpy() * self.box_scale[1] + self.box_scale[0]
        kinds = zip(batch.allowed.any(dim=1).tolist(), batch.number.isfinite().tolist(), strict=True)
        return [
            self.names[choices[row]] if is_choice else float(numbers[row]) if is_number else tuple(boxes[row])
            for row, (is_choice, is_number) in enumerate(kinds)
        ]


def _mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column; 0 and 1 without rows."""
    if not len(values):
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    return values.mean(axis=0), values.std(axis=0) + 1e-6


class Standardize(nn.Module):
    """Standardise the channels of features [s v c gh gw] by their mean and deviation over given scenes."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        axes = (0, 1, 3, 4)
        self.register_buffer("mean", features.mean(axes)[:, None, None])
        self.register_buffer("deviation", features.std(axes).clamp_min(1e-4)[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        """Standardise [s v c gh gw]."""
        return (features - self.mean) / self.deviation


class ContextAttention(nn.Module):
    """Attention of many questions' queries to the contexts of few scenes; keys are computed once a scene."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        with torch.no_grad():
            self.attention.q_proj.weight.mul_(ATTENTION_GAIN)
            self.attention.kv_proj.weight[:width].mul_(ATTENTION_GAIN)

    def forward(self, queries: Tensor, scene: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Attend to each question's own scene, queries [b k d], context [u n d], mask [u n] -> [b k d].

        `scene` [b] is the index of each question's context.
        """
        counts = torch.bincount(scene, minlength=len(context))
        order, place = scene.argsort(stable=True), torch.empty_like(scene)
        place[order] = torch.arange(len(scene)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        table = queries.new_zeros(len(context), int(counts.max()), *queries.shape[1:])
        table = table.index_put((scene, place), self.norm_query(queries))
        read = self.attention(table.flatten(1, 2), self.norm_context(context), mask)
        return queries + read.unflatten(1, table.shape[1:3])[scene, place]


def qa_model_config(
    backbone: BackboneConfig, fusion: FusionConfig, frame_size: int, views: int
) -> ModelConfig:
    """Return the config of a question-answering model's encoder, without a prior."""
    return ModelConfig(
        views=views,
        state_dim=STATE_DIM,
        action_dim=1,
        chunk_size=1,
        frame_size=frame_size,
        prior=PriorConfig(name="none"),
        fusion=fusion,
        backbone=backbone,
        head=ActionHeadConfig(width=32, depth=1, heads=2),  # the smallest: it is built and dropped
    )


class SpatialQAModel(nn.Module):
    """The policy's encoder and backbone with an answer head instead of its action head.

    `names` is the number of names that an answer may be; `features` give the scale of the encoders' channels.
    """

    def __init__(self, config: ModelConfig, names: int, features: Features) -> None:
        super().__init__()
        self.encoder = VegaModel(config)
        self.encoder.head = nn.Identity()
        fresh = {
            name: part
            for name, part in self.encoder.named_modules()
            if name in PROJECTORS and isinstance(part, Mlp)
        }
        with torch.no_grad():
            for projector in fresh.values():
                projector[-1].weight.mul_(PROJECTOR_GAIN)  # pyright: ignore[reportArgumentType, reportCallIssue]
        is_pretrained = "backbone.project_image" not in fresh  # then the projector expects unscaled features
        self.semantic = nn.Identity() if is_pretrained else Standardize(features.semantic)
        self.prior = None if features.prior is None else Standardize(features.prior)
        width = self.encoder.backbone.width
        self.queries = nn.Parameter(torch.randn(QUERIES, width))
        self.norm_text = nn.BatchNorm1d(width, affine=False)  # removes what all questions have in common
        self.text_to_queries = nn.Linear(width, QUERIES * width)
        self.attention = ContextAttention(width, config.backbone.heads)
        total = QUERIES * width
        self.norm, self.mix = nn.LayerNorm(total), Mlp(total, 2 * width, total)
        self.output = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, 2 * width), nn.GELU())
        self.name, self.number, self.box = (nn.Linear(2 * width, size) for size in (names, 1, 6))

    def forward(self, features: Features, batch: QuestionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of names [b n], numbers [b] and boxes [b 6]."""
        context, mask, scene = self.encode_context(features, batch)
        text = self.norm_text(self.encoder.backbone.pool(batch.texts))
        queries = self.queries + self.text_to_queries(text).unflatten(1, self.queries.shape)
        read = self.attention(queries, scene, context, mask).flatten(1)
        hidden = self.output(read + self.mix(self.norm(read)))
        return self.name(hidden), self.number(hidden)[:, 0], self.box(hidden)

    def encode_context(self, features: Features, batch: QuestionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's contexts [u s d], their mask [u s], and each question's context, [b]."""
        scenes, index = batch.scene.unique(return_inverse=True)
        texts = [""] * len(scenes)
        if self.encoder.prior is not None and self.encoder.fusion.reads_instruction:
            scenes, index, texts = batch.scene, torch.arange(len(batch)), batch.texts  # tokens depend on text
        tokens = self.fuse(features[scenes], texts)
        state = torch.zeros(len(scenes), STATE_DIM)
        context = self.encoder.backbone.encode_context(tokens, texts, state, features.semantic[scenes])
        return *context, index

    def fuse(self, features: Features, texts: list[str]) -> Tensor:
        """Return the fused tokens of scenes, [s v n d]."""
        semantic = self.semantic(features.semantic)
        prior = None if self.prior is None or features.prior is None else self.prior(features.prior)
        state = torch.zeros(len(texts), STATE_DIM)
        observation = Observation(None, state, texts, semantic=semantic, prior=prior)
        return self.encoder.fuse(semantic, observation)

    def loss(self, features: Features, batch: QuestionBatch) -> Tensor:
        """Return the mean over questions of cross entropy (choices) and absolute error (numbers, boxes)."""
        logits, number, box = self(features, batch)
        is_choice = batch.choice >= 0
        logits = logits.masked_fill(~batch.allowed, -1e4)
        total = functional.cross_entropy(logits[is_choice], batch.choice[is_choice], reduction="sum")
        is_number = batch.number.isfinite()
        total = total + (number[is_number] - batch.number[is_number]).abs().sum()
        is_box = batch.box.isfinite().all(dim=1)
        return (total + (box[is_box] - batch.box[is_box]).abs().mean(dim=1).sum()) / len(batch)


@dataclass(frozen=True)
class QATraining:
    """Training of a question-answering model."""

    steps: int = 400
    scenes: int = 16  # per step
    questions: int = 12  # per scene; all kinds are drawn equally often
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 1e-2
    seed: int = 0  # of weights and order


class QuestionSampler:
    """Samples the questions of each step: few scenes, all kinds equally often."""

    def __init__(self, questions: QuestionBatch, training: QATraining) -> None:
        self._training, self._generator = training, torch.Generator().manual_seed(training.seed)
        counts = Counter(questions.kinds)
        rows: dict[int, list[int]] = defaultdict(list)
        for row, scene in enumerate(questions.scene.tolist()):
            rows[scene].append(row)
        self._rows = [torch.tensor(group) for group in rows.values()]
        weights = torch.tensor([1.0 / counts[kind] for kind in questions.kinds])
        self._weights = [weights[group] for group in self._rows]

    def sample(self) -> Tensor:
        """Return the rows of one step, [m]."""
        scenes = torch.randperm(len(self._rows), generator=self._generator)[: self._training.scenes]
        drawn = []
        for index in scenes.tolist():
            count = min(self._training.questions, len(self._rows[index]))
            places = self._weights[index].multinomial(count, generator=self._generator)
            drawn.append(self._rows[index][places])
        return torch.cat(drawn)


def train_qa_model(
    config: ModelConfig,
    codec: AnswerCodec,
    questions: QuestionBatch,
    features: Features,
    training: QATraining,
    label: str = "answers",
) -> tuple[SpatialQAModel, float]:
    """Return a trained model in evaluation mode, and the mean loss of the last tenth of the steps."""
    torch.manual_seed(training.seed)
    model = SpatialQAModel(config, len(codec.names), features)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, training.steps, pct_start=0.1
    )
    sampler = QuestionSampler(questions, training)
    losses = []
    for _ in tqdm(range(training.steps), f"Training {label}", unit="step"):
        loss = model.loss(features, questions[sampler.sample()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-max(1, training.steps // 10) :]))


@torch.no_grad()
def predict_answers(
    model: SpatialQAModel, codec: AnswerCodec, questions: QuestionBatch, features: Features
) -> list[Any]:
    """Return the model's answer to each question; each scene is encoded once a batch."""
    order = questions.scene.argsort(stable=True)
    answers: list[Any] = [None] * len(questions)
    for rows in order.split(ANSWER_BATCH):
        batch = questions[rows]
        for row, answer in zip(rows.tolist(), codec.decode(batch, *model(features, batch)), strict=True):
            answers[row] = answer
    return answers


@dataclass
class QAScores:
    """Scores of every model on the same test questions."""

    questions: list[Question]
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # model -> score of each question in [0, 1]
    losses: dict[str, float] = field(default_factory=dict)  # trained model -> final training loss

    @property
    def kinds(self) -> list[str]:
        """Kinds that occur among the questions."""
        return [kind for kind in KINDS if any(question.kind == kind for question in self.questions)]

    def mean(self, name: str, kind: str | None = None) -> Estimate:
        """Return a model's mean score of one kind, or the mean over kinds, with its interval over scenes."""
        return estimate(self._sums(name, kind), _mean_of_kinds)

    def gain(self, first: str, second: str, kind: str | None = None) -> Estimate:
        """Return the mean score of the first model minus that of the second, paired by scene."""
        return difference(self._sums(first, kind), self._sums(second, kind), _mean_of_kinds)

    def _sums(self, name: str, kind: str | None) -> np.ndarray:
        """Return summed scores and counts, [scenes 2 kinds]."""
        kinds = [kind] if kind else self.kinds
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
class QAComparison:
    """Scores of all models, the questions, and the fused model, whose gate can be inspected."""

    scores: QAScores
    model: SpatialQAModel
    questions: QuestionSet


def compare_models(
    cache: FeatureCache, questions: QuestionSet, config: ModelConfig, prior: PriorConfig, training: QATraining
) -> QAComparison:
    """Train and test models with the prior, without it, with random or untrained ones, and without vision.

    `config` is an encoder without a prior, of `qa_model_config`. Ablations replace the fused model's prior
    features at test time.
    """
    result = QAScores(questions.test)
    result.scores["chance"] = chance_scores(questions.train, questions.test)
    result.scores[TEXT_ONLY] = text_only_scores(questions.train, questions.test)
    trainer = _CachedTrainer(cache, questions, config, training, result)
    semantic = cache.semantic(config.backbone)
    grid = semantic.shape[-2], semantic.shape[-1]
    features = Features(semantic, cache.prior(prior, grid))
    trainer.train_and_score("semantic only", PriorConfig(name="none"), Features(semantic, None))
    others = {"random prior": (PriorConfig(name="random"), False)}
    if has_untrained_copy(prior):
        others["untrained copy"] = (prior, True)
    for name, (other, is_untrained) in others.items():
        other_features = Features(semantic, cache.prior(other, grid, is_untrained))
        trainer.train_and_score(f"fused, {name}", other, other_features)
    fused = trainer.train_and_score("fused", prior, features)
    for name, ablated in ablate_prior(features).items():
        result.scores[f"fused, prior {name}"] = trainer.score(fused, ablated)
    trainer.train_and_score("fused, blind", prior, features.mean())
    return QAComparison(result, fused, questions)


class _CachedTrainer:
    """Trains models on the same questions, or loads them from the cache, and scores them on the same test."""

    def __init__(
        self,
        cache: FeatureCache,
        questions: QuestionSet,
        config: ModelConfig,
        training: QATraining,
        result: QAScores,
    ) -> None:
        self._cache, self._questions, self._config = cache, questions, config
        self._training, self._result, self._codec = training, result, AnswerCodec(questions.train)
        self._train, self._test = self._codec.encode(questions.train), self._codec.encode(questions.test)

    def train_and_score(self, name: str, prior: PriorConfig, features: Features) -> SpatialQAModel:
        """Train or load a model; add its test scores and training loss to the result."""
        config = replace(self._config, prior=prior)
        path = None
        if self._cache.folder is not None:
            path = self._cache.folder / f"answers-{self._key(name, config, features)}.pt"
        if path is not None and path.is_file():
            model, loss = self._load(path, config, features)
        else:
            model, loss = train_qa_model(config, self._codec, self._train, features, self._training, name)
            if path is not None:
                _save_model(path, model, loss)
        self._result.losses[name] = loss
        self._result.scores[name] = self.score(model, features)
        return model

    def score(self, model: SpatialQAModel, features: Features) -> np.ndarray:
        """Return the score of each test question."""
        answers = predict_answers(model, self._codec, self._test, features)
        return np.array([score(q, one) for q, one in zip(self._questions.test, answers, strict=True)])

    def _load(self, path: Path, config: ModelConfig, features: Features) -> tuple[SpatialQAModel, float]:
        stored = torch.load(path, weights_only=True)
        torch.manual_seed(self._training.seed)  # frozen encoders are not stored and may come from the seed
        model = SpatialQAModel(config, len(self._codec.names), features)
        keys = model.load_state_dict(stored["weights"], strict=False)
        trained = {name for name, part in model.named_parameters() if part.requires_grad}
        if keys.unexpected_keys or trained & set(keys.missing_keys):
            raise ValueError(f"{path} was trained by other code; delete it to train the model again")
        return model.eval(), stored["loss"]

    def _key(self, name: str, config: ModelConfig, features: Features) -> str:
        """Return a hash over all that determines the trained weights; features enter by their sums."""
        sums = [
            None if part is None else part.double().sum().item()
            for part in (features.semantic, features.prior)
        ]
        content = [(q.scene, q.text, q.label, q.number, q.box) for q in self._questions.train]
        values = {"config": asdict(config), "training": asdict(self._training), "features": sums}
        return cache_key(answers=2, model=name, scenes=self._cache.key, questions=content, **values)


def _save_model(path: Path, model: SpatialQAModel, loss: float) -> None:
    """Save all but the weights of frozen encoders."""
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    weights = {name: part for name, part in model.state_dict().items() if name not in frozen}
    with atomic_file(path) as draft:
        torch.save({"weights": weights, "loss": loss}, draft)


def ablate_prior(features: Features, seed: int = 0) -> Mapping[str, Features]:
    """Replace the prior's features by zeros, noise of equal mean and deviation, or those of other scenes."""
    prior = features.prior
    assert prior is not None
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prior.shape, generator=generator) * prior.std() + prior.mean()
    ablated = {"zeroed": torch.zeros_like(prior), "noise": noise, "shuffled": prior.roll(1, dims=0)}
    return {name: replace(features, prior=part) for name, part in ablated.items()}
