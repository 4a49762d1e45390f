"""A Wan prior's reductions, compiled for one batch on a GPU and captured as one CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vega_policy.priors.wan_fast import FastWan, refuse

WARM_UP = 3
"""Runs before a capture; in them libraries choose their kernels."""

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Attention kernels by speed on a few hundred tokens of an H100; torch itself starts with flash."""


@dataclass(frozen=True)
class Plan:
    """How a captured prior goes about its batch; nothing of it changes what is computed.

    Attributes:
        encode_at_once: Frames that the encoder takes at once; None takes all. Fewer stay in the GPU's cache.
        read_at_once: Frames that the transformer takes at once; None takes all.
        attention: The attention kernel that is tried first, of `ATTENTION`.
    """

    encode_at_once: int | None = None
    read_at_once: int | None = None
    attention: str = "cudnn"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is one of {', '.join(ATTENTION)}; got {self.attention!r}.")
        for count in (self.encode_at_once, self.read_at_once):
            if count is not None and count < 1:
                raise ValueError(f"At least one frame is taken at once; got {count}.")

    @property
    def kernels(self) -> list[SDPBackend]:
        """All attention kernels, the chosen one first."""
        return [ATTENTION[self.attention], *(k for name, k in ATTENTION.items() if name != self.attention)]


class CapturedWan:
    """A `FastWan` compiled for one batch size and captured as one CUDA graph.

    Blocks share one compiled function, so that building takes seconds, not minutes. Products are left to
    cuBLAS: the compiler's own, tuned for two minutes, were slower.

    Args:
        fast: The reductions, on a CUDA device.
        frames: Frames of the batch it is built for, [n 3 h w].
        noise: Their noise, [z 1 gh gw] or [n z 1 gh gw].
        plan: How the batch is gone about; None takes all of it at once.
    """

    def __init__(self, fast: FastWan, frames: Tensor, noise: Tensor, plan: Plan | None = None) -> None:
        fast.check(frames, noise, fast.noise_level)
        self.fast, self.batch, self.plan = fast, len(frames), plan or Plan()
        self._frames = frames.clone()
        self._noise = noise.expand(len(frames), *fast.latent).clone()
        compiled: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._encode, self._enter = (
            torch.compile(fast.encoder, **compiled),
            torch.compile(fast.enter, **compiled),
        )
        self.blocks: list[Any] = [torch.compile(block, **compiled) for block in fast.blocks]
        self._graph, self._features = capture(lambda: self.inline(self._frames, self._noise), self.plan)

    @torch.no_grad()
    def __call__(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As `FastWan.forward`, for batches of the captured length only."""
        self._check(frames, noise, noise_level)
        self._frames.copy_(frames)
        self._noise.copy_(noise)
        self._graph.replay()
        return self._features.clone()

    def _check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        self.fast.check(frames, noise, noise_level)
        if len(frames) != self.batch:
            refuse("batches of", f"{self.batch} frames", f"{len(frames)}")

    def nested(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As a call, without a graph of its own, to be captured in a larger one."""
        self._check(frames, noise, noise_level)
        return self.inline(frames, noise)

    def inline(self, frames: Tensor, noise: Tensor) -> Tensor:
        """The compiled work without a graph of its own, to be captured in a larger one."""
        return self.fast.leave(self.read(self.enter(frames, noise)))

    def enter(self, frames: Tensor, noise: Tensor) -> Tensor:
        """From frames to the transformer's first tokens, [n 3 h w] -> [n m d]."""
        parts = [self._encode(part) for part in frames.split(self.plan.encode_at_once or len(frames))]
        means = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._enter(means, noise.expand(len(frames), *self.fast.latent).contiguous())

    def read(self, tokens: Tensor) -> Tensor:
        """The compiled blocks, [n m d] -> [n m d]."""
        run, blocks = self.fast.transformer.run, self.blocks
        parts = [run(part, blocks) for part in tokens.split(self.plan.read_at_once or len(tokens))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def capture(run: Callable[[], Tensor], plan: Plan | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what a function does on the GPU; its inputs and its result stay where they are.

    Args:
        run: The work, without arguments and without synchronisation.
        plan: Says which attention kernel is tried first.

    Returns:
        The graph, and the tensor that each replay writes.
    """
    kernels = (plan or Plan()).kernels
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), sdpa_kernel(kernels, set_priority=True):
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result
