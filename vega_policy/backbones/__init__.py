"""Vision-language backbones: one interface, one registry."""

import logging
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

from vega_policy.config import unknown_name
from vega_policy.model.config import BackboneConfig

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

VLM = "vega_policy.backbones.vlm:load"


class Backbone(Protocol):
    """Interface of a backbone."""

    width: int  # token width d
    grid: tuple[int, int]  # tokens (gh, gw) of a view
    takes_grid_only: bool  # whether it takes exactly the grid's tokens of each view
    image_encoder: Any  # the modules that `encode` runs; a cache of features depends on their weights
    encoder_name: str

    def encode(self, frames: "Tensor") -> "Tensor":
        """Return image features, frames in [0, 1], [b v 3 h w] -> [b v c gh gw]."""
        ...

    def project(self, features: "Tensor") -> "Tensor":
        """Return semantic tokens, [b v c gh gw] -> [b v n d]."""
        ...

    def pool(self, text: Any) -> "Tensor":
        """Return the instruction as one vector, [b d], for fusions that read it."""
        ...

    def encode_context(
        self, tokens: "Tensor", text: Any, state: "Tensor", features: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        """Return the context [b s d] of tokens [b v n d] and state [b s], and its mask [b s].

        `features` is the output of `encode`, for the part of it that bypasses the fusion.
        """
        ...

    def pad_instructions(self, instructions: list[str]) -> None:
        """Pad the instructions of every batch to the longest of these; none ends it."""
        ...


@dataclass(frozen=True)
class BackboneEntry:
    """A registered backbone."""

    build: str  # "module:function" that takes (config, entry, state_dim, views, frame_size)
    source: str | None = None  # hub id; None where the config's `path` has to name one, or there is none
    terms: str | None = None  # terms of use beyond a permissive licence


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
    """Build the `Backbone` that a config names.

    Raises:
        ValueError: If the name is unknown, or a size does not fit.
        FileNotFoundError: If weights are missing.
    """
    if config.name not in BACKBONES:
        raise unknown_name("backbone", config.name, sorted(BACKBONES))
    entry = BACKBONES[config.name]
    if entry.terms is not None:
        logger.warning("The weights of the backbone %r have terms of use: %s.", config.name, entry.terms)
    return resolve_name(entry.build)(config, entry, state_dim=state_dim, views=views, frame_size=frame_size)
