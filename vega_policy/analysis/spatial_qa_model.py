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
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.features import (
    FeatureCache,
    Features,
    TextCache,
    cache_key,
    has_untrained_copy,
    to_device,
)
from vega_policy.analysis.spatial_qa import (
    Evaluation,
    QAScores,
    Question,
    QuestionSet,
    chance_scores,
    score,
    select_evaluation,
    text_only_scores,
)
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.model.layers import Attention, Block, Mlp
from vega_policy.model.observation import EncodedText, Observation
from vega_policy.model.vega import VegaModel
from vega_policy.run_dir import atomic_file

STATE_DIM = 1  # there is no proprioception: the state is one zero
OBJECTS = 4  # that a question names at most
BLOCKS, HEADS = 2, 8  # of the answer head
ANSWER_BATCH = 512
TEXT_ONLY = "text only (constant)"
SEMANTIC, FUSED, WORDS, PRIOR_ONLY = "semantic only", "fused", "words only", "prior only"
COPY, FUTURE = "fused, untrained copy", "fused, future"
FUTURE_COPY = "fused, future of the untrained copy"
FUSED_PAIRS = tuple(
    (FUSED, other)
    for other in (SEMANTIC, "fused, random prior", COPY, PRIOR_ONLY, "fused, blind", WORDS, TEXT_ONLY)
)
"""Models that are compared, the first minus the second."""
QUESTION_PAIRS = (
    (SEMANTIC, WORDS),
    (FUSED, WORDS),
    (FUTURE, WORDS),
    (PRIOR_ONLY, WORDS),
    (FUSED, SEMANTIC),
    (FUTURE, SEMANTIC),
    (FUSED, COPY),
    (COPY, SEMANTIC),
    (FUTURE, FUSED),
    (FUTURE, FUTURE_COPY),
    (FUTURE_COPY, SEMANTIC),
    (PRIOR_ONLY, SEMANTIC),
)
"""The same for measure=questions."""

# Position embeddings have unit amplitude and a fresh projector's output a fifth of that: with the default
# initialisation, models did not find the content of tokens in hundreds of steps.
PROJECTOR_GAIN = 10.0
ATTENTION_GAIN = 3.0  # of queries and keys; default weights attend to all tokens alike
PROJECTORS = ("project", "backbone.project_image")


@dataclass(frozen=True)
class QuestionBatch:
    """Questions as tensors."""

    scene: Tensor  # [b], always on the CPU: the shapes of a batch follow from it
    texts: list[str]
    kinds: list[str]
    objects: list[tuple[str, ...]]  # that each question names
    named: Tensor  # [b k], index of each object's name among the answers, or -1
    allowed: Tensor  # bool [b n], names that are options; none for numbers and boxes
    choice: Tensor  # [b], index of the correct name, or -1
    number: Tensor  # [b], standardised logarithm of the correct number, or nan
    box: Tensor  # [b 6], standardised box, or nan

    def __getitem__(self, rows: Tensor) -> "QuestionBatch":
        """Select questions."""
        chosen = rows.tolist()
        texts, kinds = ([words[row] for row in chosen] for words in (self.texts, self.kinds))
        objects = [self.objects[row] for row in chosen]
        parts = (
            objects,
            self.named[rows],
            self.allowed[rows],
            self.choice[rows],
            self.number[rows],
            self.box[rows],
        )
        return QuestionBatch(self.scene[rows], texts, kinds, *parts)

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device) -> "QuestionBatch":
        """Copy options and answers to a device without waiting for it."""
        names = ("named", "allowed", "choice", "number", "box")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})

    @property
    def phrases(self) -> list[tuple[str, ...]]:
        """Text of each question, then the objects that it names."""
        return [(text, *named) for text, named in zip(self.texts, self.objects, strict=True)]


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
        named = torch.full((len(questions), OBJECTS), -1)
        choice = torch.full((len(questions),), -1)
        number = torch.full((len(questions),), float("nan"))
        box = torch.full((len(questions), 6), float("nan"))
        for row, question in enumerate(questions):
            allowed[row, [index[name] for name in question.options]] = True
            places = [index.get(name, -1) for name in question.objects]
            named[row, : len(places)] = torch.tensor(places, dtype=torch.long)
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
        objects = [question.objects for question in questions]
        return QuestionBatch(scene, texts, kinds, objects, named, allowed, choice, number, box)

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


