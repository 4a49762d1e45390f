"""Wan's causal convolutions made cheaper: on a single picture without the empty past, and channels last.

Before a clip's first picture there is nothing: a causal convolution over 3 moments then multiplies two of
them with zeros. A two-dimensional one with the kernel of the last moment gives the same numbers for a third
of the work. Each clip of Wan's autoencoder begins with such a picture.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional


def pictures_in_two_dimensions(network: Any) -> Any:
    """Let the causal convolutions of a network skip the empty past of single pictures.

    Args:
        network: An `AutoencoderKLWan`, which is changed.
    """
    for module in network.modules():
        if isinstance(module, WanCausalConv3d) and _only_sees_the_past(module):
            module.forward = _Forward(module)
    return network


def channels_last(network: Any) -> Any:
    """Lay the kernels of a network, and with them its activations, pixel by pixel in memory.

    Args:
        network: An `AutoencoderKLWan`, which is changed.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
    return network


def _only_sees_the_past(layer: WanCausalConv3d) -> bool:
    return layer._padding[4] == layer.kernel_size[0] - 1 and layer.stride[0] == 1


class _Forward:
    """`forward` of one layer."""

    def __init__(self, layer: WanCausalConv3d) -> None:
        self._layer = layer
        self._video = layer.forward

    def __call__(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        layer = self._layer
        if x.shape[2] > 1 or cache_x is not None:
            return self._video(x, cache_x)
        side, _, top, *_ = (int(width) for width in layer._padding)
        weight, stride = layer.weight[:, :, -1], (layer.stride[1], layer.stride[2])
        return functional.conv2d(x[:, :, 0], weight, layer.bias, stride, (top, side))[:, :, None]
