"""Fusions: a semantic token and a prior token of one place become one token.

Source: VEGA-3D, arXiv 2603.19235, adaptive gated fusion and its ablations. There g is the weight of the
semantic stream; its scene code mixes LayerNorm-ed streams (`normalized`), its spatial-reasoning code starts
near the semantic stream (`residual`).
"""

from pkgutil import resolve_name
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vega_policy.config import unknown_name
from vega_policy.model.config import FUSIONS, FusionConfig
from vega_policy.model.layers import Attention, Mlp, grid_positions


class Fusion(Protocol):
    """Interface of a fusion."""

    gate: Tensor | None  # weight of the semantic stream in the last forward pass [b n 1], for inspection
    reads_instruction: bool

    def tokens(self, n: int) -> int:
        """Return the number m of fused tokens per view for n tokens of each stream."""
        ...

    def __call__(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d], pooled instruction [b d] if it is read -> [b m d]."""
        ...


def make_fusion(width: int, config: FusionConfig, grid: tuple[int, int]) -> nn.Module:
    """Build the `Fusion` that a config names, for tokens of a width on a grid (gh, gw).

    Raises:
        ValueError: If the name is unknown, or a size does not fit.
    """
    if config.name not in FUSIONS:
        raise unknown_name("fusion", config.name, sorted(FUSIONS))
    return resolve_name(FUSIONS[config.name])(width, config, grid)


def make_projector(prior: Any, width: int) -> nn.Module:
    """Build what projects a prior's features to the width of the backbone's tokens, [... d'] -> [... d]."""
    if getattr(prior, "slots", 0) and prior.slot_pool == "attention":
        return SlotAttention(prior.width, 1 + prior.slots, width)
    return Mlp(prior.width, width, width)


class SlotAttention(nn.Module):
    """The token of a frame attends to those of its future slots at the same place, then an MLP.

    Raises:
        ValueError: If the width is no multiple of the number of heads.
    """

    heads = 4

    def __init__(self, joined: int, slots: int, width: int) -> None:
        """`joined` is the width of the features of all `slots`, the frame's own first."""
        super().__init__()
        if width % self.heads:
            raise ValueError(
                f"prior.slot_pool=attention needs a token width divisible by {self.heads}; got {width}."
            )
        self.slots = slots
        self.norm = nn.LayerNorm(joined // slots)
        self.embed = nn.Linear(joined // slots, width)
        self.position = nn.Parameter(0.02 * torch.randn(slots, width))
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mlp = Mlp(width, width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[... s*d'] -> [... d]."""
        tokens = self.embed(self.norm(features.unflatten(-1, (self.slots, -1)))) + self.position  # [... s d]
        frame = tokens[..., 0, :]
        # Sums over a handful of slots: attention kernels limit the number of sequences, and places are many.
        query = self.query(frame).unflatten(-1, (self.heads, 1, -1)).transpose(-3, -2)  # [... 1 k e]
        key, value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).unbind(dim=-3)  # [... s k e]
        weights = ((query * key).sum(dim=-1, keepdim=True) * key.shape[-1] ** -0.5).softmax(dim=-3)
        return self.mlp(frame + (weights * value).sum(dim=-3).flatten(-2))


class PerTokenFusion(nn.Module):
    """A fusion with one token out for each place, no gate and no instruction."""

    gate: Tensor | None = None
    reads_instruction = False

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__()

    def tokens(self, n: int) -> int:
        """Return n."""
        return n


class TokenGate(PerTokenFusion):
    """One gate per token, the paper's method: g = sigmoid(W [LN(prior); LN(semantic)] + b).

    The result is a convex mix of both streams with the weight g of the semantic one.
    """

    default_bias = 0.0

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int], gates: int = 1) -> None:
        super().__init__(width, config, grid)
        self.blend = config.blend
        self.norm_semantic, self.norm_prior = nn.LayerNorm(width), nn.LayerNorm(width)
        self.logit = nn.Linear(2 * width, gates)
        bias = self.default_bias if config.gate_bias is None else config.gate_bias
        nn.init.constant_(self.logit.bias, bias)
        if config.blend == "residual":
            self.scale = nn.Parameter(torch.tensor([config.residual_scale]))  # 1-d: FSDP shards no scalar

    def gate_weights(self) -> list[nn.Parameter]:
        """Return the weights of the gate's logit."""
        return list(self.logit.parameters())

    def offset(self, context: Tensor | None) -> Tensor | float:
        """Return the instruction's term of every token's logit, context [b d] -> [b 1 1]."""
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
    """Return the weights of a model's gate; none without one."""
    gates = [module for module in model.modules() if isinstance(module, TokenGate)]
    return [weight for gate in gates for weight in gate.gate_weights()]


class ChannelGate(TokenGate):
    """One gate per token and channel; `.gate` keeps their mean over channels."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid, gates=width)


class InstructionGate(TokenGate):
    """Token gate whose logit has one more term, computed from the pooled instruction."""

    default_bias = -0.5
    reads_instruction = True

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.instruction = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1, bias=False))
        self.context_scale = nn.Parameter(torch.tensor([config.context_scale]))

    def gate_weights(self) -> list[nn.Parameter]:
        """Return the weights of the gate's logit, those of the instruction's term included."""
        return [*super().gate_weights(), *self.instruction.parameters(), self.context_scale]

    def offset(self, context: Tensor | None) -> Tensor:
        """Return the scaled scalar of the pooled instruction, [b d] -> [b 1 1].

        Raises:
            ValueError: If there is no instruction.
        """
        if context is None:
            raise ValueError("instruction_gate needs the pooled instruction as context; got none.")
        return self.context_scale * self.instruction(context)[:, None]


class Add(PerTokenFusion):
    """Sum of both streams."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return semantic + prior


class Weighted(PerTokenFusion):
    """Mean of both streams with two learned weights, normalised by their sum."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.weights = nn.Parameter(torch.tensor([0.5, 0.5]))  # semantic, prior

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        weights = self.weights / self.weights.sum()
        self.gate = weights[0].detach().expand(*semantic.shape[:-1], 1)
        return weights[0] * semantic + weights[1] * prior


class Concat(PerTokenFusion):
    """Both streams concatenated along the channels, projected back to the width by an MLP."""

    def __init__(self, width: int, config: FusionConfig, grid: tuple[int, int]) -> None:
        super().__init__(width, config, grid)
        self.mix = Mlp(2 * width, width, width)

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return self.mix(torch.cat([semantic, prior], dim=-1))


class SequenceConcat(PerTokenFusion):
    """Prior tokens after the semantic ones: twice as many tokens."""

    def tokens(self, n: int) -> int:
        """Return 2n."""
        return 2 * n

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b 2n d]."""
        return torch.cat([semantic, prior], dim=1)


class CrossAttention(PerTokenFusion):
    """Semantic tokens attend to prior tokens with 2D sine-cosine positions, in `config.layers` layers.

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
        self.blocks = nn.ModuleList(StreamAttentionBlock(width, config.heads) for _ in range(config.layers))

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        position = self.position.to(semantic.dtype)
        for block in self.blocks:
            semantic = block(semantic, prior, position)
        return semantic


class StreamAttentionBlock(nn.Module):
    """Pre-norm block in which semantic tokens attend to prior tokens; starts as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_semantic, self.norm_prior = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width, width)
        for last in (self.attention.out_proj, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, prior: Tensor, position: Tensor) -> Tensor:
        """[b n d], [b n d], [n d] -> [b n d]."""
        keys = self.norm_prior(prior) + position
        tokens = tokens + self.attention(self.norm_semantic(tokens) + position, keys)
        return tokens + self.mlp(self.norm_mlp(tokens))


class PriorOnly(PerTokenFusion):
    """The prior's tokens alone."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return prior


class SemanticOnly(PerTokenFusion):
    """The semantic tokens alone; the prior is computed but not used."""

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return semantic
