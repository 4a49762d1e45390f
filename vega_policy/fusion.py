"""Fusions: how what things are (semantic) and where they are (prior) become one token.

Every fusion maps `(semantic [b n d], prior [b n d], context=None) -> [b m d]` and states its m through
`tokens`. Those with a gate keep the last one in `.gate` [b n 1] for inspection: the weight of the semantic
stream.

Source: VEGA-3D, arXiv 2603.19235, adaptive gated fusion. There g is the weight of the semantic stream; its
scene code mixes LayerNorm-ed streams (`normalized`), its spatial-reasoning code starts near the semantic
stream (`residual`).
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from vega_policy.parts import FusionConfig


class Fusion(Protocol):
    """What `VegaModel` expects of a fusion."""

    gate: Tensor | None

    def tokens(self, n: int) -> int:
        """Number m of fused tokens a view for n tokens of each stream."""
        ...

    def __call__(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b m d]."""
        ...


class TokenGate(nn.Module):
    """Per-token convex mix of both streams: g = sigmoid(W [LN(prior); LN(semantic)] + b).

    Args:
        width: Token width d.
        config: Blend and initial values.
    """

    gate: Tensor | None = None

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.blend = config.blend
        self.norm_semantic, self.norm_prior = nn.LayerNorm(width), nn.LayerNorm(width)
        self.logit = nn.Linear(2 * width, 1)
        nn.init.constant_(self.logit.bias, config.gate_bias)
        if config.blend == "residual":
            self.scale = nn.Parameter(torch.tensor(config.residual_scale))

    def tokens(self, n: int) -> int:
        """As many as came in."""
        return n

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        normed_semantic, normed_prior = self.norm_semantic(semantic), self.norm_prior(prior)
        gate = self.logit(torch.cat([normed_prior, normed_semantic], dim=-1)).sigmoid()  # [b n 1]
        self.gate = gate.detach()
        if self.blend == "normalized":
            return gate * normed_semantic + (1 - gate) * normed_prior
        mixed = gate * semantic + (1 - gate) * prior
        return mixed if self.blend == "raw" else semantic + self.scale * (mixed - semantic)


class Add(nn.Module):
    """Sum of both streams (an ablation of the paper).

    Args:
        width: Token width d.
        config: Unused by this fusion.
    """

    gate: Tensor | None = None

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()

    def tokens(self, n: int) -> int:
        """As many as came in."""
        return n

    def forward(self, semantic: Tensor, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """[b n d], [b n d] -> [b n d]."""
        return semantic + prior


FUSIONS: dict[str, type[nn.Module]] = {"token_gate": TokenGate, "add": Add}


def make_fusion(width: int, config: FusionConfig) -> nn.Module:
    """Build the fusion that a config names.

    Args:
        width: Token width d of both streams.
        config: Name and initial values.

    Returns:
        A module that satisfies `Fusion`.

    Raises:
        ValueError: If the name is not in the table.
    """
    if config.name not in FUSIONS:
        raise ValueError(f"Unknown fusion {config.name!r}. Known: {', '.join(sorted(FUSIONS))}.")
    return FUSIONS[config.name](width, config)
