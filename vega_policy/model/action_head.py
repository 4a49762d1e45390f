"""Action heads: from the backbone's context to a chunk of normalised actions; auxiliary heads beside them.

The flow head follows the straight path between an action chunk and noise. Time runs from t = 1 (noise) to
t = 0 (actions), as in LeRobot and openpi:

    x_t = t * noise + (1 - t) * actions        v = d x_t / d t = noise - actions

Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747), with pi0's (arXiv 2410.24164)
direction.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from vega_policy.config import unknown_name
from vega_policy.model.config import ActionHeadConfig, DisplacementConfig, ForecastConfig
from vega_policy.model.layers import Attention, KVCache, Mlp, sinusoid

DISPLACEMENT_UNIT = 0.1
"""Metres, about the spread of displacements, in which the head for them computes."""

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t [b t a], time [b]) -> velocity [b t a]."""

Integrator = Callable[[VelocityField, Tensor, int], Tensor]
"""(velocity field, noise [b t a], steps) -> actions [b t a]."""


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the point x_t on the straight path, [b t a], [b t a], [b] or [b t] -> [b t a]."""
    time = time[:, None, None] if time.dim() == 1 else time[..., None]
    return time * noise + (1 - time) * actions


def velocity(actions: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of the straight path, the same at every time, [b t a], [b t a] -> [b t a]."""
    return noise - actions


def sample_time(batch: int, power: float, generator: torch.Generator | None = None) -> Tensor:
    """Sample training times in [0.001, 1] on the CPU, float32 [batch].

    They follow Beta(power, 1), sampled by inversion as u^(1 / power): 1 is uniform, more prefers noise.
    """
    uniform = torch.rand(batch, generator=generator)
    return 0.001 + 0.999 * uniform.pow(1 / power)


def euler(field: VelocityField, noise: Tensor, steps: int) -> Tensor:
    """Integrate from noise (t = 1) to actions (t = 0) in equal Euler steps, [b t a] -> [b t a]."""
    x = noise
    for step in range(steps):
        time = torch.full((len(x),), 1 - step / steps, dtype=torch.float32, device=x.device)
        x = x - field(x, time) / steps
    return x


