"""Whole models with random weights at their published sizes: no hub, and as fast as trained ones."""

from typing import Any

import torch
from torch import Tensor

from vega_policy.backbones.architectures import ARCHITECTURES, PROMPT_TOKENS, Placeholders, without_weights
from vega_policy.model import VegaModel
from vega_policy.observation import resize
from vega_policy.parts import ModelConfig
from vega_policy.priors.architectures import reader_without_weights


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
    backbone = None if config.backbone.name == "compact" else _backbone(config, device)
    if backbone is None and config.prior.name in ("none", "random", "wan_tiny", "wan_tiny_untrained"):
        return VegaModel(config).eval().to(device)
    if backbone is None:
        from vega_policy.backbones import make_backbone

        backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
    prior: Any = None
    if config.prior.name != "none":
        prior = reader_without_weights(config.prior, backbone.grid, str(device))
        if hasattr(prior, "use_engine"):
            prior.use_engine(config.prior.engine)
    return VegaModel(config, (backbone, prior)).eval().to(device)


def _backbone(config: ModelConfig, device: torch.device) -> Any:
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
