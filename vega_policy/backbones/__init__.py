"""Vision-language backbones: one protocol, one table.

A backbone offers

- `width`: token width d; `grid`: token grid (gh, gw) of a view; `cacheable`: whether its image encoder is
  frozen,
- `encode(frames [b v 3 h w]) -> [b v c gh gw]`: the image encoder,
- `project(features) -> [b v n d]`: the semantic stream's own projector,
- `pool(instruction) -> [b d]`: the instruction as one vector, for fusions that read it,
- `read(tokens [b v n d], instruction, state [b s]) -> (context [b s d], mask [b s])`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vega_policy.parts import BackboneConfig

BACKBONES = {"compact": "vega_policy.backbones.compact:CompactBackbone"}
"""Name -> "module:class"; the module is imported when it is asked for."""


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
        ValueError: If the name is not in the table.
    """
    if config.name not in BACKBONES:
        raise ValueError(f"Unknown backbone {config.name!r}. Known: {', '.join(sorted(BACKBONES))}.")
    module, name = BACKBONES[config.name].split(":")
    build: Callable[..., Any] = getattr(import_module(module), name)
    return build(config, state_dim=state_dim, views=views, frame_size=frame_size)
