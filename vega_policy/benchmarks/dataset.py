"""Parts `dataset` and `simulate`: steps a second of training from stored data, and of environments."""

import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, PriorConfig
from vega_policy.provenance import use_available_cores
from vega_policy.training.config import TrainConfig
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.logging import Progress
from vega_policy.training.train import make_trainer

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
