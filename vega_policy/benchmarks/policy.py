"""Part `policy`: where each millisecond of a control step with a new chunk goes."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vega_policy.backbones.sizes import ARCHITECTURES, PROMPT_TOKENS, Placeholders, without_weights
from vega_policy.benchmarks.timing import measure
from vega_policy.model import flow
from vega_policy.model.config import ModelConfig
from vega_policy.model.cuda_graph import CapturedControlStep, capture_obstacle
from vega_policy.model.observation import Observation, resize
from vega_policy.model.vega import VegaModel
from vega_policy.priors.sizes import build_without_weights


class Pictures(Placeholders):
    """Stands in for a processor that only resizes and scales: placeholders, an instruction, pixel values.

    Args:
        views: Cameras v.
        side: Tokens along a side of a frame.
        image_token: Id of a placeholder.
        image_size: Side in pixels of the picture that the model reads.
        nested: Whether the model wants pictures grouped by sample, [1 n 3 h w].
    """

    def __init__(self, views: int, side: int, image_token: int, image_size: int, nested: bool) -> None:
        super().__init__(views, side, image_token)
        self._size, self._nested = image_size, nested
        self._ids = torch.cat([self._ids, torch.ones(1, PROMPT_TOKENS, dtype=torch.long)], dim=1)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Ids of the placeholders and of so many words, [b v*n+l], and their mask."""
        ids = self._ids.to(device).expand(len(sentences), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames in [0, 1] brought to the model's size and to [-1, 1], [n 3 h w]."""
        pixels = 2 * resize(frames, self._size, self._size) - 1
        return {"pixel_values": pixels[None] if self._nested else pixels}


def random_model(config: ModelConfig, device: torch.device) -> VegaModel:
    """A model in evaluation mode; networks that would come from the hub are drawn at random on the device.

    Args:
        config: The model.
        device: Where it goes.

    Raises:
        ValueError: If the sizes of a part are not listed, or its pictures need a processor of their own.
    """
    torch.manual_seed(0)
    backbone = None if config.backbone.name == "compact" else _measured_backbone(config, device)
    if backbone is None and config.prior.name in ("none", "random", "wan_tiny", "wan_tiny_untrained"):
        return VegaModel(config).eval().to(device)
    if backbone is None:
        from vega_policy.backbones import make_backbone

        backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
    prior: Any = None
    if config.prior.name != "none":
        prior = build_without_weights(config.prior, backbone.grid, str(device))
        if hasattr(prior, "use_engine"):
            prior.use_engine(config.prior.engine)
    return VegaModel(config, (backbone, prior)).eval().to(device)


def _measured_backbone(config: ModelConfig, device: torch.device) -> Any:
    published = ARCHITECTURES.get(config.backbone.name)
    if published is not None and published.side is None:
        raise ValueError(
            f"--backbone: {config.backbone.name!r} needs a processor of its own. Take compact or one of "
            f"{', '.join(name for name, known in ARCHITECTURES.items() if known.side is not None)}."
        )

    def prompts(side: int, image_token: int) -> Pictures:
        assert published is not None  # without_weights refuses unknown ones before it asks
        size = published.fields["vision_config"]["image_size"]
        return Pictures(config.views, side, image_token, size, nested=published.model_type == "smolvlm")

    return without_weights(
        config.backbone, config.state_dim, config.views, config.frame_size, str(device), prompts
    )


@torch.no_grad()
def benchmark_policy(config: ModelConfig, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a stage of one control step (batch 1), the whole step, and the captured one where there is one.

    Args:
        config: The model; its weights are random.
        device: Where it runs.
        seconds: About how long each stage is timed.

    Yields:
        `stage`, `p50_ms`, `p95_ms`.
    """
    model: Any = random_model(config, device)
    side = config.frame_size
    frames = torch.rand(1, config.views, 1, 3, side, side, device=device)
    state = torch.randn(1, config.state_dim, device=device)
    noise = torch.randn(1, config.chunk_size, config.action_dim, device=device)
    seen = Observation(frames, state, ["lift the red cube"])
    for stage, call in _stages(model, seen, noise).items():
        latency = measure(call, device, seconds)
        yield {"stage": stage, "p50_ms": latency.p50, "p95_ms": latency.p95}
    if capture_obstacle(model, seen, noise) is None:
        captured = CapturedControlStep(model, seen, noise)
        latency = measure(lambda: captured(seen, noise), device, seconds)
        error = (captured(seen, noise) - model.sample_actions(seen, noise)).abs().max().item()
        yield {"stage": "whole, captured", "p50_ms": latency.p50, "p95_ms": latency.p95, "error": error}


def _stages(model: Any, seen: Observation, noise: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The stages of `VegaModel.sample_actions`, each with what the one before it gave."""
    semantic = model.semantic_features(seen)
    prior = None if model.prior is None else model.prior_features(seen)
    cached = Observation(None, seen.state, seen.instruction, semantic, prior)
    tokens = model.encode_observation(cached)
    context, mask = model.backbone.encode_context(tokens, seen.instruction, seen.state, semantic)
    stages: dict[str, Callable[[], Any]] = {
        "semantic encoder": lambda: model.semantic_features(seen),
        "prior": lambda: model.prior_features(seen),
        "projectors and fusion": lambda: model.encode_observation(cached),
        "backbone": lambda: model.backbone.encode_context(tokens, seen.instruction, seen.state, semantic),
        "head": lambda: model.head.sample(context, mask, noise, flow.euler),
        "whole": lambda: model.sample_actions(seen, noise),
    }
    if model.prior is None:
        del stages["prior"]
    return stages


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
    prior.add_argument("--paths", nargs="+", default=None, help="released all_blocks early_stop fast")
    policy = parser.add_argument_group("policy, train")
    policy.add_argument("--views", type=int, default=2)
    policy.add_argument("--frame-size", type=int, default=128)
    policy.add_argument("--batch", type=int, default=256, help="samples of a training step")
    policy.add_argument("--text-encoder", default=None, help="folder of a sentence encoder's config")
    policy.add_argument("--backbone", default="compact", help="with random weights, such as smolvlm2_500m")
    policy.add_argument("--head", default="flow", choices=["flow", "l1"])
    policy.add_argument(
        "--cases", nargs="+", default=["live", "cached", "none"], help="of the prior's features"
    )
    policy.add_argument("--variants", nargs="+", default=None, help="eager compiled")
    dataset = parser.add_argument_group("dataset")
    dataset.add_argument("--root", default="outputs/demo/demonstrations", help="a LeRobot dataset on disk")
    dataset.add_argument("--repo-id", default="vega/lift_wide", help="its name, part of a cache's key")
    dataset.add_argument("--cache-root", default="outputs/cache", help="folder of all caches")
    dataset.add_argument("--cached", nargs="+", default=["semantic", "prior"], help="frames semantic prior")
    dataset.add_argument("--small", action="store_true", help="the demo's small trunk and head")
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
        from vega_policy.benchmarks.prior import WAN, benchmark_any_prior, benchmark_prior, parse_path

        released = ["released"] if device.type == "cuda" else []
        paths = options.paths or [*released, "all_blocks", "early_stop", "fast"]
        for path in paths:
            parse_path(path)  # refuses what it does not know
        sizes = [_size(text) for text in options.sizes]
        if options.prior not in WAN:
            return benchmark_any_prior(options.prior, device, sizes, options.frames, options.seconds)
        return benchmark_prior(options.prior, device, sizes, options.frames, paths, options.seconds)
    if part == "policy":
        return benchmark_policy(_model(options), device, options.seconds)
    if part == "train":
        from vega_policy.benchmarks.train import benchmark_train

        variants = options.variants or (["eager", "compiled"] if device.type == "cuda" else ["eager"])
        return benchmark_train(
            _model(options), device, options.batch, options.seconds, tuple(options.cases), tuple(variants)
        )
    if part == "dataset":
        from vega_policy.benchmarks.dataset import benchmark_dataset

        return benchmark_dataset(options, device, options.seconds)
    from vega_policy.benchmarks.simulate import benchmark_simulate

    return benchmark_simulate(options.suites, options.frame_size, options.seconds)


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"--sizes: expected HEIGHTxWIDTH in multiples of 16, such as 256x256; got {text!r}.")
    return int(sides[0]), int(sides[1])


def _model(options: argparse.Namespace) -> Any:
    from vega_policy.model.config import ActionHeadConfig, ModelConfig, PriorConfig

    return ModelConfig(
        views=options.views,
        state_dim=8,
        action_dim=7,
        frame_size=options.frame_size,
        prior=PriorConfig(name=options.prior),
        backbone=_backbone(options),
        head=ActionHeadConfig(name=options.head),
    )


def _backbone(options: argparse.Namespace) -> Any:
    from vega_policy.model.config import BackboneConfig

    if options.backbone != "compact":
        return BackboneConfig(name=options.backbone, pretrained=False, dtype="bfloat16")
    return BackboneConfig(pretrained=False, text_encoder=options.text_encoder, freeze_text_encoder=True)
