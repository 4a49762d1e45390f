"""Part `train`: where the time of a training step goes, with frames and a warm cache on the device."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vega_policy.benchmark.timing import busy_time
from vega_policy.model import VegaModel
from vega_policy.observation import Observation
from vega_policy.parts import ModelConfig, PriorConfig


def benchmark_train(
    config: ModelConfig, device: torch.device, batch: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Steps with live prior, with its features cached, and without a prior; each stage by stage.

    Args:
        config: The model; its weights are random.
        device: Where it runs; bfloat16 autocast on CUDA.
        batch: Samples a step.
        seconds: About how long each figure is timed.

    Yields:
        `prior`, milliseconds of each stage, of the step, and `samples_per_s`.
    """
    none = replace(config, prior=PriorConfig(name="none"))
    for case, chosen in (("live", config), ("cached", config), ("none", none)):
        yield {"prior": case} | _Step(chosen, device, batch, cached=case == "cached").row(seconds)


class _Step:
    """One training step on synthetic samples."""

    def __init__(self, config: ModelConfig, device: torch.device, batch: int, cached: bool) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.cached = device, batch, cached
        self.model: Any = VegaModel(config).train().to(device)
        parameters = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
        side = config.frame_size
        self.frames = torch.randint(
            0, 256, (batch, config.views, 1, 3, side, side), dtype=torch.uint8, device=device
        )
        self.state = torch.randn(batch, config.state_dim, device=device)
        self.actions = torch.randn(batch, config.chunk_size, config.action_dim, device=device)
        self.words = ["lift the red cube"] * batch
        self.prior: Tensor | None = None
        if cached:
            parts = self._floats().split(32)
            self.prior = torch.cat([self.model.prior(part) for part in parts])

    def row(self, seconds: float) -> dict[str, Any]:
        """Milliseconds by stage; stages are timed one by one, the step as a whole."""
        seen = self._seen()
        stages: dict[str, Callable[[], Any]] = {"encoder_ms": lambda: self._autocast(self._semantic)}
        if self.model.prior is not None and not self.cached:
            stages["prior_ms"] = lambda: self.model.prior(seen.frames)
        stages |= {"forward_ms": self._loss, "forward_backward_ms": lambda: self._loss().backward()}
        times = {stage: self._time(call, seconds) for stage, call in stages.items()}
        times["step_ms"] = self._time(self.step, seconds)
        return times | {"samples_per_s": 1000 * self.batch / times["step_ms"]}

    def step(self) -> None:
        """Forward, backward, update."""
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _time(self, call: Callable[[], Any], seconds: float) -> float:
        once = busy_time(call, self.device, repeat=2)
        return busy_time(call, self.device, repeat=max(3, int(1000 * seconds / once)))

    def _floats(self) -> Tensor:
        return self.frames.float() / 255

    def _seen(self) -> Observation:
        return Observation(self._floats(), self.state, self.words, prior=self.prior)

    def _semantic(self) -> Tensor:
        return self.model.semantic_features(self._seen())

    def _loss(self) -> Tensor:
        return self._autocast(lambda: self.model.loss(self._seen(), self.actions).mean())

    def _autocast(self, call: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return call()
