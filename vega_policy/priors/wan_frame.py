"""Wan's video encoder on a single frame: two-dimensional, with a third of the arithmetic.

A causal convolution pads the past with zeros, so in a video of one frame only the last temporal slice of each
kernel meets data, and temporal down-sampling leaves the first frame alone. What remains is a 2D network that
gives the same numbers and runs in channels-last.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
)
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def frame_convolution(conv: Any, channels: int | None = None) -> nn.Conv2d:
    """The 2D convolution that a causal 3D one is on a video of one frame.

    Args:
        conv: A convolution of Wan's autoencoder.
        channels: Output channels to keep, the first ones; None keeps all.
    """
    weight = conv.weight[:channels, :, -1]  # earlier slices meet the zeros before the first frame
    return _convolution(weight, conv.bias, conv.stride[1:], (conv._padding[2], conv._padding[0]))


def _convolution(weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> nn.Conv2d:
    size: Any = (weight.shape[1], weight.shape[0], weight.shape[2:])
    with torch.device("meta"):
        conv = nn.Conv2d(*size, stride=stride, padding=padding, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach()[: len(weight)].clone())
    return conv


class ChannelNorm(nn.Module):
    """Each pixel's channels, brought to unit root mean square and scaled.

    Args:
        norm: The norm of Wan's autoencoder.
    """

    gain: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("gain", norm.scale * norm.gamma.detach().float().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c h w]."""
        return (functional.normalize(x.float(), dim=1) * self.gain).to(x.dtype)


class FrameBlock(nn.Module):
    """Residual block: twice norm, activation, convolution.

    Args:
        block: The block of Wan's autoencoder.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(block.norm1), ChannelNorm(block.norm2)
        self.conv1, self.conv2 = frame_convolution(block.conv1), frame_convolution(block.conv2)
        self.activation = block.nonlinearity
        self.shortcut = nn.Identity()
        if isinstance(block.conv_shortcut, WanCausalConv3d):
            self.shortcut = frame_convolution(block.conv_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c' h w]."""
        hidden = self.conv1(self.activation(self.norm1(x)))
        return self.conv2(self.activation(self.norm2(hidden))) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Self-attention of one head over the pixels of the coarsest map.

    Args:
        block: The block of Wan's autoencoder.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm = ChannelNorm(block.norm)
        self.query_key_value = _pointwise(block.to_qkv)
        self.out = _pointwise(block.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c h w]."""
        tokens = rearrange(self.norm(x), "n c h w -> n 1 (h w) c")
        mixed = functional.scaled_dot_product_attention(*self.query_key_value(tokens).chunk(3, dim=-1))
        return x + rearrange(self.out(mixed), "n 1 (h w) c -> n c h w", h=x.shape[2])


def _pointwise(conv: Any) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(conv.in_channels, conv.out_channels)
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0, 0].clone())
    linear.bias = nn.Parameter(conv.bias.detach().clone())
    return linear


class FrameDownBlock(nn.Module):
    """Down-sampling block of Wan2.2: residual blocks beside an average over pixels and channels.

    The average also runs over pairs of frames; a lone frame is paired with zeros, as in a video's start.

    Args:
        block: The block of Wan2.2's autoencoder.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        down = [] if block.downsampler is None else [_resample(block.downsampler)]
        self.layers = nn.Sequential(*map(FrameBlock, block.resnets), *down)
        self.average = block.avg_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c' h/2 w/2], or [n c' h w] in the last block."""
        return self.layers(x) + self.average(x[:, :, None])[:, :, 0]


def _resample(layer: Any) -> nn.Module:
    pad, conv = layer.resample
    return nn.Sequential(pad, _convolution(conv.weight, conv.bias, conv.stride, conv.padding))


FORMS: dict[type, Callable[[Any], nn.Module]] = {
    WanResidualBlock: FrameBlock,
    WanAttentionBlock: FrameAttention,
    WanResample: _resample,
    WanResidualDownBlock: FrameDownBlock,
}
"""Layer of Wan's encoder -> what it is on a single frame."""


class FrameEncoder(nn.Module):
    """`AutoencoderKLWan.encode(...).latent_dist.mode()` for videos of one frame.

    Args:
        vae: Wan2.1's or Wan2.2's autoencoder; its weights are copied, less the slices that meet no data.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        encoder, middle = vae.encoder, vae.encoder.mid_block
        self.patch: int = vae.config.patch_size or 1
        self.dtype: torch.dtype = vae.dtype
        inner = [middle.resnets[0]]
        for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
            inner += [attention, block]
        self.layers = nn.Sequential(
            frame_convolution(encoder.conv_in),
            *(FORMS[type(layer)](layer) for layer in [*encoder.down_blocks, *inner]),
            ChannelNorm(encoder.norm_out),
            encoder.nonlinearity,
            frame_convolution(encoder.conv_out),
            frame_convolution(vae.quant_conv, channels=vae.config.z_dim),  # the mean; no variance is drawn
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Mean of the posterior, frames [n 3 h w] in [0, 1] -> [n z gh gw] in the encoder's type."""
        pixels = (2 * frames - 1).to(self.dtype)
        if self.patch > 1:
            pixels = rearrange(pixels, "n c (h q) (w r) -> n (c r q) h w", q=self.patch, r=self.patch)
        return self.layers(pixels.contiguous(memory_format=torch.channels_last))
