"""Part `policy`: time of each stage of a control step that predicts a new chunk."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vega_policy.backbones import make_backbone
from vega_policy.backbones.sizes import ARCHITECTURES, PROMPT_TOKENS, Placeholders, without_weights
from vega_policy.benchmarks.timing import measure
from vega_policy.model import flow
from vega_policy.model.config import ModelConfig
from vega_policy.model.cuda_graph import CapturedControlStep, capture_obstacle
from vega_policy.model.observation import Observation, resize
from vega_policy.model.vega import VegaModel
from vega_policy.priors.sizes import build_without_weights


@torch.no_grad()
def benchmark_policy(config: ModelConfig, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row a stage of a control step (batch 1), of the whole step, and of the captured one on a GPU.

    Weights are random. A row holds `stage` and the fields of `measure`.
    """
    model: Any = random_model(config, device)
    side = config.frame_size
    frames = torch.rand(1, config.views, 1, 3, side, side, device=device)
    state = torch.randn(1, config.state_dim, device=device)
    noise = torch.randn(1, config.chunk_size, config.action_dim, device=device)
    observation = Observation(frames, state, ["lift the red cube"])
    for stage, call in _stages(model, observation, noise).items():
        yield {"stage": stage, **measure(call, device, seconds)}
    if capture_obstacle(model, observation, noise) is None:
        captured = CapturedControlStep(model, observation, noise)
        row = measure(lambda: captured(observation, noise), device, seconds)
        error = (captured(observation, noise) - model.sample_actions(observation, noise)).abs().max().item()
        yield {"stage": "whole, captured", **row, "error": error}


def _stages(model: Any, observation: Observation, noise: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the stages of `VegaModel.sample_actions`, each on the result of the one before."""
    semantic = model.semantic_features(observation)
    prior = None if model.prior is None else model.prior_features(observation)
    cached = Observation(None, observation.state, observation.instruction, semantic, prior)
    tokens = model.encode_observation(cached)
    inputs = (tokens, observation.instruction, observation.state, semantic)
    context, mask = model.backbone.encode_context(*inputs)
    stages: dict[str, Callable[[], Any]] = {
        "semantic encoder": lambda: model.semantic_features(observation),
        "prior": lambda: model.prior_features(observation),
        "projectors and fusion": lambda: model.encode_observation(cached),
        "backbone": lambda: model.backbone.encode_context(*inputs),
        "head": lambda: model.head.sample(context, mask, noise, flow.euler),
        "whole": lambda: model.sample_actions(observation, noise),
    }
    if model.prior is None:
        del stages["prior"]
    return stages


def random_model(config: ModelConfig, device: torch.device) -> VegaModel:
    """Build a model in evaluation mode; networks that would come from the hub have random weights.

    Raises:
        ValueError: If the sizes of a part are not listed, or its images need a processor of its own.
    """
    torch.manual_seed(0)
    if config.backbone.name == "compact":
        backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
    else:
        backbone = _random_backbone(config, device)
    prior: Any = None
    if config.prior.name != "none":
        prior = build_without_weights(config.prior, backbone.grid, str(device))
        if hasattr(prior, "use_engine"):
            prior.use_engine(config.prior.engine)
    return VegaModel(config, (backbone, prior)).eval().to(device)


def _random_backbone(config: ModelConfig, device: torch.device) -> Any:
    published = ARCHITECTURES.get(config.backbone.name)
    if published is not None and published.side is None:
        raise ValueError(
            f"backbone: {config.backbone.name!r} needs a processor of its own. Take compact or one of "
            f"{', '.join(name for name, known in ARCHITECTURES.items() if known.side is not None)}."
        )

    def prompts(side: int, image_token: int) -> ImagePlaceholders:
        assert published is not None  # without_weights refuses unknown ones before
        size = published.fields["vision_config"]["image_size"]
        return ImagePlaceholders(
            config.views, side, image_token, size, nested=published.model_type == "smolvlm"
        )

    return without_weights(
        config.backbone, config.state_dim, config.views, config.frame_size, str(device), prompts
    )


class ImagePlaceholders(Placeholders):
    """Stands in for a processor that only resizes and scales: placeholders, an instruction, pixel values.

    `image_size` is the side of the image that the model reads; `nested` groups images by sample, [1 n 3 h w].
    """

    def __init__(self, views: int, side: int, image_token: int, image_size: int, nested: bool) -> None:
        super().__init__(views, side, image_token)
        self._size, self._nested = image_size, nested
        self._ids = torch.cat([self._ids, torch.ones(1, PROMPT_TOKENS, dtype=torch.long)], dim=1)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return ids of the placeholders and of an instruction, [b v*n+l], and their mask."""
        ids = self._ids.to(device).expand(len(sentences), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Bring frames in [0, 1] to the model's size and to [-1, 1], [n 3 h w]."""
        pixels = 2 * resize(frames, self._size, self._size) - 1
        return {"pixel_values": pixels[None] if self._nested else pixels}
