"""Action heads: from the backbone's context to a chunk of actions.

Every head offers `loss(context, mask, actions, is_pad, generator) -> [b]` and
`sample(context, mask, noise, integrate) -> [b t a]`.
"""

from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor, nn

from vega_policy.model import flow
from vega_policy.model.config import ActionHeadConfig
from vega_policy.model.layers import Attention, KVCache, Mlp, sinusoid


class ActionHead(Protocol):
    """What `VegaModel` expects of an action head."""

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


class DiTBlock(nn.Module):
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
        return self.read(tokens, self.cross_attention.memory(context), mask, self.modulation(time))

    def read(self, tokens: Tensor, memory: KVCache, mask: Tensor, modulation: Tensor) -> Tensor:
        """As `forward`, with what does not change from step to step; modulation [b 9*d] or [1 9*d]."""
        cross = self.cross_attention
        branches = (self.attention, lambda normed: cross.attend(normed, memory, mask), self.mlp)
        parts = modulation[:, None].chunk(9, dim=-1)
        for i, branch in enumerate(branches):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            tokens = tokens + gate * branch(self.norms[i](tokens) * (1 + scale) + shift)
        return tokens


class FlowHead(nn.Module):
    """Flow matching over an action chunk (pi0, arXiv 2410.24164) with cross-attention to the context.

    Args:
        config: Sizes, integration steps, distribution of training times.
        context_width: Width of the context's tokens.
        chunk_size: Actions t in a chunk.
        action_dim: Width a of an action.

    Attributes:
        share: Which part of a global batch the samples are, as (part, parts): with the same generator
            everywhere, several processes draw what one process draws for all their samples.
        anew: Whether each integration step computes everything anew, in the blocks' forward passes, which is
            where sharded weights are whole.
    """

    share: tuple[int, int] = (0, 1)
    recompute_context = False

    def __init__(
        self, config: ActionHeadConfig, context_width: int, chunk_size: int, action_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_action = nn.Linear(action_dim, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(chunk_size, config.width))
        self.embed_time = nn.Sequential(Mlp(config.width, config.width, config.width), nn.SiLU())
        self.norm_context = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(
            DiTBlock(config.width, config.heads, context_width) for _ in range(config.depth)
        )
        self.output = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, action_dim))

    def velocity(self, context: Tensor, mask: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Velocity at x_t, context [b s c], mask [b s], x [b t a], time [b] -> [b t a]."""
        tokens, embedded = self.embed_action(x) + self.position, self._embed(time)
        for block in self.blocks:
            tokens = block(tokens, context, mask, embedded)
        return self.output(tokens)

    def _embed(self, time: Tensor) -> Tensor:  # [b] -> [b d]
        return self.embed_time(sinusoid(1000 * time, self.config.width))

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Squared error of the velocity on the straight path, padded actions left out, -> [b]."""
        noise, time = self.draw(actions, generator)
        x = flow.interpolate(actions, noise, time)
        predicted = self.velocity(self.norm_context(context), mask, x, time)
        return flow.masked_mean_square(predicted - flow.velocity(actions, noise), is_pad)

    def draw(self, actions: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Noise [b t a] and times [b] for actions [b t a].

        They come from `generator` on the CPU, so that every device draws the same.
        """
        part, parts = self.share
        batch, *chunk = actions.shape
        mine = slice(part * batch, (part + 1) * batch)
        noise = torch.randn(parts * batch, *chunk, generator=generator)[mine]
        time = flow.sample_time(parts * batch, self.config.time_power, generator)[mine]
        return placed(noise, actions), placed(time, actions)

    def sample(self, context: Tensor, mask: Tensor, noise: Tensor, integrate: flow.Integrator) -> Tensor:
        """Integrate the velocity field, noise [b t a] -> actions [b t a]; same noise, same actions.

        Keys and values of the context are computed once for all steps, and on a CPU, which would wait for
        their weights in each step, so are the modulations of Euler's times.
        """
        context = self.norm_context(context)
        rows = len(noise) // len(context)
        context, mask = (repeat(x, "b ... -> (b r) ...", r=rows) for x in (context, mask))
        if self.recompute_context:
            return integrate(lambda x, time: self.velocity(context, mask, x, time), noise, self.config.steps)
        blocks: list[Any] = list(self.blocks)
        memories = [block.cross_attention.memory(context) for block in blocks]
        known = self._modulations() if noise.device.type == "cpu" else {}

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            together = bool(known) and bool((time == time[0]).all())
            modulations = known.get(time[0].item()) if together else None
            if modulations is None:
                embedded = self._embed(time)
                modulations = [block.modulation(embedded) for block in blocks]
            tokens = self.embed_action(x) + self.position
            for block, memory, modulation in zip(blocks, memories, modulations, strict=True):
                tokens = block.read(tokens, memory, mask, modulation)
            return self.output(tokens)

        return integrate(velocity, noise, self.config.steps)

    def _modulations(self) -> dict[float, list[Tensor]]:
        """Each block's modulation [1 9*d] at each of Euler's times, in which all samples move together."""
        steps, blocks = self.config.steps, list[Any](self.blocks)
        times = torch.tensor([1 - step / steps for step in range(steps)])
        embedded = self._embed(times)
        of_blocks = [block.modulation(embedded).split(1) for block in blocks]
        return dict(zip(times.tolist(), map(list, zip(*of_blocks, strict=True)), strict=True))


def placed(drawn: Tensor, like: Tensor) -> Tensor:
    """What was drawn on the CPU, where `like` is; a GPU's work goes on meanwhile."""
    return (drawn.pin_memory() if like.is_cuda else drawn).to(like, non_blocking=True)


class CrossAttentionBlock(nn.Module):
    """Pre-norm transformer block over a chunk that reads the context: self-attention, cross-attention, MLP.

    Args:
        width: Token width d.
        heads: Attention heads.
        context_width: Width of the context's tokens.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context_width)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Tokens [b t d], context [b s c], mask [b s] -> [b t d]."""
        tokens = tokens + self.attention(self.norm_self(tokens))
        tokens = tokens + self.cross_attention(self.norm_cross(tokens), context, mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class ResidualMlp(nn.Module):
    """Norm - Linear - ReLU with a skip connection, [... d] -> [... d].

    Args:
        width: Width d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, tokens: Tensor) -> Tensor:
        """[... d] -> [... d]."""
        return tokens + self.branch(tokens)


class L1Head(nn.Module):
    """Parallel L1 regression of the whole chunk (OpenVLA-OFT, arXiv 2502.19645).

    Empty action queries, one a step, see each other in both directions and the context; a residual MLP turns
    each into an action. One pass, no noise: the same context gives the same actions.

    Args:
        config: Sizes.
        context_width: Width of the context's tokens.
        chunk_size: Actions t in a chunk.
        action_dim: Width a of an action.
    """

    def __init__(
        self, config: ActionHeadConfig, context_width: int, chunk_size: int, action_dim: int
    ) -> None:
        super().__init__()
        width = config.width
        self.queries = nn.Parameter(0.02 * torch.randn(chunk_size, width))
        self.norm_context = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, config.heads, context_width) for _ in range(config.depth)
        )
        self.output = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.ReLU(),
            ResidualMlp(width),
            ResidualMlp(width),
            nn.LayerNorm(width),
            nn.Linear(width, action_dim),
        )

    def predict(self, context: Tensor, mask: Tensor) -> Tensor:
        """The chunk, context [b s c], mask [b s] -> [b t a]."""
        context = self.norm_context(context)
        tokens = repeat(self.queries, "t d -> b t d", b=len(context))
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return self.output(tokens)

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Mean absolute error, padded actions left out, -> [b]; nothing is drawn from the generator."""
        return flow.masked_mean((self.predict(context, mask) - actions).abs(), is_pad)

    def sample(self, context: Tensor, mask: Tensor, noise: Tensor, integrate: flow.Integrator) -> Tensor:
        """The chunk, [b t a]; of the noise only the number of rows counts, and nothing is integrated."""
        return repeat(self.predict(context, mask), "b t a -> (b r) t a", r=len(noise) // len(context))


ACTION_HEADS: dict[str, type[FlowHead] | type[L1Head]] = {"flow": FlowHead, "l1": L1Head}
"""Name -> class, constructed with (config, context_width, chunk_size, action_dim)."""


def make_action_head(config: ActionHeadConfig, context_width: int, chunk_size: int, action_dim: int) -> Any:
    """Build the head that a config names.

    Args:
        config: Name and sizes.
        context_width: Width of the context's tokens.
        chunk_size: Actions t in a chunk.
        action_dim: Width a of an action.

    Returns:
        A module that satisfies `ActionHead`.

    Raises:
        ValueError: If the name is not in the table.
    """
    if config.name not in ACTION_HEADS:
        raise ValueError(f"Unknown head {config.name!r}. Known: {', '.join(sorted(ACTION_HEADS))}.")
    return ACTION_HEADS[config.name](config, context_width, chunk_size, action_dim)
