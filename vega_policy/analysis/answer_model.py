"""The model that answers spatial questions: the policy's eyes and backbone, and a small head that asks.

A scene is read once, without words; a question's queries then look things up in that context. Frozen encoders
are not asked here: their features come computed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.analysis.answers import STATE, Batch, Features
from vega_policy.attention import Attention, Mlp
from vega_policy.model import VegaModel
from vega_policy.observation import Observation
from vega_policy.parts import ModelConfig

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
    """The policy's eyes and backbone with an answer head in the place of its action expert.

    Args:
        config: The eyes; `state_dim` is 1.
        names: Number of names that may be answered.
        features: What the frozen encoders see, for the scale of their channels.
    """

    def __init__(self, config: ModelConfig, names: int, features: Features) -> None:
        super().__init__()
        self.eyes = VegaModel(config)
        self.eyes.expert = nn.Identity()  # no actions here
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
        return *self.eyes.backbone.read(tokens, words, state, features.semantic[scenes]), back

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
