"""The benchmark's parts and their options; each part's module is imported when it is asked for."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

PARTS = ("prior", "policy", "train", "dataset", "simulate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of all parts; a part reads those that concern it."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--output", default=None, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each figure is timed")
    prior = parser.add_argument_group("prior, policy, train")
    prior.add_argument("--prior", default="wan2.1_t2v_1.3b" if gpu else "wan_tiny", help="random weights")
    prior.add_argument("--sizes", nargs="+", default=["256x256"], help="frames, HEIGHTxWIDTH")
    prior.add_argument("--frames", nargs="+", type=int, default=[2], help="frames encoded at once")
    prior.add_argument("--paths", nargs="+", default=None, help="released all_blocks early_stop fast fp8")
    policy = parser.add_argument_group("policy, train")
    policy.add_argument("--views", type=int, default=2)
    policy.add_argument("--frame-size", type=int, default=128)
    policy.add_argument("--batch", type=int, default=256, help="samples of a training step")
    policy.add_argument("--text-encoder", default=None, help="folder of a sentence encoder's config")
    policy.add_argument("--backbone", default="compact", help="with random weights, such as smolvlm2_500m")
    policy.add_argument("--expert", default="flow", choices=["flow", "l1"])
    policy.add_argument(
        "--cases", nargs="+", default=["live", "cached", "none"], help="of the prior's features"
    )
    policy.add_argument("--variants", nargs="+", default=None, help="eager captured compiled ...")
    dataset = parser.add_argument_group("dataset")
    dataset.add_argument("--root", default="outputs/demo/demonstrations", help="a LeRobot dataset on disk")
    dataset.add_argument("--repo-id", default="vega/lift_wide", help="its name, part of a cache's key")
    dataset.add_argument("--cache-root", default="outputs/cache", help="folder of all caches")
    dataset.add_argument("--cached", nargs="+", default=["semantic", "prior"], help="frames semantic prior")
    dataset.add_argument("--small", action="store_true", help="the demo's small trunk and expert")
    simulate = parser.add_argument_group("simulate")
    simulate.add_argument("--suites", nargs="+", default=["lift_wide"])


def rows_of(part: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one part, as they are measured.

    Args:
        part: One of `PARTS`.
        options: What `add_options` parsed.
        device: Where it runs.

    Raises:
        ValueError: If a size is not HEIGHTxWIDTH in multiples of 16, or a path is unknown.
    """
    if part == "prior":
        from vega_policy.benchmark.paths import fast_path
        from vega_policy.benchmark.prior import SHAPES, benchmark_prior
        from vega_policy.benchmark.reader import benchmark_reader

        released = ["released"] if device.type == "cuda" else []
        paths = options.paths or [*released, "all_blocks", "early_stop", "fast"]
        for path in paths:
            fast_path(path)  # refuses what it does not know
        sizes = [_size(text) for text in options.sizes]
        if options.prior not in SHAPES:
            return benchmark_reader(options.prior, device, sizes, options.frames, options.seconds)
        return benchmark_prior(options.prior, device, sizes, options.frames, paths, options.seconds)
    if part == "policy":
        from vega_policy.benchmark.policy import benchmark_policy

        return benchmark_policy(_model(options), device, options.seconds)
    if part == "train":
        from vega_policy.benchmark.train import benchmark_train

        variants = options.variants or (["eager", "compiled"] if device.type == "cuda" else ["eager"])
        return benchmark_train(
            _model(options), device, options.batch, options.seconds, tuple(options.cases), tuple(variants)
        )
    if part == "dataset":
        from vega_policy.benchmark.dataset import benchmark_dataset

        return benchmark_dataset(options, device, options.seconds)
    from vega_policy.benchmark.simulate import benchmark_simulate

    return benchmark_simulate(options.suites, options.frame_size, options.seconds)


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"--sizes: expected HEIGHTxWIDTH in multiples of 16, such as 256x256; got {text!r}.")
    return int(sides[0]), int(sides[1])


def _model(options: argparse.Namespace) -> Any:
    from vega_policy.parts import ExpertConfig, ModelConfig, PriorConfig

    return ModelConfig(
        views=options.views,
        state_dim=8,
        action_dim=7,
        frame_size=options.frame_size,
        prior=PriorConfig(name=options.prior),
        backbone=_backbone(options),
        expert=ExpertConfig(name=options.expert),
    )


def _backbone(options: argparse.Namespace) -> Any:
    from vega_policy.parts import BackboneConfig

    if options.backbone != "compact":
        return BackboneConfig(name=options.backbone, pretrained=False, dtype="bfloat16")
    return BackboneConfig(pretrained=False, text_encoder=options.text_encoder, freeze_text_encoder=True)
