"""Part `prior`: the same Wan prior, as a user of diffusers would write it, cut at the layer, and fast."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vega_policy.benchmarks.dataset import FastPath, fast_path
from vega_policy.benchmarks.timing import busy_time, by_kind, kernel_times, longest, matmul_ceiling, measure
from vega_policy.model.config import PriorConfig
from vega_policy.priors import PRIORS, resolve
from vega_policy.priors.base import PriorReader
from vega_policy.priors.sizes import reader_without_weights
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import CapturedWan, FastWan, capture

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "wan2.1_t2v_1.3b": {
        "vae": {},
        "transformer": {
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 8960,
            "text_dim": 4096,
        },
    },
    "wan_tiny": PRIORS["wan_tiny"].architecture or {},
}
"""Constructor arguments by prior; weights are random, because time does not depend on them."""


def _product_flops(bias: Any, first: Any, second: Any, **_: Any) -> int:
    """Operations of a product with bias and activation, given shapes [d], [m k], [k d]."""
    return 2 * first[0] * first[1] * second[1]


FLOPS = {torch.ops.aten._addmm_activation: _product_flops}
"""What torch's counter does not know."""

Read = Callable[[Tensor], Tensor]


class Subject:
    """One prior with random weights in all its forms, sharing weights where they can.

    Args:
        name: Key of `SHAPES`.
        device: Where it runs.
        size: Height and width of the frames in pixels.
    """

    def __init__(self, name: str, device: torch.device, size: tuple[int, int]) -> None:
        self.device, self.size = device, size
        config = resolve(PriorConfig(name=name, engine="plain"))
        self.dtype: torch.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with device:
            vae: Any = AutoencoderKLWan(**SHAPES[name]["vae"])
            transformer: Any = WanTransformer3DModel(**SHAPES[name]["transformer"])
            prompt = torch.randn(1, transformer.config.text_dim)
        vae.decoder = None
        vae, transformer = _as_loaded(vae, self.dtype), _as_loaded(transformer, self.dtype)
        self.whole = copy.copy(transformer)  # keeps all its blocks when the prior drops some
        self.whole._modules = dict(transformer._modules)
        grid = (size[0] // 16, size[1] // 16)
        self.prior = LatentWorldSimulator(vae, transformer, prompt, config, grid, "random")
        self.prior = self.prior.to(device).eval().requires_grad_(False)

    def path(self, name: str, frames: Tensor) -> Read:
        """One way to compute the features, frames [n 3 h w] -> [n d gh gw]; see `paths`."""
        chosen = fast_path(name)
        if chosen is not None:
            return Fast(self, frames, chosen)
        if name == "released":
            return _Released(self)
        if name == "all_blocks":
            return lambda x: all_blocks(self.prior, self.whole, x)
        return lambda x: self.prior.features(x, None)

    @torch.no_grad()
    def exact(self, frames: Tensor) -> Tensor:
        """The plain path in float32 with the same weights, four frames at a time."""
        prior = copy.deepcopy(self.prior).float()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([prior.features(part, None) for part in frames.split(4)])


def _as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """Types as `from_pretrained(torch_dtype=...)` gives them: some modules stay in float32."""
    kept = model._keep_in_fp32_modules or []
    for name, weight in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            weight.data = weight.data.to(dtype)
    return model.eval()


@torch.no_grad()
def all_blocks(prior: LatentWorldSimulator, transformer: Any, frames: Tensor) -> Tensor:
    """The paper's equations with diffusers' modules called as they are, [n 3 h w] -> [n d gh gw]."""
    seen: list[Tensor] = []
    hook = transformer.blocks[prior.layer].register_forward_hook(lambda _, __, output: seen.append(output))
    latent = prior.encode(frames[:, :, None])
    noisy = (1 - prior.noise_level) * latent + prior.noise_level * prior.noise(latent, None)
    time = torch.full((len(frames),), 1000 * prior.noise_level, device=frames.device)
    prompt = prior.prompt.to(transformer.dtype).expand(len(frames), -1, -1)
    transformer(noisy.to(transformer.dtype), time, prompt)
    hook.remove()
    return seen[0].transpose(1, 2).unflatten(2, (-1, frames.shape[3] // prior.patch))


class Fast:
    """The fast path, captured for one batch on a GPU.

    Args:
        subject: The prior.
        frames: A batch of the length it is built for, [n 3 h w].
        path: Which of the fast ways.
    """

    def __init__(self, subject: Subject, frames: Tensor, path: FastPath) -> None:
        fast, self._device = FastWan(path.prior(subject.prior)), subject.device
        self.noise = subject.prior.noise(torch.empty(len(frames), *fast.latent, device=subject.device), None)
        self._fast = fast
        on_gpu = subject.device.type == "cuda"
        self._run = CapturedWan(fast, frames, self.noise, path.plan) if on_gpu else fast

    def __call__(self, frames: Tensor) -> Tensor:
        """Features, [n 3 h w] -> [n d gh gw]."""
        return self._run(frames, self.noise, self._fast.noise_level)

    @torch.no_grad()
    def stages(self, frames: Tensor, ceiling: float) -> dict[str, float]:
        """Milliseconds of encoder and transformer apart, and the transformer's share of the ceiling."""
        noise = self.noise.expand(len(frames), *self._fast.latent).contiguous()
        tokens = self._enter(frames, noise)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            self._fast.transformer.run(tokens, self._fast.blocks)
        vae = _graphed_time(lambda: self._enter(frames, noise), self._device)
        dit = _graphed_time(lambda: self._read(tokens), self._device)
        rate = counter.get_total_flops() / dit / 1e9
        shares = {"dit_tflops": rate, "ceiling_tflops": ceiling, "dit_of_ceiling": rate / ceiling}
        return {"vae_ms": vae, "dit_ms": dit} | shares

    def _enter(self, frames: Tensor, noise: Tensor) -> Tensor:
        run = self._run
        return (
            run.enter(frames, noise)
            if isinstance(run, CapturedWan)
            else run.enter(run.encoder(frames), noise)
        )

    def _read(self, tokens: Tensor) -> Tensor:
        run = self._run
        return run.read(tokens) if isinstance(run, CapturedWan) else run.transformer.run(tokens, run.blocks)


class _Released:
    """As the released code runs: float32 weights under bfloat16 autocast, frames encoded one at a time."""

    def __init__(self, subject: Subject) -> None:
        self._prior = copy.deepcopy(subject.prior).float()
        self._whole = copy.deepcopy(subject.whole).float()

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        prior, whole = self._prior, self._whole
        with torch.autocast(frames.device.type, torch.bfloat16):
            latent = torch.cat([prior.encode(frame[None, :, None]) for frame in frames])
            noisy = (1 - prior.noise_level) * latent + prior.noise_level * prior.noise(latent, None)
            time = torch.full((len(frames),), 1000 * prior.noise_level, device=frames.device)
            whole(noisy, time, prior.prompt.expand(len(frames), -1, -1))
        return noisy


def benchmark_prior(
    name: str,
    device: torch.device,
    sizes: list[tuple[int, int]],
    batches: list[int],
    paths: list[str],
    seconds: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """One row for each size, number of frames and path.

    Args:
        name: Key of `SHAPES`.
        device: Where it runs.
        sizes: Heights and widths in pixels.
        batches: Numbers of frames encoded at once.
        paths: Names that `paths` knows.
        seconds: About how long each path is timed.

    Yields:
        Milliseconds (`p50_ms`, `p95_ms`), `frames_per_s`, `peak_gib`, relative `error` against float32, and
        for the fast paths the transformer's share of the ceiling of matrix products (`dit_of_ceiling`), the
        seconds it took to build, and on a GPU milliseconds by kind of kernel and the longest `kernels`.
    """
    ceiling = matmul_ceiling(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for size in sizes:
        subject = Subject(name, device, size)
        for n in batches:
            frames = torch.rand(n, 3, *size, device=device)
            expected = subject.exact(frames)
            for path in paths:
                torch._dynamo.reset()
                yield _row(subject, path, frames, expected, ceiling, seconds)


def _row(
    subject: Subject, path: str, frames: Tensor, expected: Tensor, ceiling: float, seconds: float
) -> dict[str, Any]:
    start = time.perf_counter()
    read = subject.path(path, frames)
    built = time.perf_counter() - start
    latency = measure(lambda: read(frames), subject.device, seconds)
    height, width = subject.size
    row = {
        "path": path,
        "size": f"{height}x{width}",
        "frames": len(frames),
        "p50_ms": latency.p50,
        "p95_ms": latency.p95,
        "frames_per_s": 1000 * len(frames) / latency.p50,
        "peak_gib": latency.peak_gib,
    }
    if path != "released":  # its features are not kept
        row["error"] = ((read(frames).float() - expected).norm() / expected.norm()).item()
    if isinstance(read, Fast):
        kernels = kernel_times(lambda: read(frames)) if subject.device.type == "cuda" else {}
        row |= read.stages(frames, ceiling) | {"build_s": built} | by_kind(kernels)
        row |= {"kernels": longest(kernels)} if kernels else {}
    return row


def _graphed_time(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        return busy_time(call, device, repeat=5)
    graph, _ = capture(call)
    return busy_time(graph.replay, device)


CELL = 16
"""Pixels a token of the grid to which features are pooled, as with the compact backbone."""


@torch.no_grad()
def benchmark_reader(
    name: str, device: torch.device, sizes: list[tuple[int, int]], batches: list[int], seconds: float = 1.0
) -> Iterator[dict[str, Any]]:
    """One row for each size and number of frames.

    Args:
        name: A prior.
        device: Where it runs, in float32 on the CPU and in the prior's own type elsewhere.
        sizes: Heights and widths of the frames in pixels; a prior may read them larger (`reads`).
        batches: Numbers of frames encoded at once.
        seconds: About how long each is timed.

    Yields:
        `path` (`plain`), `size`, `frames`, `reads`, `p50_ms`, `p95_ms`, `frames_per_s`, `peak_gib`.

    Raises:
        ValueError: If the prior is unknown or has no networks of its own.
    """
    dtype = "float32" if device.type == "cpu" or name not in PRIORS else PRIORS[name].dtype
    torch.manual_seed(0)
    for size in sizes:
        grid = (size[0] // CELL, size[1] // CELL)
        prior = reader_without_weights(PriorConfig(name=name, dtype=dtype), grid, str(device))
        reads = prior.input_size if isinstance(prior, PriorReader) else size
        for n in batches:
            frames = torch.rand(1, n, 1, 3, *size, device=device)
            latency = measure(lambda prior=prior, frames=frames: prior(frames), device, seconds)
            yield {
                "path": "plain",
                "size": f"{size[0]}x{size[1]}",
                "frames": n,
                "reads": f"{reads[0]}x{reads[1]}",
                "p50_ms": latency.p50,
                "p95_ms": latency.p95,
                "frames_per_s": 1000 * n / latency.p50,
                "peak_gib": latency.peak_gib,
            }
