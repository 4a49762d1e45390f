"""Depthwise convolution as a sum of shifted products, which a compiler joins with what stands around it.

cuDNN has few kernels for convolutions without a sum over channels. Written as k x k shifted products, one
compiled kernel reads the input once for all of them, and the next norm and activation come for free.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.backbones.compact import replace_layers


class _Shifted(torch.autograd.Function):
    """Convolution of each channel with its own kernel, stride 1, padded to the same size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[n c h w], [c k k] -> [n c h w]."""
        ctx.save_for_backward(x, weight)
        return _correlate(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of input and weight."""
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        size = weight.shape[-1]
        seen = gradient.float()
        sums = [(seen * part.float()).sum(dim=(0, 2, 3)) for part in _shifts(x, size)]
        to_weight = torch.stack(sums, dim=1).unflatten(1, (size, size)).to(weight.dtype)
        return _correlate(gradient, weight.flip(1, 2)), to_weight


def _shifts(x: Tensor, size: int) -> list[Tensor]:
    """Views of the padded input, one for each place of the kernel, row by row, [n c h w] each."""
    height, width = x.shape[-2:]
    padded = functional.pad(x, (size // 2,) * 4)
    return [padded[:, :, i : i + height, j : j + width] for i in range(size) for j in range(size)]


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    factors = weight.float().flatten(1).unbind(dim=1)  # [c] each
    parts = [
        part.float() * factor[:, None, None]
        for part, factor in zip(_shifts(x, weight.shape[-1]), factors, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(x.dtype)


class ShiftedDepthwise(nn.Module):
    """A depthwise convolution of stride 1 without bias, its weight and its place in checkpoints kept.

    Args:
        conv: The convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c h w] in the type that autocast asks for."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Shifted.apply(x, self.weight[:, 0])  # pyright: ignore[reportReturnType]


def shift_depthwise(network: nn.Module) -> int:
    """Replace a network's depthwise convolutions of stride 1 and odd kernels by shifted products, in place.

    Args:
        network: Any network; weights keep their names.

    Returns:
        How many there were.
    """
    return replace_layers(network, lambda layer: type(layer) is nn.Conv2d and _fits(layer), ShiftedDepthwise)


def _fits(conv: nn.Conv2d) -> bool:
    size = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (size, size)
        and size % 2 == 1
        and size > 1
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (size // 2, size // 2)
        and conv.bias is None
    )