@dataclass(frozen=True)
class Grouping:
    """Place of each of b questions in a table with a row for each scene."""

    scene: Tensor  # [b], row
    place: Tensor  # [b], column
    columns: int

    @classmethod
    def of(cls, scene: Tensor, device: torch.device) -> "Grouping":
        """Group questions by the index of their scene, [b] on the CPU, for use on a device."""
        counts = torch.bincount(scene)
        order, place = scene.argsort(stable=True), torch.empty_like(scene)
        place[order] = torch.arange(len(scene)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return cls(to_device(scene, device), to_device(place, device), int(counts.max()))


class ContextAttention(nn.Module):
    """Attention of many questions' objects to the contexts of few scenes; keys are computed once a scene.

    Beside what the softmax reads, each head's log-sum-exp enters: it grows with the number of tokens that
    match, which a softmax hides from a question such as how many.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.evidence = nn.Linear(heads, width)
        with torch.no_grad():
            self.attention.q_proj.weight.mul_(ATTENTION_GAIN)
            self.attention.kv_proj.weight[:width].mul_(ATTENTION_GAIN)

    def forward(self, queries: Tensor, group: Grouping, context: Tensor, mask: Tensor) -> Tensor:
        """Attend to each question's own scene, queries [b k d], context [u n d], mask [u n] -> [b k d]."""
        table = queries.new_zeros(len(context), group.columns, *queries.shape[1:])
        table = table.index_put((group.scene, group.place), self.norm_query(queries))
        read = self._attend(table.flatten(1, 2), self.norm_context(context), mask)
        return read.unflatten(1, table.shape[1:3])[group.scene, group.place]

    def _attend(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """[u m d], context [u n d], mask [u n] -> [u m d]."""
        query = rearrange(self.attention.q_proj(queries), "u m (h e) -> u h m e", h=self.attention.heads)
        key, value = self.attention.kv_cache(context)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores = scores + (~mask[:, None, None]).float() * -1e4
        matching = scores.logsumexp(-1, keepdim=True)  # [u h m 1]
        weights = (scores - matching).exp()
        read = self.attention.out_proj(rearrange(weights @ value, "u h m e -> u m (h e)"))
        matching = matching - mask.sum(-1).log()[:, None, None, None]
        return read + self.evidence(rearrange(matching, "u h m 1 -> u m h"))


class AnswerBlock(nn.Module):
    """The objects that a question names read its scene, then each other and the question."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.scene, self.dropout = ContextAttention(width, heads), nn.Dropout(dropout)
        self.question = Block(width, heads, dropout)

    def forward(
        self, tokens: Tensor, is_token: Tensor, group: Grouping, context: Tensor, mask: Tensor
    ) -> Tensor:
        """Tokens [b k d], mask of those there are [b k], and the scenes of `ContextAttention` -> [b k d]."""
        tokens = tokens + self.dropout(self.scene(tokens, group, context, mask))
        return self.question(tokens, is_token)


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
    Weights are drawn on the CPU and then moved to the device of `features`.
    """

    text_cache: TextCache | None = None  # of phrases that are encoded once; others are whenever they occur

    def __init__(self, config: ModelConfig, names: int, features: Features, dropout: float = 0.1) -> None:
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
        if isinstance(view := getattr(self.encoder.backbone, "view", None), nn.Parameter):
            nn.init.normal_(view)  # as large as the position: the views of a scene differ in what they show
        self.places = nn.Parameter(torch.randn(1 + OBJECTS, width))  # of the question, and of its objects
        self.norm_text = nn.BatchNorm1d(width, affine=False)  # removes what all texts have in common
        self.blocks = nn.ModuleList(AnswerBlock(width, HEADS, dropout) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Sequential(
            nn.Linear((1 + OBJECTS) * width, 2 * width), nn.GELU(), nn.Dropout(dropout)
        )
        self.name, self.number = nn.Linear(2 * width, names), nn.Linear(2 * width, 1)
        self.option, self.box = Mlp(width, width, 1), Mlp(width, width, 6)
        self.to(features.semantic.device)

    def forward(self, features: Features, batch: QuestionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of names [b n], numbers [b] and boxes [b 6]."""
        batch = batch.to(self.places.device)
        context, mask, group = self.encode_context(features, batch)
        tokens, is_token = self.embed_text(batch)
        for block in self.blocks:
            tokens = block(tokens, is_token, group, context, mask)
        tokens = self.norm(tokens) * is_token[..., None]
        hidden, objects = self.output(tokens.flatten(1)), tokens[:, 1:]
        option = self.option(objects)[..., 0] * (
            batch.named >= 0
        )  # an answer may be an object of the question
        logits = self.name(hidden).scatter_add(1, batch.named.clamp_min(0), option)
        return logits, self.number(hidden)[:, 0], self.box(objects[:, 0])

    def embed_text(self, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
        """Return a token for each question and each object that it names, [b k d], and a mask, [b k]."""
        phrases, device = batch.phrases, self.places.device
        unique = {
            part: place for place, part in enumerate(dict.fromkeys(part for row in phrases for part in row))
        }
        embedded = self.encoder.backbone.pool(self.cached_text(list(unique)) or list(unique))
        absent = [-1] * OBJECTS
        index = torch.tensor([([unique[part] for part in row] + absent)[: 1 + OBJECTS] for row in phrases])
        is_token = index >= 0
        # Found here: to index by a mask, a GPU would have to wait for its number of tokens.
        where = tuple(to_device(axis, device) for axis in is_token.nonzero(as_tuple=True))
        chosen = self.norm_text(embedded[to_device(index[is_token], device)])
        tokens = self.places.expand(len(batch), -1, -1).clone()
        tokens[where] = tokens[where] + chosen
        return tokens, to_device(is_token, device)

    def cache_text(self, questions: QuestionBatch, cache: TextCache | None = None) -> None:
        """Use `cache`, or encode the phrases of questions once if the text encoder is frozen."""
        encoder = getattr(self.encoder.backbone, "text_encoder", None)
        if cache is None and encoder is not None and encoder.frozen:
            cache = TextCache(encoder, ["", *(part for row in questions.phrases for part in row)])
        self.text_cache = cache

    def cached_text(self, phrases: list[str]) -> EncodedText | None:
        """Return the encoded phrases from the cache, or None if one of them is not in it."""
        if self.text_cache is None or any(phrase not in self.text_cache for phrase in phrases):
            return None
        return self.text_cache(phrases)

    def encode_context(self, features: Features, batch: QuestionBatch) -> tuple[Tensor, Tensor, Grouping]:
        """Return the policy's contexts [u s d], their mask [u s], and each question's place among them."""
        scenes, index = batch.scene.unique(return_inverse=True)
        texts = [""] * len(scenes)
        if self.encoder.prior is not None and self.encoder.fusion.reads_instruction:
            scenes, index, texts = batch.scene, torch.arange(len(batch)), batch.texts  # tokens depend on text
        device = self.places.device
        features = features[to_device(scenes, device)]
        tokens, text = self.fuse(features, texts), self.cached_text(texts) or texts
        state = torch.zeros(len(scenes), STATE_DIM, device=device)
        context = self.encoder.backbone.encode_context(tokens, text, state, features.semantic)
        return *context, Grouping.of(index, device)

    def fuse(self, features: Features, texts: list[str]) -> Tensor:
        """Return the fused tokens of scenes, [s v n d]."""
        semantic = self.semantic(features.semantic)
        prior = None if self.prior is None or features.prior is None else self.prior(features.prior)
        state = torch.zeros(len(texts), STATE_DIM, device=semantic.device)
        observation = Observation(None, state, texts, semantic, prior, self.cached_text(texts))
        return self.encoder.fuse(semantic, observation)

    def losses(self, features: Features, batch: QuestionBatch) -> Tensor:
        """Return cross entropies (choices) and absolute errors (numbers, boxes) of questions, [b]."""
        batch = batch.to(self.places.device)
        logits, number, box = self(features, batch)
        logits = logits.masked_fill(~batch.allowed, -1e4)
        choices = functional.cross_entropy(logits, batch.choice.clamp_min(0), reduction="none")
        numbers = (number - batch.number.nan_to_num()).abs()
        boxes = (box - batch.box.nan_to_num()).abs().mean(dim=1)
        is_number = batch.number.isfinite()
        return torch.where(batch.choice >= 0, choices, torch.where(is_number, numbers, boxes))

    def loss(self, features: Features, batch: QuestionBatch) -> Tensor:
        """Return the mean of `losses`."""
        return self.losses(features, batch).mean()


@dataclass(frozen=True)
class QATraining:
    """Training of a question-answering model."""

    steps: int = 800
    scenes: int = 16  # per step
    questions: int = 16  # per scene; all kinds are drawn equally often
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 1e-2
    dropout: float = 0.1  # in the answer head
    held_out: int = 10  # one in ten training scenes chooses the step whose weights are kept
    evaluations: int = 20  # of the held-out scenes
    seed: int = 0  # of weights and order


def split_scenes(questions: QuestionBatch, every: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the questions to train on, and those about one in `every` scenes, drawn at random.

    The scenes of several tasks alternate, so that a fixed stride could pick those of one task alone.
    """
    scenes = questions.scene.unique()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
    held_out = torch.isin(questions.scene, scenes[order[: len(scenes) // every]].to(scenes.device))
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


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
    text_cache: TextCache | None = None,
) -> tuple[SpatialQAModel, list[Evaluation]]:
    """Return a trained model in evaluation mode, and its training curve.

    The weights are those with the lowest loss on held-out training scenes; without such, the last ones. It is
    trained on the device of `features`. `text_cache` is one of the same text encoder, if there is any.
    """
    torch.manual_seed(training.seed)
    model = SpatialQAModel(config, len(codec.names), features, training.dropout)
    model.cache_text(questions, text_cache)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)
    # A tenth of the steps warms up, in runs with at least two such steps: with one, torch divides by zero.
    warm_up = 0.1 if training.steps >= 20 else 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, training.steps, pct_start=warm_up
    )
    rows, held_out = split_scenes(questions, training.held_out)
    sampler, left_out = QuestionSampler(questions[rows], training), questions[held_out]
    questions, every = questions[rows], max(1, training.steps // training.evaluations)
    curve: list[Evaluation] = []
    losses, best = [], {}
    for step in tqdm(range(1, training.steps + 1), f"Training {label}", unit="step", mininterval=5):
        loss = model.loss(features, questions[sampler.sample()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % every == 0 or step == training.steps:
            recent = torch.stack(losses[-every:]).tolist()
            curve.append(Evaluation(step, float(np.mean(recent)), mean_loss(model, features, left_out)))
            if select_evaluation(curve) is curve[-1]:
                best = {name: part.clone() for name, part in trained_state(model).items()}
    model.load_state_dict(best, strict=False)
    return model.eval(), curve


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model without the weights of frozen encoders."""
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    return {name: part for name, part in model.state_dict().items() if name not in frozen}


@torch.no_grad()
def mean_loss(model: SpatialQAModel, features: Features, questions: QuestionBatch) -> float:
    """Return the mean over kinds of the loss without dropout; nan without questions."""
    if not len(questions):
        return float("nan")
    model.eval()
    order = questions.scene.argsort(stable=True)
    losses = torch.cat([model.losses(features, questions[rows]) for rows in order.split(ANSWER_BATCH)]).cpu()
    model.train()
    kinds = np.array(questions.kinds)[order.numpy()]
    return float(np.mean([losses.numpy()[kinds == kind].mean() for kind in sorted(set(questions.kinds))]))


@torch.no_grad()
def predict_answers(
    model: SpatialQAModel, codec: AnswerCodec, questions: QuestionBatch, features: Features
) -> list[Any]:
    """Return the model's answer to each question; each scene is encoded once a batch."""
    order = questions.scene.argsort(stable=True)
    answers: list[Any] = [None] * len(questions)
    for rows in order.split(ANSWER_BATCH):
        batch = questions[rows]
        outputs = (part.cpu() for part in model(features, batch))
        for row, answer in zip(rows.tolist(), codec.decode(batch, *outputs), strict=True):
            answers[row] = answer
    return answers


@dataclass(frozen=True)
class QAComparison:
    """Scores of all models, the questions, and the fused model, whose gate can be inspected."""

    scores: QAScores
    model: SpatialQAModel
    questions: QuestionSet


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: what it is given."""

    name: str
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(name="none"))
    fusion: str | None = None  # None: the configured one
    is_untrained: bool = False  # reads the untrained copy of the prior
    is_blind: bool = False  # every scene has the mean features of all: words alone remain


def question_arms(
    prior: PriorConfig, future: PriorConfig | None, names: Sequence[str] | None = None
) -> list[Arm]:
    """Return the arms of measure=questions, all or those of some names.

    `future` is a prior that is read with clip=future; None leaves its arms out.

    Raises:
        ValueError: If there is no arm of a name.
    """
    arms = [
        Arm(WORDS, is_blind=True),
        Arm(SEMANTIC),
        Arm(FUSED, prior),
        Arm(PRIOR_ONLY, prior, fusion="prior_only"),
    ]
    if has_untrained_copy(prior):
        arms.append(Arm(COPY, prior, is_untrained=True))
    if future is not None:
        arms.append(Arm(FUTURE, future))
        if has_untrained_copy(future):
            arms.append(Arm(FUTURE_COPY, future, is_untrained=True))
    known = [arm.name for arm in arms]
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(
            f"questions.arms: expected some of {known}; got {unknown}. Those of a future need "
            "questions.future_path, those of an untrained copy a Wan with trained weights"
        )
    return [arm for arm in arms if names is None or arm.name in names]


def compare_models(
    cache: FeatureCache, questions: QuestionSet, config: ModelConfig, prior: PriorConfig, training: QATraining
) -> QAComparison:
    """Train and test models with the prior, without it, with random or untrained ones, and without vision.

    `config` is an encoder without a prior, of `qa_model_config`. Ablations replace the fused model's prior
    features at test time.
    """
    arms = [Arm(SEMANTIC), Arm("fused, random prior", PriorConfig(name="random"))]
    if has_untrained_copy(prior):
        arms.append(Arm(COPY, prior, is_untrained=True))
    arms += [Arm("fused, blind", prior, is_blind=True), Arm(FUSED, prior)]
    trainer = _CachedTrainer(cache, questions, config)
    for arm in arms:
        fused, features = trainer.add(arm, training)
    for name, ablated in ablate_prior(features).items():
        answers = trainer.answer(fused, ablated)
        scores = [score(q, one) for q, one in zip(questions.test, answers, strict=True)]
        trainer.result.scores[f"fused, prior {name}"] = np.array(scores)
    return QAComparison(trainer.result, fused, questions)


def compare_arms(
    cache: FeatureCache,
    questions: QuestionSet,
    config: ModelConfig,
    arms: Sequence[Arm],
    training: QATraining,
    seeds: Sequence[int],
) -> QAScores:
    """Train and test every arm with every seed; models that the cache holds are not trained again."""
    trainer = _CachedTrainer(cache, questions, config)
    for arm in arms:
        for seed in seeds:
            trainer.add(arm, replace(training, seed=seed))
    return trainer.result


class _CachedTrainer:
    """Trains models on the same questions, or loads them from the cache, and tests them on the same ones."""

    def __init__(self, cache: FeatureCache, questions: QuestionSet, config: ModelConfig) -> None:
        self._cache, self._questions, self._config = cache, questions, config
        self._codec, self.result = AnswerCodec(questions.train), QAScores(questions.test)
        self._train, self._test = self._codec.encode(questions.train), self._codec.encode(questions.test)
        self.result.scores["chance"] = chance_scores(questions.train, questions.test)
        self.result.scores[TEXT_ONLY] = text_only_scores(questions.train, questions.test)
        self._encoded: tuple[Arm, Features] | None = None  # of the last arm
        self._text_cache: TextCache | None = None  # of a pre-trained text encoder, which all models share

    def add(self, arm: Arm, training: QATraining) -> tuple[SpatialQAModel, Features]:
        """Train or load a model and add its answers to the result."""
        features = self._encode(arm)
        fusion = replace(self._config.fusion, name=arm.fusion or self._config.fusion.name)
        config = replace(self._config, prior=arm.prior, fusion=fusion)
        path = None
        if self._cache.folder is not None:
            path = self._cache.folder / f"answers-{self._key(arm, config, training, features)}.pt"
        if path is not None and path.is_file():
            model, curve = self._load(path, config, training, features)
        else:
            options = (arm.name, self._text_cache)
            model, curve = train_qa_model(config, self._codec, self._train, features, training, *options)
            if path is not None:
                with atomic_file(path) as draft:
                    points = [asdict(point) for point in curve]
                    torch.save({"weights": trained_state(model), "curve": points}, draft)
        if config.backbone.pretrained:
            self._text_cache = model.text_cache
        self.result.add(arm.name, training.seed, self.answer(model, features), curve)
        return model, features

    def answer(self, model: SpatialQAModel, features: Features) -> list[Any]:
        """Return the answer to each test question."""
        return predict_answers(model, self._codec, self._test, features)

    def _encode(self, arm: Arm) -> Features:
        if self._encoded is None or self._encoded[0] != arm:
            self._encoded = None
            semantic, prior = self._cache.semantic(self._config.backbone), None
            if arm.prior.name != "none":
                grid = semantic.shape[-2], semantic.shape[-1]
                prior = self._cache.prior(arm.prior, grid, arm.is_untrained)
            features = Features(semantic, prior)
            self._encoded = arm, features.mean() if arm.is_blind else features
        return self._encoded[1]

    def _load(
        self, path: Path, config: ModelConfig, training: QATraining, features: Features
    ) -> tuple[SpatialQAModel, list[Evaluation]]:
        stored = torch.load(path, weights_only=True, map_location=self._cache.device)
        torch.manual_seed(training.seed)  # frozen encoders are not stored and may come from the seed
        model = SpatialQAModel(config, len(self._codec.names), features)
        keys = model.load_state_dict(stored["weights"], strict=False)
        trained = {name for name, part in model.named_parameters() if part.requires_grad}
        if keys.unexpected_keys or trained & set(keys.missing_keys):
            raise ValueError(f"{path} was trained by other code; delete it to train the model again")
        model.cache_text(self._train, self._text_cache)
        return model.eval(), [Evaluation(**point) for point in stored["curve"]]

    def _key(self, arm: Arm, config: ModelConfig, training: QATraining, features: Features) -> str:
        """Return a hash over all that determines the trained weights; features enter by their sums."""
        sums = [
            None if part is None else part.sum(dtype=torch.float64).item()
            for part in (features.semantic, features.prior)
        ]
        content = [asdict(question) for question in self._questions.train]
        values = {"config": asdict(config), "training": asdict(training), "features": sums}
        values |= self._cache.device_key
        return cache_key(answers=4, arm=asdict(arm), scenes=self._cache.key, questions=content, **values)


def ablate_prior(features: Features, seed: int = 0) -> Mapping[str, Features]:
    """Replace the prior's features by zeros, noise of equal mean and deviation, or those of other scenes."""
    prior = features.prior
    assert prior is not None
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prior.shape, generator=generator).to(prior) * prior.std() + prior.mean()
    ablated = {"zeroed": torch.zeros_like(prior), "noise": noise, "shuffled": prior.roll(1, dims=0)}
    return {name: replace(features, prior=part) for name, part in ablated.items()}
