"""Action experts: from the backbone's context to a chunk of actions.

Every expert offers `loss(context, mask, actions, is_pad, generator) -> [b]` and
`sample(context, mask, noise, integrate) -> [b t a]`.
"""

from typing import Protocol

import torch
from einops import repeat
from torch import Tensor, nn

from vega_policy import flow
from vega_policy.attention import Attention, Mlp, sinusoid
from vega_policy.parts import ExpertConfig


class Expert(Protocol):
    """What `VegaModel` expects of an action expert."""

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Loss of each sample, context [b s d], mask [b s], actions [b t a], is_pad [b t] -> [b]."""
        ...

    def sample(self, context: Tensor, mask: Tensor, noise: Tensor, integrate: flow.Integrator) -> Tensor:
        """A chunk of actions from noise [b t a] -> [b t a]."""
        ...


class AdaptiveBlock(nn.Module):
    """Transformer block over a chunk that reads the context and is modulated by the flow's time.

    Scale, shift and gate of each branch come from the time embedding and start at zero, so that the block
    starts as the identity (adaLN-zero; Peebles and Xie, arXiv 2212.09748).

    Args:
        width: Token width d.
        heads: Attention heads.
        context_width: Width of the context's tokens.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context_width)
        self.mlp = Mlp(width, 4 * width, width)
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """Tokens [b t d], context [b s c], mask [b s], time embedding [b d] -> [b t d]."""
        branches = (
            self.attention,
            lambda normed: self.cross_attention(normed, context, mask),
            self.mlp,
        )
        modulation = self.modulation(time)[:, None].chunk(9, dim=-1)
        for i, branch in enumerate(branches):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            tokens = tokens + gate * branch(self.norms[i](tokens) * (1 + scale) + shift)
        return tokens


class FlowExpert(nn.Module):
    """Flow matching over an action chunk (pi0, arXiv 2410.24164) with cross-attention to the context.

    Args:
        config: Sizes, integration steps, distribution of training times.
        context_width: Width of the context's tokens.
        chunk_size: Actions t in a chunk.
        action_dim: Width a of an action.
    """

    def __init__(self, config: ExpertConfig, context_width: int, chunk_size: int, action_dim: int) -> None:
        super().__init__()
        self.config = config
        self.embed_action = nn.Linear(action_dim, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(chunk_size, config.width))
        self.embed_time = nn.Sequential(Mlp(config.width, config.width, config.width), nn.SiLU())
        self.norm_context = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(config.width, config.heads, context_width) for _ in range(config.depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, action_dim))

    def velocity(self, context: Tensor, mask: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Velocity at x_t, context [b s c], mask [b s], x [b t a], time [b] -> [b t a]."""
        tokens = self.embed_action(x) + self.position
        embedded = self.embed_time(sinusoid(1000 * time, self.config.width))
        for block in self.blocks:
            tokens = block(tokens, context, mask, embedded)
        return self.head(tokens)

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Squared error of the velocity on the straight path, padded actions left out, -> [b].

        Noise and times come from `generator` on the CPU, so that every device draws the same.
        """
        noise = torch.randn(actions.shape, generator=generator).to(actions)
        time = flow.sample_time(len(actions), self.config.time_power, generator).to(actions)
        x = flow.interpolate(actions, noise, time)
        predicted = self.velocity(self.norm_context(context), mask, x, time)
        return flow.masked_mean_square(predicted - flow.velocity(actions, noise), is_pad)

    def sample(self, context: Tensor, mask: Tensor, noise: Tensor, integrate: flow.Integrator) -> Tensor:
        """Integrate the velocity field, noise [b t a] -> actions [b t a]; same noise, same actions."""
        context = self.norm_context(context)
        rows = len(noise) // len(context)
        context, mask = (repeat(x, "b ... -> (b r) ...", r=rows) for x in (context, mask))
        return integrate(lambda x, time: self.velocity(context, mask, x, time), noise, self.config.steps)


EXPERTS: dict[str, type[FlowExpert]] = {"flow": FlowExpert}


def make_expert(config: ExpertConfig, context_width: int, chunk_size: int, action_dim: int) -> FlowExpert:
    """Build the expert that a config names.

    Args:
        config: Name and sizes.
        context_width: Width of the context's tokens.
        chunk_size: Actions t in a chunk.
        action_dim: Width a of an action.

    Returns:
        A module that satisfies `Expert`.

    Raises:
        ValueError: If the name is not in the table.
    """
    if config.name not in EXPERTS:
        raise ValueError(f"Unknown expert {config.name!r}. Known: {', '.join(sorted(EXPERTS))}.")
    return EXPERTS[config.name](config, context_width, chunk_size, action_dim)
