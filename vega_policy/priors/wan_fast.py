"""The exact reductions of a Wan prior, and on a GPU one captured graph over all of it.

A robot sees new frames at every step, but of one size, at one noise level and with one prompt. `FastWan` is
the prior for just that: the encoder of `wan_frame`, the transformer of `wan_fixed`. Its features are the
plain path's up to rounding (1e-5 in float32). `CapturedWan` compiles it for one batch and replays it as one
CUDA graph.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vega_policy.priors.wan_fixed import FixedTransformer
from vega_policy.priors.wan_frame import FrameEncoder

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Runs before a capture; in them libraries choose their kernels."""

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention kernels by speed on a few hundred tokens of an H100; torch itself starts with flash."""


def obstacle(prior: Any) -> str | None:
    """Why a prior has no fast form, or None if it has one.

    Args:
        prior: A `LatentWorldSimulator`.
    """
    vae, transformer = prior.vae, prior.transformer
    if (type(vae), type(transformer)) != (AutoencoderKLWan, WanTransformer3DModel):
        return f"its networks are {type(vae).__name__} and {type(transformer).__name__}, not Wan's own"
    if vae.use_tiling:
        return "its autoencoder works in tiles"
    if transformer.config.patch_size[0] != 1:
        return f"its patches span {transformer.config.patch_size[0]} frames"
    if transformer.config.added_kv_proj_dim is not None:
        return "its transformer also attends to a reference image"
    return None


class FastWan(nn.Module):
    """A Wan prior for one frame size, noise level and prompt; batches of any length.

    Weights that the reductions leave alone are shared with the prior, the others are copied.

    Args:
        prior: A `LatentWorldSimulator` that `obstacle` finds nothing wrong with.

    Raises:
        ValueError: If the prior has no fast form.
    """

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __init__(self, prior: Any) -> None:
        super().__init__()
        reason = obstacle(prior)
        if reason is not None:
            raise ValueError(
                f"prior.engine=fast: this prior has no fast form: {reason}. Take prior.engine=plain."
            )
        self.noise_level: float = prior.noise_level
        self.frame: tuple[int, int] = prior.input_size
        scale = prior.vae.spatial_compression_ratio
        size = (self.frame[0] // scale, self.frame[1] // scale)
        self.encoder = FrameEncoder(prior.vae)
        self.transformer = FixedTransformer(prior.transformer, prior.prompt[0], self.noise_level, size)
        self.latent: tuple[int, ...] = (len(prior.latents_mean), 1, *size)
        self.rows = size[0] // self.transformer.patch[0]
        self.register_buffer("mean", prior.latents_mean[:, 0])
        self.register_buffer("std", prior.latents_std[:, 0])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """Features of single frames on the prior's own grid.

        Args:
            frames: Frames [n 3 h w], float32 in [0, 1].
            noise: Standard normal noise [z 1 gh gw] or [n z 1 gh gw] float32.
            noise_level: The level that the caller means, which must be the engine's.

        Returns:
            Features [n d gh gw] in the prior's floating-point type.

        Raises:
            ValueError: If shape, type, device or noise level are not those it was built for.
        """
        self.check(frames, noise, noise_level)
        return self.leave(self.transformer.run(self.enter(frames, noise), self.blocks))

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks."""
        return list(self.transformer.blocks)

    def enter(self, frames: Tensor, noise: Tensor) -> Tensor:
        """From frames to the transformer's first tokens, [n 3 h w] -> [n m d]."""
        latent = (self.encoder(frames).float() - self.mean) / self.std
        return self.transformer.embed((1 - self.noise_level) * latent + self.noise_level * noise.squeeze(-3))

    def leave(self, tokens: Tensor) -> Tensor:
        """[n m d] -> [n d gh gw]."""
        return rearrange(tokens, "n (gh gw) d -> n d gh gw", gh=self.rows)

    def check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        """Refuse what the engine was not built for; see `forward`."""
        expected = (3, *self.frame)
        if frames.ndim != 4 or tuple(frames.shape[1:]) != expected:
            _refuse("frames", f"[n {' '.join(map(str, expected))}]", list(frames.shape))
        if tuple(noise.shape) not in (self.latent, (len(frames), *self.latent)):
            _refuse("noise", f"{list(self.latent)} or {[len(frames), *self.latent]}", list(noise.shape))
        if frames.dtype != torch.float32 or noise.dtype != torch.float32:
            _refuse("frames and noise", "float32", f"{frames.dtype} and {noise.dtype}")
        if frames.device != self.mean.device:
            _refuse("frames", f"on {self.mean.device}", f"frames on {frames.device}")
        if noise_level != self.noise_level:
            _refuse("a noise level", str(self.noise_level), noise_level)


