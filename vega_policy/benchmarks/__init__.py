"""Time of each part on this machine; a part yields rows of plain values."""

from collections.abc import Iterator
from typing import Any

import torch

from vega_policy.model.config import ActionHeadConfig, BackboneConfig, ModelConfig, PriorConfig

PARTS = ("prior", "policy", "train", "dataset", "simulate")


def benchmark(part: str, options: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure one part of `PARTS` and yield its rows; `options` has the fields of the command.

    Raises:
        ValueError: If a size is not HEIGHTxWIDTH in multiples of 16, or a path, case or variant is unknown.
    """
    if part == "prior":
        from vega_policy.benchmarks.prior import WAN, benchmark_any_prior, benchmark_prior, parse_path

        released = ["released"] if device.type == "cuda" else []
        paths = options.paths or [*released, "all_blocks", "early_stop", "fast"]
        for path in paths:
            parse_path(path)  # refuses unknown ones before anything is measured
        sizes = [parse_size(text) for text in options.sizes]
        if options.prior not in WAN:
            return benchmark_any_prior(options.prior, device, sizes, options.frames, options.seconds)
        return benchmark_prior(options.prior, device, sizes, options.frames, paths, options.seconds)
    if part == "policy":
        from vega_policy.benchmarks.policy import benchmark_policy

        return benchmark_policy(model_config(options), device, options.seconds)
    if part == "train":
        from vega_policy.benchmarks.train import benchmark_train

        variants = options.variants or (["eager", "compiled"] if device.type == "cuda" else ["eager"])
        config, cases = model_config(options), tuple(options.cases)
        return benchmark_train(config, device, options.batch, options.seconds, cases, tuple(variants))
    if part == "dataset":
        from vega_policy.benchmarks.dataset import benchmark_dataset

        return benchmark_dataset(options, device, options.seconds)
    from vega_policy.benchmarks.dataset import benchmark_simulate

    return benchmark_simulate(options.suites, options.frame_size, options.seconds)


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of a size such as `256x256`."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"sizes: expected HEIGHTxWIDTH in multiples of 16, such as 256x256; got {text!r}.")
    return int(sides[0]), int(sides[1])


def model_config(options: Any) -> ModelConfig:
    """Return the model of the parts `policy` and `train`, without pre-trained weights."""
    backbone = BackboneConfig(pretrained=False, text_encoder=options.text_encoder, freeze_text_encoder=True)
    if options.backbone != "compact":
        backbone = BackboneConfig(name=options.backbone, pretrained=False, dtype="bfloat16")
    return ModelConfig(
        views=options.views,
        state_dim=8,
        action_dim=7,
        frame_size=options.frame_size,
        prior=PriorConfig(name=options.prior),
        backbone=backbone,
        head=ActionHeadConfig(name=options.head),
    )
