"""TensorFlow's padding in whole words: what lies together in memory is copied eight bytes at once.

An even frame under a convolution of stride 2 is padded on one side only, which no convolution of cuDNN's can,
so that its activations are copied first. torch would copy them one number of two bytes at a time.
"""

from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.backbones.replacing import replace_layers

WORD = torch.int64


class _PaddedWords(torch.autograd.Function):
    """Zeros around channels-last activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
        """[n c h w], (left, right, top, bottom) -> [n c h+top+bottom w+left+right]."""
        ctx.size, (left, right, top, bottom) = x.shape[-2:], sides
        ctx.first = (top, left)
        n, c, h, w = x.shape
        padded = x.new_zeros(n, h + top + bottom, w + left + right, c)
        _inside(padded, ctx.first, ctx.size).copy_(x.permute(0, 2, 3, 1).view(WORD))
        return padded.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradient of the activations."""
        gradient = gradients[0].permute(0, 2, 3, 1).contiguous()
        inside = _inside(gradient, ctx.first, ctx.size).contiguous()
        return inside.view(gradient.dtype).permute(0, 3, 1, 2), None


def _inside(padded: Tensor, first: tuple[int, int], size: torch.Size) -> Tensor:
    """The activations within their padding as words, [n h' w' c] -> [n h w c/k]."""
    (top, left), (height, width) = first, size
    return padded.view(WORD)[:, top : top + height, left : left + width]


def pad(x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    """Zeros around activations, as `functional.pad`; in whole words where channels lie together.

    Args:
        x: Activations [n c h w].
        sides: Pixels left, right, top and bottom.
    """
    words = x.shape[1] * x.element_size() % WORD.itemsize == 0
    together = x.is_contiguous(memory_format=torch.channels_last)
    if (
        not words or not together or torch.compiler.is_compiling()
    ):  # a compiler joins it with what stands around
        return functional.pad(x, sides)
    return _PaddedWords.apply(x, sides)  # pyright: ignore[reportReturnType]


class PaddedConv(nn.Module):
    """A convolution with TensorFlow's padding, its weights and their names in checkpoints kept.

    Args:
        conv: timm's `Conv2dSame`.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = conv.weight
        self.bias: nn.Parameter | None = conv.bias
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c' h' w']."""
        across = zip(x.shape[-2:], self.weight.shape[-2:], self.stride, self.dilation, strict=True)
        down, right = (int(get_same_padding(*sizes)) for sizes in across)
        sides = (right // 2, right - right // 2, down // 2, down - down // 2)
        padded = pad(x, sides) if any(sides) else x
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def pad_in_words(network: nn.Module) -> int:
    """Replace a network's convolutions with TensorFlow's padding, in place.

    Args:
        network: Any network of timm's; weights keep their names.

    Returns:
        How many there were.
    """
    return replace_layers(network, lambda layer: type(layer) is Conv2dSame, PaddedConv)
