"""Vision-language backbones: one protocol, one table.

A backbone offers

- `width`: token width d; `grid`: token grid (gh, gw) of a view,
- `one_token_a_place`: whether it takes exactly the grid's tokens of each view, no more,
- `image_encoder` and `encoder_name`: the modules that `encode` runs and what they are called, which is what a
  cache of its features depends on,
- `encode(frames [b v 3 h w]) -> [b v c gh gw]`: the image encoder,
- `project(features) -> [b v n d]`: the semantic stream's own projector,
- `pool(instruction) -> [b d]`: the instruction as one vector, for fusions that read it,
- `encode_context(tokens [b v n d], instruction, state [b s], features) -> (context [b s d], mask [b s])`;
  `features` is the output of `encode`, for the part of it that bypasses the fusion.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from vega_policy.model.config import BackboneConfig

logger = logging.getLogger(__name__)

VLM = "vega_policy.backbones.vlm:load"


@dataclass(frozen=True)
class BackboneEntry:
    """A line of the table.

    Attributes:
        build: "module:function" that takes (config, entry, state_dim, views, frame_size).
        source: Hub id of the model; None where the config's `path` has to name one, or there is none.
        terms: What is asked of a user beyond a permissive licence; None where nothing is.
    """

    build: str
    source: str | None = None
    terms: str | None = None


def _gated(source: str, licence: str) -> BackboneEntry:
    terms = f"gated, under {licence}: accept it at https://huggingface.co/{source}, then `hf auth login`"
    return BackboneEntry(VLM, source, terms)


BACKBONES: dict[str, BackboneEntry] = {
    "compact": BackboneEntry("vega_policy.backbones.compact:load"),
    "vlm": BackboneEntry(VLM),
    "smolvlm2_500m": BackboneEntry(VLM, "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
    "smolvlm2_2.2b": BackboneEntry(VLM, "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "paligemma2_3b": _gated("google/paligemma2-3b-pt-224", "the Gemma terms of use"),
    "qwen2.5_vl_3b": BackboneEntry(
        VLM, "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen Research Licence, for non-commercial use"
    ),
    "qwen3_vl_2b": BackboneEntry(VLM, "Qwen/Qwen3-VL-2B-Instruct"),
    "internvl3_1b": BackboneEntry(VLM, "OpenGVLab/InternVL3-1B-hf"),
    "gemma3_4b": _gated("google/gemma-3-4b-it", "the Gemma terms of use"),
}
"""Name -> entry. `vlm` is any image-text-to-text model of transformers, by `path`."""


def make_backbone(config: BackboneConfig, state_dim: int, views: int, frame_size: int) -> Any:
    """Build the backbone that a config names.

    Args:
        config: Name, encoders, sizes.
        state_dim: Width s of the proprioceptive state.
        views: Number of cameras v.
        frame_size: Side of the square frames in pixels.

    Returns:
        A module that satisfies the protocol of this package.

    Raises:
        ValueError: If the name is not in the table, or a size does not fit.
        FileNotFoundError: If weights are missing.
    """
    if config.name not in BACKBONES:
        near = get_close_matches(config.name, BACKBONES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown backbone {config.name!r}.{hint} Known: {', '.join(sorted(BACKBONES))}.")
    entry = BACKBONES[config.name]
    if entry.terms is not None:
        logger.warning("The weights of the backbone %r have terms of use: %s.", config.name, entry.terms)
    module, name = entry.build.split(":")
    build: Callable[..., Any] = getattr(import_module(module), name)
    return build(config, entry, state_dim=state_dim, views=views, frame_size=frame_size)