def masked_mean(values: Tensor, is_pad: Tensor | None) -> Tensor:
    """Return the mean over the unpadded steps of each sample, [b t a], [b t] -> [b].

    A sample of padding only counts as zero.
    """
    mean = values.mean(dim=-1)  # [b t]
    if is_pad is None:
        return mean.mean(dim=1)
    valid = (~is_pad).to(mean.dtype)
    return (mean * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def masked_mean_square(error: Tensor, is_pad: Tensor | None) -> Tensor:
    """Return the mean square over the unpadded steps of each sample, [b t a], [b t] -> [b]."""
    return masked_mean(error.square(), is_pad)


class ActionHead(Protocol):
    """Interface of an action head; context [b s d], mask [b s] (True: may be read), actions [b t a].

    A `condition` [b c] of width c = `condition_width` modulates its blocks; zeros do nothing.
    """

    condition_width: int

    def sample_noise_and_time(
        self, actions: Tensor, generator: torch.Generator | None = None, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sample what `loss` needs for these actions: noise [b t a] and time [b], or None.

        With `prefix_steps` the time is [b t], and 0 at the clean actions of a prefix.
        """
        ...

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each sample, [b]; is_pad [b t] marks steps after the end of the episode.

        Of `prefix` [b t a] the actions at time 0 are given to the head; None gives those of `actions`.
        """
        ...

    def sample(
        self,
        context: Tensor,
        mask: Tensor,
        noise: Tensor,
        integrate: Integrator = euler,
        prefix: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return chunks from noise [b*r t a] -> [b*r t a], r chunks for each context.

        They begin with `prefix` [b*r d a], d <= `prefix_steps`, where it is given.
        """
        ...


def sample_prefix(
    config: ActionHeadConfig, batch: int, steps: int, generator: torch.Generator | None
) -> Tensor:
    """Sample which actions of training chunks are a clean prefix, bool [batch steps], on the CPU.

    The number of actions is uniform in 0..prefix_steps, and 0 in a part `prefix_dropout` of the samples
    (training-time real-time chunking; Black et al., arXiv 2512.05964).
    """
    length = torch.randint(config.prefix_steps + 1, (batch,), generator=generator)
    length[torch.rand(batch, generator=generator) < config.prefix_dropout] = 0
    return torch.arange(steps) < length[:, None]


class FlowHead(nn.Module):
    """Flow matching over an action chunk (pi0, arXiv 2410.24164) with cross-attention to the context."""

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
            DiTBlock(config.width, config.heads, context_width, config.dropout) for _ in range(config.depth)
        )
        self.output = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, action_dim))
        self.condition_width = config.width  # it is added to the embedding of the time

    def sample_noise_and_time(
        self, actions: Tensor, generator: torch.Generator | None = None, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Sample noise [b t a] and time [b] for actions [b t a], on the CPU: equal on every device.

        With the same generator in each process, `world_size` processes draw what one process draws for the
        whole batch of b * world_size samples.
        """
        batch, *chunk = actions.shape
        own = slice(rank * batch, (rank + 1) * batch)
        noise = torch.randn(world_size * batch, *chunk, generator=generator)[own]
        time = sample_time(world_size * batch, self.config.time_power, generator)
        if self.config.prefix_steps:
            prefix = sample_prefix(self.config, world_size * batch, chunk[0], generator)
            time = time[:, None] * ~prefix
        return copy_to(noise, actions), copy_to(time[own], actions)

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the squared error of the velocity on the straight path, without padding and prefix, [b].

        Raises:
            ValueError: If noise or time is missing.
        """
        if noise is None or time is None:
            raise ValueError("The flow head needs noise [b t a] and time [b]; see sample_noise_and_time.")
        x = interpolate(actions, noise, time)
        if prefix is not None and time.dim() == 2:
            x = torch.where((time == 0)[..., None], prefix, x)
        predicted = self.velocity(self.norm_context(context), mask, x, time, condition)
        return masked_mean_square(predicted - velocity(actions, noise), without_prefix(is_pad, time))

    def velocity(
        self, context: Tensor, mask: Tensor, x: Tensor, time: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return the velocity at x_t, normalised context [b s c], x [b t a], time [b] or [b t] -> [b t a]."""
        tokens, embedded = self.embed_action(x) + self.position, self._embed(time, condition)
        for block in self.blocks:
            tokens = block(tokens, context, mask, embedded)
        return self.output(tokens)

    def sample(
        self,
        context: Tensor,
        mask: Tensor,
        noise: Tensor,
        integrate: Integrator = euler,
        prefix: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Integrate the velocity field, noise [b*r t a] -> actions [b*r t a]; equal noise, equal actions.

        Keys and values of the context are computed once for all steps. On a CPU, where each step would load
        their weights again, so are the modulations of Euler's times.
        """
        repeats = len(noise) // len(context)
        context, mask = (repeat_rows(x, repeats) for x in (self.norm_context(context), mask))
        condition = None if condition is None else repeat_rows(condition, repeats)
        if prefix is not None:
            return self._sample_after(prefix, context, mask, noise, integrate, condition)
        if any(isinstance(weight, DTensor) for weight in self.blocks.parameters()):
            # FSDP gathers the weights of a block in the block's forward pass only.
            field = partial(self.velocity, context, mask, condition=condition)
            return integrate(field, noise, self.config.steps)
        blocks: list[Any] = list(self.blocks)
        caches = [block.cross_attention.kv_cache(context) for block in blocks]
        known = self._modulations() if noise.device.type == "cpu" and condition is None else {}

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            is_shared = bool(known) and bool((time == time[0]).all())
            modulations = known.get(time[0].item()) if is_shared else None
            if modulations is None:
                embedded = self._embed(time, condition)
                modulations = [block.modulation(embedded) for block in blocks]
            tokens = self.embed_action(x) + self.position
            for block, cache, modulation in zip(blocks, caches, modulations, strict=True):
                tokens = block.modulated(tokens, cache, mask, modulation)
            return self.output(tokens)

        return integrate(velocity, noise, self.config.steps)

    def _sample_after(
        self,
        prefix: Tensor,
        context: Tensor,
        mask: Tensor,
        noise: Tensor,
        integrate: Integrator,
        condition: Tensor | None,
    ) -> Tensor:
        """Integrate what follows a clean prefix [b*r d a], whose time is 0 throughout."""
        length, steps = prefix.shape[1], noise.shape[1]
        is_rest = torch.arange(steps, device=noise.device) >= length

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            x = torch.cat([prefix, x[:, length:]], dim=1)
            return self.velocity(context, mask, x, time[:, None] * is_rest, condition)

        chunk = integrate(velocity, noise, self.config.steps)
        return torch.cat([prefix, chunk[:, length:]], dim=1)

    def _embed(
        self, time: Tensor, condition: Tensor | None = None
    ) -> Tensor:  # [b] -> [b d], [b t] -> [b t d]
        embedded = self.embed_time(sinusoid(1000 * time, self.config.width))
        if condition is None:
            return embedded
        return embedded + (condition if time.dim() == 1 else condition[:, None])

    def _modulations(self) -> dict[float, list[Tensor]]:
        """Return each block's modulation [1 9*d] at each of Euler's times."""
        steps, blocks = self.config.steps, list[Any](self.blocks)
        times = torch.tensor([1 - step / steps for step in range(steps)])
        embedded = self._embed(times)
        by_block = [block.modulation(embedded).split(1) for block in blocks]
        return dict(zip(times.tolist(), map(list, zip(*by_block, strict=True)), strict=True))


class L1Head(nn.Module):
    """Parallel L1 regression of the whole chunk (OpenVLA-OFT, arXiv 2502.19645).

    One learned query per step attends to all others and to the context; a residual MLP turns it into an
    action. One pass, no noise: the same context gives the same actions.
    """

    def __init__(
        self, config: ActionHeadConfig, context_width: int, chunk_size: int, action_dim: int
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.queries = nn.Parameter(0.02 * torch.randn(chunk_size, width))
        self.norm_context = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, config.heads, context_width, config.dropout)
            for _ in range(config.depth)
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
        if config.prefix_steps:
            self.embed_prefix = nn.Linear(action_dim, width)
        self.condition_width = 2 * config.depth * width  # scale and shift of each block's tokens (FiLM)

    def sample_noise_and_time(
        self, actions: Tensor, generator: torch.Generator | None = None, rank: int = 0, world_size: int = 1
    ) -> tuple[None, Tensor | None]:
        """Sample no noise, which regression does not need, and the prefix, if any, as time 0 of [b t]."""
        if not self.config.prefix_steps:
            return None, None
        batch, steps, _ = actions.shape
        prefix = sample_prefix(self.config, world_size * batch, steps, generator)
        return None, copy_to((~prefix[rank * batch : (rank + 1) * batch]).float(), actions)

    def loss(
        self,
        context: Tensor,
        mask: Tensor,
        actions: Tensor,
        is_pad: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the mean absolute error, without padding and prefix, [b]; noise is not used."""
        known = None if time is None else (actions if prefix is None else prefix, time == 0)
        error = (self.predict(context, mask, known, condition) - actions).abs()
        return masked_mean(error, without_prefix(is_pad, time))

    def predict(
        self,
        context: Tensor,
        mask: Tensor,
        prefix: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the chunk, context [b s c] -> [b t a].

        A prefix is actions [b t a], and where they are known, bool [b t].
        """
        context = self.norm_context(context)
        tokens = repeat(self.queries, "t d -> b t d", b=len(context))
        if prefix is not None:
            tokens = tokens + self.embed_prefix(prefix[0]) * prefix[1][..., None]
        films = [None] * len(self.blocks) if condition is None else condition.chunk(len(self.blocks), dim=1)
        for block, film in zip(self.blocks, films, strict=True):
            if film is not None:
                scale, shift = film[:, None].chunk(2, dim=-1)
                tokens = tokens * (1 + scale) + shift
            tokens = block(tokens, context, mask)
        return self.output(tokens)

    def sample(
        self,
        context: Tensor,
        mask: Tensor,
        noise: Tensor,
        integrate: Integrator = euler,
        prefix: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the chunk, [b*r t a]; the noise gives the number of rows only."""
        repeats = len(noise) // len(context)
        if prefix is None:
            return repeat_rows(self.predict(context, mask, condition=condition), repeats)
        context, mask = (repeat_rows(x, repeats) for x in (context, mask))
        condition = None if condition is None else repeat_rows(condition, repeats)
        length, steps = prefix.shape[1], noise.shape[1]
        known = torch.arange(steps, device=prefix.device) < length
        padded = functional.pad(prefix, (0, 0, 0, steps - length))
        chunk = self.predict(context, mask, (padded, known.expand(len(prefix), -1)), condition)
        return torch.cat([prefix, chunk[:, length:]], dim=1)


class ForecastHead(nn.Module):
    """Predicts the semantic encoder's tokens of each view some control steps ahead, an auxiliary task.

    One query a future token: the fused token of its place now, a position and the horizon. Queries attend to
    each other and to the context, which holds instruction and state.
    """

    def __init__(
        self, config: ForecastConfig, context_width: int, channels: int, tokens: int, target: nn.Module | None
    ) -> None:
        """`tokens` counts those of all views; `target` encodes later frames if the image encoder learns."""
        super().__init__()
        self.config, self.target = config, target
        self.embed = nn.Sequential(nn.LayerNorm(context_width), nn.Linear(context_width, config.width))
        self.position = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        self.horizon = nn.Parameter(0.02 * torch.randn(len(config.steps), 1, config.width))
        self.norm_context = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(config.width, config.heads, context_width) for _ in range(config.depth)
        )
        self.output = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, channels))
        if config.read:
            self.project = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, context_width))

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Fused tokens [b v n d], context [b s d], mask [b s] -> predicted tokens' features [b k*v*n w]."""
        now = self.embed(tokens.flatten(1, 2)) + self.position  # [b v*n w]
        future = (now[:, None] + self.horizon).flatten(1, 2)
        context = self.norm_context(context)
        for block in self.blocks:
            future = block(future, context, mask)
        return future

    def extend(self, context: Tensor, mask: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
        """Append the predicted tokens to a context [b s d] and its mask [b s] -> [b s+k*v*n d], [b ...]."""
        seen = mask.new_ones(future.shape[:2])
        return torch.cat([context, self.project(future)], dim=1), torch.cat([mask, seen], dim=1)

    def loss(self, future: Tensor, target: Tensor, is_pad: Tensor) -> Tensor:
        """Return the squared error of the normalised tokens, [b k*v*n w], [b k v c gh gw], [b k] -> [b].

        Tokens are normalised over their channels, so that predicting zero has a loss of 1. Horizons behind
        the end of the episode are left out.
        """
        k, channels = target.shape[1], target.shape[3]
        expected = rearrange(target.float(), "b k v c gh gw -> b k (v gh gw) c")
        expected = functional.layer_norm(expected, (channels,))
        error = (self.output(future).unflatten(1, (k, -1)).float() - expected).square().mean(dim=(2, 3))
        known = (~is_pad).to(error.dtype)
        return (error * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)


class DisplacementHead(nn.Module):
    """Predicts where the target is from the gripper [3] (m), and embeds that as the action head's condition.

    A learned query reads the context. The embedding starts at zero, where the action head is what it is
    without (arXiv 2606.27663), and no gradient of the actions reaches the prediction: it stays a position.
    """

    def __init__(self, config: DisplacementConfig, context_width: int, condition_width: int) -> None:
        super().__init__()
        width = config.width
        self.query = nn.Parameter(0.02 * torch.randn(1, width))
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = Attention(width, config.heads, context_width)
        self.output = nn.Sequential(nn.LayerNorm(width), Mlp(width, width, 3))
        self.embed = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, condition_width))
        for weight in self.embed[2].parameters():
            nn.init.zeros_(weight)

    def forward(self, context: Tensor, mask: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context [b s d], mask [b s], noise [b 3] (m) before embedding -> displacement [b 3], condition."""
        query = repeat(self.query, "n w -> b n w", b=len(context))
        found = DISPLACEMENT_UNIT * self.output(self.attention(query, self.norm_context(context), mask)[:, 0])
        known = found.detach() if noise is None else found.detach() + noise
        return found, self.embed(known / DISPLACEMENT_UNIT)


ACTION_HEADS: dict[str, type[FlowHead] | type[L1Head]] = {"flow": FlowHead, "l1": L1Head}
"""Name -> class, constructed with (config, context_width, chunk_size, action_dim)."""


def make_action_head(config: ActionHeadConfig, context_width: int, chunk_size: int, action_dim: int) -> Any:
    """Build the `ActionHead` that a config names.

    Raises:
        ValueError: If the name is unknown.
    """
    if config.name not in ACTION_HEADS:
        raise unknown_name("head", config.name, sorted(ACTION_HEADS))
    return ACTION_HEADS[config.name](config, context_width, chunk_size, action_dim)


def without_prefix(is_pad: Tensor | None, time: Tensor | None) -> Tensor | None:
    """Return which actions [b t] the loss leaves out: padding, and those of a prefix, whose time is 0."""
    if time is None or time.dim() == 1:
        return is_pad
    return time == 0 if is_pad is None else is_pad | (time == 0)


def repeat_rows(values: Tensor, repeats: int) -> Tensor:
    """Repeat each row, [b ...] -> [b*r ...]."""
    return repeat(values, "b ... -> (b r) ...", r=repeats)


def copy_to(value: Tensor, like: Tensor) -> Tensor:
    """Copy a CPU tensor to the device and type of `like` without waiting for the device."""
    return (value.pin_memory() if like.is_cuda else value).to(like, non_blocking=True)


class DiTBlock(nn.Module):
    """Transformer block over a chunk that attends to the context and is modulated by the flow's time.

    Scale, shift and gate of each branch come from the time embedding and start at zero, so that the block
    starts as the identity (adaLN-zero; Peebles and Xie, arXiv 2212.09748).
    """

    def __init__(self, width: int, heads: int, context_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context_width)
        self.mlp = Mlp(width, 4 * width, width)
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """Tokens [b t d], context [b s c], mask [b s], time embedding [b d] or [b t d] -> [b t d]."""
        return self.modulated(tokens, self.cross_attention.kv_cache(context), mask, self.modulation(time))

    def modulated(self, tokens: Tensor, cache: KVCache, mask: Tensor, modulation: Tensor) -> Tensor:
        """Apply the block with a cached context; modulation [b 9*d], [1 9*d] or [b t 9*d]."""
        cross = self.cross_attention
        branches = (self.attention, lambda normed: cross.attend(normed, cache, mask), self.mlp)
        parts = (modulation[:, None] if modulation.dim() == 2 else modulation).chunk(9, dim=-1)
        for i, branch in enumerate(branches):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            tokens = tokens + gate * self.dropout(branch(self.norms[i](tokens) * (1 + scale) + shift))
        return tokens


class CrossAttentionBlock(nn.Module):
    """Pre-norm transformer block over a chunk: self-attention, cross-attention to the context, MLP."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context_width)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Tokens [b t d], context [b s c], mask [b s] -> [b t d]."""
        tokens = tokens + self.dropout(self.attention(self.norm_self(tokens)))
        tokens = tokens + self.dropout(self.cross_attention(self.norm_cross(tokens), context, mask))
        return tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))


class ResidualMlp(nn.Module):
    """Norm - Linear - ReLU with a skip connection, [... d] -> [... d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, tokens: Tensor) -> Tensor:
        """[... d] -> [... d]."""
        return tokens + self.branch(tokens)
