"""Part `train`: time of each stage of a training step, with frames and a warm cache on the device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vega_policy.benchmarks.timing import busy_time, kernel_fields, operator_times
from vega_policy.model.config import ModelConfig, PriorConfig
from vega_policy.model.observation import Observation, to_float
from vega_policy.model.torch_compile import compile_blocks
from vega_policy.model.vega import VegaModel
from vega_policy.training.optim import EMA, clip_gradient, read_scalars

CASES = ("live", "cached", "none")
"""Where the prior's features come from: computed in the step, from a cache, or there is no prior."""

VARIANTS = ("eager", "compiled")
"""As written, or with `compile=true`."""


def benchmark_train(
    config: ModelConfig,
    device: torch.device,
    batch: int,
    seconds: float,
    cases: tuple[str, ...] = CASES,
    variants: tuple[str, ...] = ("eager",),
) -> Iterator[dict[str, Any]]:
    """Yield one row a case and variant, of a model with random weights; bfloat16 autocast on CUDA.

    A row holds `prior`, `variant`, `ready_s` (seconds until the first step is done), milliseconds of the step
    and of its stages, and `samples_per_s`; on a GPU also milliseconds by kind of kernel, and the longest
    `kernels` and `operators`.

    Raises:
        ValueError: If a case or variant is unknown.
    """
    for option, known, given in (("cases", CASES, cases), ("variants", VARIANTS, variants)):
        if set(given) - set(known):
            raise ValueError(f"{option}: expected some of {', '.join(known)}; got {' '.join(given)}.")
    plain = replace(config.prior, engine="plain")  # cached features are computed once, not worth a compiler
    configs = {
        "live": config,
        "cached": replace(config, prior=plain),
        "none": replace(config, prior=PriorConfig(name="none")),
    }
    for case in cases:
        for variant in variants:
            torch._dynamo.reset()
            start = time.perf_counter()
            step = TrainingStep(configs[case], device, batch, cached=case == "cached")
            if variant == "compiled":
                compile_blocks(step.model)
            yield {"prior": case, "variant": variant} | step.measure(seconds, start)


class TrainingStep:
    """One training step on synthetic samples, as the trainer makes it."""

    def __init__(self, config: ModelConfig, device: torch.device, batch: int, cached: bool) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.cached = device, batch, cached
        self.model: Any = VegaModel(config).train().to(device)
        shape = (batch, config.views, 3, config.frame_size, config.frame_size)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.prior: Tensor | None = None
        if cached:
            parts = self._float_frames().split(32)
            self.prior = torch.cat([self.model.prior(part) for part in parts])
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=device.type == "cuda")
        self.average = EMA(self.model, 0.999)
        self.state = torch.randn(batch, config.state_dim, device=device)
        self.actions = torch.randn(batch, config.chunk_size, config.action_dim, device=device)
        self.instruction = ["lift the red cube"] * batch

    def measure(self, seconds: float, start: float) -> dict[str, Any]:
        """Time the step as a whole for about `seconds`, then each stage; `start` is when building began."""
        torch.manual_seed(1)
        loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        self.step()
        row: dict[str, Any] = {"loss": loss.item(), "ready_s": time.perf_counter() - start}
        row["step_ms"] = self._time(self.step, seconds)
        row["samples_per_s"] = 1000 * self.batch / row["step_ms"]
        row |= {stage: self._time(call, seconds / 4) for stage, call in self._stages().items()}
        if self.device.type == "cuda":
            row |= kernel_fields(self.step, self.device) | {"operators": operator_times(self.step)}
        return row

    def step(self) -> None:
        """Run forward, backward and update; wait once for the device, as the trainer does."""
        loss = self.loss()
        loss.backward()
        norm = clip_gradient(self.weights, 1.0)
        read_scalars({"loss": loss.detach(), "gradient_norm": norm})
        self.update()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Return the mean loss of the batch."""
        noise, time = self.model.head.sample_noise_and_time(self.actions)
        observation = self._observation()
        return self._autocast(lambda: self.model.loss(observation, self.actions, None, noise, time).mean())

    def update(self) -> None:
        """Step the optimizer and the average of the weights."""
        self.optimizer.step()
        self.average.update(1000)

    def _stages(self) -> dict[str, Callable[[], Any]]:
        def encode() -> Tensor:
            return self._autocast(lambda: self.model.semantic_features(self._observation()))

        stages: dict[str, Callable[[], Any]] = {
            "encoder_ms": encode,
            "encoder_backward_ms": lambda: encode().float().sum().backward(),
        }
        if self.model.prior is not None and not self.cached:
            stages["prior_ms"] = lambda: self.model.prior(self._float_frames())
        stages["forward_ms"] = self.loss
        stages["forward_backward_ms"] = lambda: self.loss().backward()
        return stages | {"update_ms": self.update}

    def _observation(self) -> Observation:
        return Observation(self.frames[:, :, None], self.state, self.instruction, prior=self.prior)

    def _float_frames(self) -> Tensor:
        return to_float(self.frames[:, :, None])

    def _autocast(self, call: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return call()

    def _time(self, call: Callable[[], Any], seconds: float) -> float:
        once = busy_time(call, self.device, repeat=2)
        return busy_time(call, self.device, repeat=max(3, int(1000 * seconds / once)))
