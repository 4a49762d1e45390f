"""Parts `train`, `dataset` and `simulate`: a training step, training from stored data, environments."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vega_policy.benchmarks import busy_time, kernel_fields, operator_times
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig
from vega_policy.model.compilation import compile_blocks
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, ModelConfig, PriorConfig
from vega_policy.model.observation import Observation, to_float
from vega_policy.model.vega import VegaModel
from vega_policy.provenance import use_available_cores
from vega_policy.training.config import TrainConfig
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.logging import Progress
from vega_policy.training.optim import EMA, clip_gradient, read_scalars
from vega_policy.training.train import make_trainer

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


WARM_UP = 3
"""Steps that are not timed: workers start, pages of a mapped cache are read."""


def benchmark_dataset(options: Any, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row for training from videos, from a warm cache, and from a warm cache without a prior.

    Each is timed for about `seconds`, at least five steps. A row holds `data`, `prior`, `steps_per_s`,
    `samples_per_s` and `data_wait_percent`.
    """
    use_available_cores()
    for cache, prior in (("none", options.prior), ("ram", options.prior), ("ram", "none")):
        with tempfile.TemporaryDirectory() as folder:
            config = _train_config(options, device, cache, prior, Path(folder))
            rate = _train_steps_per_second(config, device, seconds)
        yield {
            "data": "videos" if cache == "none" else "cache",
            "prior": prior,
            "steps_per_s": rate["steps_per_s"],
            "samples_per_s": rate["steps_per_s"] * options.batch,
            "data_wait_percent": rate["data_wait_percent"],
        }


def _train_config(options: Any, device: torch.device, cache: str, prior: str, folder: Path) -> TrainConfig:
    is_frozen = "semantic" in options.cached
    sizes: dict[str, Any] = {"width": 128, "depth": 1, "heads": 4, "latents": 8} if options.small else {}
    head = ActionHeadConfig(name="l1", width=128, depth=2, heads=4) if options.small else ActionHeadConfig()
    policy = VegaConfig(
        device=device.type,
        push_to_hub=False,
        frame_size=options.frame_size,
        prior=PriorConfig(name=prior),
        backbone=BackboneConfig(freeze_image_encoder=is_frozen, freeze_text_encoder=True, **sizes),
        head=head,
    )
    dataset = DatasetConfig(
        repo_id=options.repo_id,
        root=options.root,
        cache=cache,
        cached=[name for name in options.cached if name != "prior" or prior != "none"],
        cache_root=options.cache_root,  # outlives the measured runs, so that each finds it warm
    )
    precision = "bf16" if device.type == "cuda" else "no"
    return TrainConfig(
        policy, dataset, str(folder / "run"), steps=1_000_000, batch_size=options.batch, precision=precision
    )


def _train_steps_per_second(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, float]:
    accelerator = make_accelerator(cpu=device.type == "cpu", precision=config.precision)
    trainer = make_trainer(config, accelerator, None)
    progress = Progress(trainer.run, 0, config.steps, [], shown=False)
    batches = trainer.source.stream(trainer.sampler, 0)
    step = 0
    for step in range(1, WARM_UP + 1):
        trainer.optimize(batches, progress, step)
    progress.interval()
    end = time.perf_counter() + seconds
    while step < WARM_UP + 5 or time.perf_counter() < end:
        step += 1
        progress.step(trainer.optimize(batches, progress, step))
    return progress.interval()


def benchmark_simulate(suites: list[str], frame_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row for each suite of `envs` and rendering profile: full, fast, and none (no rendering).

    The first task of a suite is timed for about `seconds` with random actions. A row holds `suite`,
    `rendering`, `cameras`, `steps_per_s` and `reset_s`.
    """
    make: Callable[..., Any] = import_module("envs").make
    for suite in suites:
        for rendering in ("full", "fast", "none"):
            is_rendered = rendering != "none"
            profile = rendering if is_rendered else "full"
            env = make(suite, 0, frame_size=frame_size, rendering=profile, render=is_rendered)
            start = time.perf_counter()
            observation, _ = env.reset(seed=0)
            reset = time.perf_counter() - start
            rate = _env_steps_per_second(env, seconds)
            env.close()
            yield {
                "suite": suite,
                "rendering": rendering,
                "cameras": len(observation["pixels"]) if is_rendered else 0,
                "steps_per_s": rate,
                "reset_s": reset,
            }


def _env_steps_per_second(env: Any, seconds: float) -> float:
    random = np.random.default_rng(0)
    env.step(np.zeros(env.action_space.shape, np.float32))  # fills caches
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(random.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        steps += 1
    return steps / (time.perf_counter() - start)
