"""Part `dataset`: the trainer's own steps a second, with videos decoded on the way and with a warm cache."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, PriorConfig
from vega_policy.provenance import use_available_cores
from vega_policy.training.config import DatasetConfig, TrainConfig
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.logging import Progress
from vega_policy.training.train import make_trainer

WARM_UP = 3
"""Steps before the clock runs: workers start, pages of a mapped cache are read."""


def benchmark_dataset(
    options: argparse.Namespace, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row for each way to learn from one dataset: videos, a warm cache, and that without a prior.

    Args:
        options: Those of `parts.add_options`: `root`, `repo_id`, `cache_root`, `cached`, `small`, `prior`,
            `batch`, `frame_size`.
        device: Where it runs.
        seconds: About how long each figure is timed, at least five steps.

    Yields:
        `data` (`videos`, `cache`), `prior`, `steps_per_s`, `samples_per_s` and `data_wait_percent`.
    """
    use_available_cores()
    for cache, prior in (("none", options.prior), ("ram", options.prior), ("ram", "none")):
        with tempfile.TemporaryDirectory() as folder:
            config = _run(options, device, cache, prior, Path(folder))
            rate = _steps_a_second(config, device, seconds)
        steps, waited = rate["steps_per_s"], rate["data_wait_percent"]
        yield {
            "data": "videos" if cache == "none" else "cache",
            "prior": prior,
            "steps_per_s": steps,
            "samples_per_s": steps * options.batch,
            "data_wait_percent": waited,
        }


def _run(
    options: argparse.Namespace, device: torch.device, cache: str, prior: str, folder: Path
) -> TrainConfig:
    frozen = "semantic" in options.cached
    sizes: dict[str, Any] = {"width": 128, "depth": 1, "heads": 4, "latents": 8} if options.small else {}
    head = ActionHeadConfig(name="l1", width=128, depth=2, heads=4) if options.small else ActionHeadConfig()
    policy = VegaConfig(
        device=device.type,
        push_to_hub=False,
        frame_size=options.frame_size,
        prior=PriorConfig(name=prior),
        backbone=BackboneConfig(freeze_image_encoder=frozen, freeze_text_encoder=True, **sizes),
        head=head,
    )
    cached = [name for name in options.cached if name != "prior" or prior != "none"]
    dataset = DatasetConfig(
        repo_id=options.repo_id,
        root=options.root,
        cache=cache,
        cached=cached,
        cache_root=options.cache_root,  # outlives the runs that are measured: each meets it warm
    )
    precision = "bf16" if device.type == "cuda" else "no"
    return TrainConfig(
        policy, dataset, str(folder / "run"), steps=1_000_000, batch_size=options.batch, precision=precision
    )


def _steps_a_second(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, float]:
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
        progress.step(step, trainer.optimize(batches, progress, step))
    return progress.interval()
