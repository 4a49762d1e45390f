"""Fusions: how what things are (semantic) and where they are (prior) become one token.

Every fusion maps `(semantic [b n d], prior [b n d], context=None) -> [b m d]` and states its m through
`tokens`. Those with a gate keep the last one in `.gate` [b n 1] for inspection: the weight of the semantic
stream. Those with `reads_instruction` want the pooled instruction as context [b d].

Source: VEGA-3D, arXiv 2603.19235, adaptive gated fusion and its ablations. There g is the weight of the
semantic stream; its scene code mixes LayerNorm-ed streams (`normalized`), its spatial-reasoning code starts
near the semantic stream (`residual`).
"""

from difflib import get_close_matches
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

from vega_policy.model.config import FUSIONS, FusionConfig
from vega_policy.model.layers import Attention, Mlp, grid_positions


class Fusion(Protocol):
    """What `VegaModel` expects of a fusion."""

    gate: Tensor | None
    reads_instruction: bool

    def tokens(self, n: int) -> int:
        """Number m of fused tokens a view for n tokens of each stream."""
        ...

    def __call__(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d], context [b d] where the instruction is read -> [b m d]."""
        ...


class _PerToken(nn.Module):
    """What most fusions share: one token out for each place, no gate, no instruction."""

    gate: Tensor | None = None
    reads_instruction = False

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__()

    def tokens(self, n: int) -> int:
        """As many as came in."""
        return n


class _Gate(_PerToken):
    """Convex mix of both streams: g = sigmoid(W [LN(prior); LN(semantic)] + b), g weighing the semantic one.

    Args:
        width: Token width d.
        config: Blend and initial values.
        grid: Unused by gates.
        numbers: Gate values a token: 1, or d for a gate a channel.
    """

    default_bias = 0.0

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int], numbers: int = 1) -> None:
        super().__init__(width, config, grid)
        self.blend = config.blend
        self.norm_semantic, self.norm_prior = nn.LayerNorm(width), nn.LayerNorm(width)
        self.logit = nn.Linear(2 * width, numbers)
        bias = self.default_bias if config.gate_bias is None else config.gate_bias
        nn.init.constant_(self.logit.bias, bias)
        if config.blend == "residual":
            self.scale = nn.Parameter(torch.tensor([config.residual_scale]))  # FSDP shards no scalar

    def gate_weights(self) -> list[nn.Parameter]:
        """The weights that make the gate's logit."""
        return list(self.logit.parameters())

    def offset(self, context: Tensor | None) -> Tensor | float:
        """What the instruction adds to every token's logit, context [b d] -> [b 1 1]; nothing by default."""
        return 0.0

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        normed_semantic, normed_prior = self.norm_semantic(semantic), self.norm_prior(prior)
        logit = self.logit(torch.cat([normed_prior, normed_semantic], dim=-1)) + self.offset(context)
        gate = logit.sigmoid()  # [b n 1] or [b n d]
        self.gate = gate.detach().mean(dim=-1, keepdim=True)
        if self.blend == "normalized":
            return gate * normed_semantic + (1 - gate) * normed_prior
        mixed = gate * semantic + (1 - gate) * prior
        return mixed if self.blend == "raw" else semantic + self.scale * (mixed - semantic)


def gate_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that make a model's gate; none without one."""
    return [weight for part in model.modules() if isinstance(part, _Gate) for weight in part.gate_weights()]


class TokenGate(_Gate):
    """One gate a token: the method."""


class ChannelGate(_Gate):
    """One gate a token and channel; `.gate` keeps their mean over channels."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid, numbers=width)


class InstructionGate(_Gate):
    """Token gate whose logit has one more summand, read from the pooled instruction."""

    default_bias = -0.5
    reads_instruction = True

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.instruction = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1, bias=False))
        self.context_scale = nn.Parameter(torch.tensor([config.context_scale]))

    def gate_weights(self) -> list[nn.Parameter]:
        """The weights that make the gate's logit, the instruction's summand among them."""
        return [*super().gate_weights(), *self.instruction.parameters(), self.context_scale]

    def offset(self, context: Tensor | None) -> Tensor:
        """Scaled scalar of the pooled instruction, [b d] -> [b 1 1].

        Raises:
            ValueError: If there is no instruction.
        """
        if context is None:
            raise ValueError(
                "The fusion 'instruction_gate' needs the pooled instruction as context; got none."
            )
        return self.context_scale * self.instruction(context)[:, None]


class Add(_PerToken):
    """Sum of both streams."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return semantic + prior


class Weighted(_PerToken):
    """Sum of both streams with two learned weights, divided by their sum; both start at one half."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.weights = nn.Parameter(torch.tensor([0.5, 0.5]))  # semantic, prior

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        share = self.weights / self.weights.sum()
        self.gate = share[0].detach().expand(*semantic.shape[:-1], 1)
        return share[0] * semantic + share[1] * prior


class Concat(_PerToken):
    """Both streams side by side in the channels, brought back to the width by an MLP."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.mix = Mlp(2 * width, width, width)

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return self.mix(torch.cat([semantic, prior], dim=-1))


class SequenceConcat(_PerToken):
    """Prior tokens after the semantic ones: twice as many tokens."""

    def tokens(self, n: int) -> int:
        """Twice as many as came in of each stream."""
        return 2 * n

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b 2n d]."""
        return torch.cat([semantic, prior], dim=1)


class _CrossBlock(nn.Module):
    """Pre-norm block in which semantic tokens ask prior tokens; starts as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_semantic, self.norm_prior = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width, width)
        for last in (self.attention.out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, prior: Tensor, position: Tensor) -> Tensor:
        """[b n d], [b n d], [n d] -> [b n d]."""
        asked = self.norm_prior(prior) + position
        tokens = tokens + self.attention(self.norm_semantic(tokens) + position, asked)
        return tokens + self.mlp(self.norm_mlp(tokens))


class CrossAttention(_PerToken):
    """Semantic tokens read the prior's by attention with 2D sine-cosine positions, in one layer or three.

    Args:
        width: Token width d; a multiple of 4 and of `config.heads`.
        config: Layers and heads.
        grid: Token grid (gh, gw).

    Raises:
        ValueError: If the heads do not divide the width.
    """

    position: Tensor

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        if width % config.heads or width % 4:
            raise ValueError(
                f"fusion.heads must divide the token width, itself a multiple of 4; got {config.heads} heads "
                f"and width {width}."
            )
        self.register_buffer("position", grid_positions(*grid, width), persistent=False)
        self.blocks = nn.ModuleList(_CrossBlock(width, config.heads) for _ in range(config.layers))

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        position = self.position.to(semantic.dtype)
        for block in self.blocks:
            semantic = block(semantic, prior, position)
        return semantic


class PriorOnly(_PerToken):
    """The prior's tokens alone."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return prior


class SemanticOnly(_PerToken):
    """The semantic tokens alone, the prior being read all the same."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return semantic


def make_fusion(width: int, config: FusionConfig, grid: tuple[int, int]) -> nn.Module:
    """Build the fusion that a config names.

    Args:
        width: Token width d of both streams.
        config: Name and initial values.
        grid: Token grid (gh, gw) of a view.

    Returns:
        A module that satisfies `Fusion`.

    Raises:
        ValueError: If the name is not in the table, or a size does not fit.
    """
    if config.name not in FUSIONS:
        near = get_close_matches(config.name, FUSIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown fusion {config.name!r}.{hint} Known: {', '.join(sorted(FUSIONS))}.")
    module, name = FUSIONS[config.name].split(":")
    return getattr(import_module(module), name)(width, config, grid)