def _refuse(what: str, expected: str, found: Any) -> None:
    raise ValueError(
        f"This engine was built for {what} {expected}; got {found}. Build the prior for it, or take "
        "prior.engine=plain, which takes what comes."
    )


class CapturedWan:
    """A `FastWan` compiled for one batch size and captured as one CUDA graph.

    Blocks share one compiled function, so that building takes seconds, not minutes. Products are left to
    cuBLAS: the compiler's own, tuned for two minutes, were slower.

    Args:
        fast: The reductions, on a CUDA device.
        frames: Frames of the batch it is built for, [n 3 h w].
        noise: Their noise, [z 1 gh gw] or [n z 1 gh gw].
    """

    def __init__(self, fast: FastWan, frames: Tensor, noise: Tensor) -> None:
        fast.check(frames, noise, fast.noise_level)
        self.fast, self.batch = fast, len(frames)
        self._frames = frames.clone()
        self._noise = noise.expand(len(frames), *fast.latent).clone()
        compiled: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self.enter = torch.compile(fast.enter, **compiled)
        self.blocks: list[Any] = [torch.compile(block, **compiled) for block in fast.blocks]
        self._graph, self._features = capture(lambda: self.inline(self._frames, self._noise))

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
            _refuse("batches of", f"{self.batch} frames", f"{len(frames)}")

    def nested(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As a call, without a graph of its own, to be captured in a larger one."""
        self._check(frames, noise, noise_level)
        return self.inline(frames, noise)

    def inline(self, frames: Tensor, noise: Tensor) -> Tensor:
        """The compiled work without a graph of its own, to be captured in a larger one."""
        tokens = self.enter(frames, noise.expand(len(frames), *self.fast.latent).contiguous())
        return self.fast.leave(self.fast.transformer.run(tokens, self.blocks))


@torch.no_grad()
def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what a function does on the GPU; its inputs and its result stay where they are.

    Args:
        run: The work, without arguments and without synchronisation.

    Returns:
        The graph, and the tensor that each replay writes.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), sdpa_kernel(ATTENTION, set_priority=True):
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result


class Engine:
    """What a prior with `engine` fast or auto runs: reductions, captured for the first batch met on CUDA.

    A graph holds for one batch size. Of later sizes `fast` refuses, while `auto` runs the same reductions
    uncompiled: no call but the first waits for a compiler.

    Args:
        prior: A `LatentWorldSimulator`.
        strict: Whether other batch sizes are refused on CUDA.
    """

    def __init__(self, prior: Any, strict: bool) -> None:
        self.fast = FastWan(prior)
        self.latent = self.fast.latent
        self.nested = False  # inside somebody else's capture a graph cannot be replayed
        self._strict = strict
        self._captured: CapturedWan | None = None

    def __call__(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As `FastWan.forward`."""
        run: Callable[[Tensor, Tensor, float], Tensor] = self.fast
        if frames.is_cuda:
            if self._captured is None:
                logger.info("Building the prior for batches of %d frames; this takes a while.", len(frames))
                self._captured = CapturedWan(self.fast, frames, noise)
            if self._strict or len(frames) == self._captured.batch:
                run = self._captured.nested if self.nested else self._captured
        return run(frames, noise, noise_level)


def make_engine(prior: Any, engine: str) -> Engine | None:
    """The engine a prior runs on; None stands for the plain path.

    Args:
        prior: A `LatentWorldSimulator`.
        engine: `plain`, `fast` or `auto`.

    Raises:
        ValueError: If `fast` is asked for and the prior has no fast form.
    """
    if engine == "plain":
        return None
    reason = obstacle(prior)
    if engine == "auto" and reason is not None:
        logger.info("prior.engine=auto takes the plain path: %s.", reason)
        return None
    made = Engine(prior, strict=engine == "fast")
    logger.info(
        "prior.engine=%s: exact reductions for frames of %dx%d, noise level %g.",
        engine,
        *made.fast.frame,
        made.fast.noise_level,
    )
    return made
