"""Part `train`: where the time of a training step goes, with frames and a warm cache on the device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vega_policy.backbones.depthwise import shift_depthwise
from vega_policy.benchmarks.timing import busy_time, by_kind, kernel_times, longest, operator_times
from vega_policy.model.config import ModelConfig, PriorConfig
from vega_policy.model.cuda_graph import constant_words
from vega_policy.model.observation import Observation, stored_frames
from vega_policy.model.torch_compile import compile_blocks
from vega_policy.model.vega import VegaModel
from vega_policy.training.cuda_graph import CapturedGradient
from vega_policy.training.optim import EMA, clip_gradient, read_scalars

CASES = ("live", "cached", "none")
"""Where the prior's features come from: computed in the step, from a cache, or there is no prior."""

VARIANTS = ("eager", "captured", "compiled", "compiled_captured", "shifted")
"""As written; loss and gradient as one CUDA graph; `compile=true`; both; compiled with depthwise convolutions
as shifted products.
"""


def benchmark_train(
    config: ModelConfig,
    device: torch.device,
    batch: int,
    seconds: float,
    cases: tuple[str, ...] = CASES,
    variants: tuple[str, ...] = ("eager",),
) -> Iterator[dict[str, Any]]:
    """One row for each case and variant.

    Args:
        config: The model; its weights are random.
        device: Where it runs; bfloat16 autocast on CUDA.
        batch: Samples a step.
        seconds: About how long each figure is timed.
        cases: Some of `CASES`.
        variants: Some of `VARIANTS`.

    Yields:
        `prior`, `variant`, seconds until the first step is done, milliseconds of each stage, of the step, and
        `samples_per_s`; on a GPU also milliseconds by kind of kernel, the longest `kernels` and `operators`.

    Raises:
        ValueError: If a case or variant is unknown.
    """
    for known, asked in ((CASES, cases), (VARIANTS, variants)):
        if set(asked) - set(known):
            raise ValueError(f"--cases, --variants: known are {', '.join(known)}; got {' '.join(asked)}.")
    if device.type != "cuda" and any("captured" in variant for variant in variants):
        raise ValueError(f"--variants: CUDA graphs need a GPU; got {' '.join(variants)} on {device}.")
    plain = replace(config.prior, engine="plain")  # a cache's features need no engine that is compiled first
    configs = {
        "live": config,
        "cached": replace(config, prior=plain),
        "none": replace(config, prior=PriorConfig(name="none")),
    }
    for case in cases:
        for variant in variants:
            torch._dynamo.reset()
            begin = time.perf_counter()
            step = _Step(configs[case], device, batch, case == "cached", variant)
            yield {"prior": case, "variant": variant} | step.row(seconds, begin)


class _Step:
    """One training step on synthetic samples, as the trainer makes it."""

    def __init__(
        self, config: ModelConfig, device: torch.device, batch: int, cached: bool, variant: str
    ) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.cached = device, batch, cached
        self.model: Any = VegaModel(config).train().to(device)
        side = config.frame_size
        self.frames = torch.randint(
            0, 256, (batch, config.views, 3, side, side), dtype=torch.uint8, device=device
        )
        self.prior: Tensor | None = None
        if cached:
            self.prior = torch.cat([self.model.prior(part) for part in self._floats().split(32)])
        if variant == "shifted":
            shift_depthwise(self.model.backbone.image_encoder)
        if variant not in ("eager", "captured"):
            compile_blocks(self.model)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=device.type == "cuda")
        self.average = EMA(self.model, 0.999)
        self.state = torch.randn(batch, config.state_dim, device=device)
        self.actions = torch.randn(batch, config.chunk_size, config.action_dim, device=device)
        self.words = ["lift the red cube"] * batch
        torch.manual_seed(1)
        self.drawn = self.model.head.draw(self.actions, None)
        self.graph = self._captured() if "captured" in variant else None

    def _captured(self) -> CapturedGradient:
        """Loss and gradient in a graph, which reads noise and times where `step` writes them."""
        head = self.model.head
        head.draw = lambda *_: self.drawn
        with constant_words(self.model.backbone, self.words):
            graph = CapturedGradient(self._loss, self.weights, most=1.0)
        del head.draw  # the method is back
        return graph

    def row(self, seconds: float, begin: float) -> dict[str, Any]:
        """Milliseconds by stage; stages are timed one by one, the step as a whole.

        Args:
            seconds: About how long the step is timed.
            begin: When the step was begun to be built, by `time.perf_counter`.
        """
        torch.manual_seed(1)
        loss = self._gradient()[0].item()  # comparable: same weights, samples and noise in all variants
        self.optimizer.zero_grad()
        self.step()
        times = {"loss": loss, "ready_s": time.perf_counter() - begin}
        times |= {"step_ms": self._time(self.step, seconds)}
        times |= {"samples_per_s": 1000 * self.batch / times["step_ms"]} | self._stages(seconds / 4)
        if self.device.type != "cuda":
            return times
        kernels = kernel_times(self.step)
        times |= {"kernels_ms": sum(kernels.values())} | by_kind(kernels)
        return times | {"kernels": longest(kernels), "operators": operator_times(self.step)}

    def _stages(self, seconds: float) -> dict[str, float]:
        """Milliseconds of each stage; of a graph only what lies outside it."""
        if self.graph is not None:
            self._gradient()
            return {"update_ms": self._time(self._update, seconds)}
        stages: dict[str, Callable[[], Any]] = {
            "encoder_ms": lambda: self._autocast(self._semantic),
            "encoder_backward_ms": lambda: self._autocast(self._semantic).float().sum().backward(),
        }
        if self.model.prior is not None and not self.cached:
            stages["prior_ms"] = lambda: self.model.prior(self._floats())
        stages |= {"forward_ms": self._loss, "forward_backward_ms": lambda: self._loss().backward()}
        stages["update_ms"] = self._update
        return {stage: self._time(call, seconds) for stage, call in stages.items()}

    def step(self) -> None:
        """Forward, backward, update; waits once for the device, as the trainer does."""
        loss, norm = self._gradient()
        read_scalars({"loss": loss, "gradient_norm": norm})
        self._update()
        self.optimizer.zero_grad()

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """Loss and norm of the gradient, whether by a graph or not."""
        if self.graph is not None:
            for place, drawn in zip(self.drawn, self.model.head.draw(self.actions, None), strict=True):
                place.copy_(drawn)
            return self.graph()
        loss = self._loss()
        loss.backward()
        return loss.detach(), clip_gradient(self.weights, 1.0)

    def _update(self) -> None:
        self.optimizer.step()
        self.average.update(1000)

    def _time(self, call: Callable[[], Any], seconds: float) -> float:
        once = busy_time(call, self.device, repeat=2)
        return busy_time(call, self.device, repeat=max(3, int(1000 * seconds / once)))

    def _floats(self) -> Tensor:
        frames = stored_frames(self.frames)
        assert frames is not None  # frames were given
        return frames

    def _seen(self) -> Observation:
        return Observation(self._floats(), self.state, self.words, prior=self.prior)

    def _semantic(self) -> Tensor:
        return self.model.semantic_features(self._seen())

    def _loss(self) -> Tensor:
        return self._autocast(lambda: self.model.loss(self._seen(), self.actions).mean())

    def _autocast(self, call: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return call()
