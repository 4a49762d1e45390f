"""Layers of a network in the place of others, weights and their names in checkpoints kept."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_layers(network: nn.Module, fits: Callable[[Any], bool], make: Callable[[Any], nn.Module]) -> int:
    """Put other layers in the place of those that fit.

    Args:
        network: Any network, which is changed.
        fits: Whether a layer is replaced.
        make: Makes what stands in its place; it keeps the weights under their names.

    Returns:
        How many there were.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if fits(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)
