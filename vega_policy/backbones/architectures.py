"""Hugging Face backbones at their published sizes without weights, to be measured offline."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from vega_policy.backbones.vlm import VisionLanguageBackbone
from vega_policy.parts import BackboneConfig

PROMPT_TOKENS = 32
"""Assumed tokens of an instruction with what a chat template puts around it."""


@dataclass(frozen=True)
class Architecture:
    """One published model.

    Attributes:
        model_type: Its type in transformers.
        fields: Constructor arguments of its config.
        side: Tokens along a side of a frame, if the model has a fixed number of them.
        stride: Pixels a token, if the number follows the frame's size.
    """

    model_type: str
    fields: dict[str, Any]
    side: int | None = None
    stride: int | None = None

    def grid_side(self, frame_size: int) -> int:
        """Tokens along a side of a frame of so many pixels."""
        if self.side is not None:
            return self.side
        assert self.stride is not None  # one of both is given
        return round(frame_size / self.stride)


_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN2_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}

ARCHITECTURES: dict[str, Architecture] = {
    "smolvlm2_500m": Architecture(
        "smolvlm",
        {
            "text_config": {
                "model_type": "llama",
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "vocab_size": 49280,
            },
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "scale_factor": 4,
            "image_token_id": 49190,
            "pad_token_id": 2,
        },
        side=8,
    ),
    "paligemma2_3b": Architecture(
        "paligemma",
        {
            "text_config": {
                "model_type": "gemma2",
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 257216,
            },
            "vision_config": {**_SO400M, "image_size": 224, "projection_dim": 2304},
            "projection_dim": 2304,
        },
        side=16,
    ),
    "qwen2.5_vl_3b": Architecture(
        "qwen2_5_vl",
        {
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "rope_parameters": _QWEN2_ROPE,
            },
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
        },
        stride=28,
    ),
}
"""Backbone -> its published sizes."""


def without_weights(
    config: BackboneConfig,
    state_dim: int,
    views: int,
    frame_size: int,
    device: str = "meta",
    prompts: Callable[[int, int], Any] | None = None,
) -> VisionLanguageBackbone:
    """A backbone at its published sizes, frozen and adapted as its config says.

    Args:
        config: The backbone's config.
        state_dim: Width s of the proprioceptive state.
        views: Number of cameras v.
        frame_size: Side of the square frames in pixels.
        device: `meta` gives shapes and takes no memory; another one draws random weights there.
        prompts: Makes what stands in for the processor, given the tokens along a frame's side and the id of a
            placeholder; None takes `Placeholders`.

    Raises:
        ValueError: If the sizes of the backbone are not listed.
    """
    if config.name not in ARCHITECTURES:
        raise ValueError(
            f"No published sizes of the backbone {config.name!r}. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    published = ARCHITECTURES[config.name]
    architecture = AutoConfig.for_model(published.model_type, **published.fields)
    side = published.grid_side(frame_size)
    stand_in: Any = prompts or (lambda side, token: Placeholders(views, side, token))
    encoder = stand_in(side, architecture.image_token_id)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=getattr(torch, config.dtype))
        return VisionLanguageBackbone(model.base_model, encoder, config, state_dim)


class Placeholders:
    """Stands in for a processor: as many placeholders as the model has tokens of a frame.

    Args:
        views: Cameras v.
        side: Tokens along a side of a frame.
        image_token: Id of a placeholder.
    """

    picture_hash = "none"

    def __init__(self, views: int, side: int, image_token: int) -> None:
        self.views = views
        self._grid = torch.tensor([[1, 2 * side, 2 * side]] * views, device="cpu")
        self._ids = torch.full((1, views * side**2), image_token, device="cpu")
        self.processor = SimpleNamespace(image_processor=None)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Ids of the placeholders [1 v*n]."""
        return {"input_ids": self._ids, "attention_mask": torch.ones_like(self._ids)}
