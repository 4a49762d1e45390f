"""The exact reductions of a Wan prior.

A robot sees new frames at every step, but of one size, at one noise level and with one prompt. `FastWan` is
the prior for just that: the encoder of `wan_frame`, the transformer of `wan_fixed`. Its features are the
plain path's up to rounding (1e-5 in float32). `wan_captured` compiles it for one batch and replays it as one
CUDA graph; `wan_engine` chooses.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
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
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]
"""Cosine and signed sine of each token's rotation, [n 1 e] float32, e the width of a head."""


class SelfAttention(nn.Module):
    """Self-attention with one product for query, key and value.

    Rotary pairs (2i, 2i + 1) are moved to (i, i + e/2), in queries and keys alike, which no scalar product
    notices and contiguous reads like.

    Args:
        attention: `attn1` of Wan's block.
    """

    norms: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.eps: float = attention.norm_q.eps
        order = apart(attention.inner_dim, attention.heads)
        query, key, value = attention.to_q, attention.to_k, attention.to_v
        weights = [query.weight.detach()[order], key.weight.detach()[order], value.weight.detach()]
        biases = [query.bias.detach()[order], key.bias.detach()[order], value.bias.detach()]
        gains = [norm.weight.detach().float()[order] for norm in (attention.norm_q, attention.norm_k)]
        self.product = linear(torch.cat(weights), torch.cat(biases))
        self.register_buffer("norms", torch.stack(gains))
        self.out = attention.to_out[0]

    def forward(self, tokens: Tensor, rotary: Rotary) -> Tensor:
        """[b n d] -> [b n d]."""
        query, key, value = self.product(tokens).chunk(3, dim=-1)
        query, key = (
            rotate(self._heads(functional.rms_norm(x.float(), x.shape[-1:], gain, self.eps)), rotary)
            for x, gain in ((query, self.norms[0]), (key, self.norms[1]))
        )
        query, key, value = (x.to(tokens.dtype).transpose(1, 2) for x in (query, key, self._heads(value)))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer that holds these very tensors, [out in] and [out]."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def apart(width: int, heads: int) -> Tensor:
    """Order of rows that moves each head's even ones before its odd ones, [d]."""
    return rearrange(torch.arange(width), "(k e two) -> (k two e)", k=heads, two=2)


def rotary_tables(transformer: Any, latent: Tensor) -> Rotary:
    """Rotations of all tokens of a latent [1 z 1 h w], in the order of `apart`."""
    cosine, sine = (table[0, :, :, 0::2].float() for table in transformer.rope(latent))  # [n 1 e/2]
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (i, i + e/2) by its token's angle, [b n k e] -> [b n k e]."""
    cosine, sine = rotary
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cosine + swapped * sine


class PromptAttention(nn.Module):
    """Cross-attention to a constant prompt of n tokens and its padding.

    Args:
        attention: `attn2` of Wan's block.
        prompt: The prompt's tokens after the text embedding and, last, the padding's one token, [n+1 d].
        padding: How many padding tokens there are.
    """

    keys: Tensor
    table: Tensor
    constant: Tensor

    def __init__(self, attention: Any, prompt: Tensor, padding: int) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.eps: float = attention.norm_q.eps
        self.query = attention.to_q
        self.padding = padding
        key, value = prompt_keys_values(attention, prompt)  # [n+1 k e]
        gain = attention.norm_q.weight.detach().float().unflatten(0, (self.heads, -1))
        out = attention.to_out[0]
        output = out.weight.detach().float().unflatten(1, (self.heads, -1))  # [d k e]
        rows = torch.einsum("jke,dke->kjd", value, output)
        self.register_buffer("keys", (key[:-1] - key[-1:]) * gain / math.sqrt(key.shape[-1]))  # [n k e]
        self.register_buffer("table", (rows[:, :-1] - rows[:, -1:]).flatten(0, 1).to(out.weight.dtype))
        self.register_buffer("constant", rows[:, -1].sum(dim=0) + out.bias.detach().float())

    def forward(self, tokens: Tensor) -> Tensor:
        """What the prompt adds to each token, [b n d] -> [b n d] float32."""
        query = functional.rms_norm(self.query(tokens).float(), tokens.shape[-1:], eps=self.eps)
        query = query.unflatten(-1, (self.heads, -1))
        logits = torch.stack([(query * key).sum(dim=-1) for key in self.keys], dim=-1)  # [b n k j]
        weights = padded_softmax(logits, self.padding).flatten(-2).to(self.table.dtype)
        return weights @ self.table + self.constant


def prompt_keys_values(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a constant prompt in float32, [n d] -> [n k e] twice."""
    key, value = (
        functional.linear(prompt, layer.weight.detach().float(), layer.bias.detach().float())
        for layer in (attention.to_k, attention.to_v)
    )
    gain = attention.norm_k.weight.detach().float()
    key = functional.rms_norm(key, key.shape[-1:], gain, attention.norm_k.eps)
    return key.unflatten(-1, (attention.heads, -1)), value.unflatten(-1, (attention.heads, -1))


def padded_softmax(logits: Tensor, padding: int) -> Tensor:
    """Softmax over n keys and `padding` further ones whose logit is zero, [... n] -> [... n].

    The n weights that it returns sum to less than one: the padding holds the rest.
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    blank = math.log(padding) if padding else -math.inf
    return torch.softmax(logits, dim=-1) * torch.sigmoid(total - blank)


class FixedBlock(nn.Module):
    """A block of Wan's transformer at one noise level and one prompt.

    It hands on its last sum unadded, so that a compiler can join it with the next block's norm.

    Args:
        block: The block of Wan's transformer.
        modulation: What the noise level adds to the block's own table, [6 d] float32.
        prompt: As `PromptAttention` takes it.
        padding: How many padding tokens there are.
        entry_gate: Gate of the sum that the block before left to this one, [d] float32.
    """

    entry_gate: Tensor
    modulation: Tensor

    def __init__(
        self, block: Any, modulation: Tensor, prompt: Tensor, padding: int, entry_gate: Tensor
    ) -> None:
        super().__init__()
        self.eps: float = block.norm1.eps
        scales = modulation + block.scale_shift_table.detach()[0].float()
        scales = scales + torch.tensor([0.0, 1, 0, 0, 1, 0], device=scales.device)[:, None]
        self.register_buffer("modulation", scales)
        self.register_buffer("entry_gate", entry_gate)
        self.attention = SelfAttention(block.attn1)
        self.norm = block.norm2
        self.prompt = PromptAttention(block.attn2, prompt, padding)
        self.widen, self.narrow = block.ffn.net[0].proj, block.ffn.net[2]

    def forward(self, tokens: Tensor, pending: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Tokens and what is still to be added to them, [b n d] twice -> [b n d] twice."""
        shift, scale, gate, mlp_shift, mlp_scale, _ = self.modulation
        tokens = gated_sum(tokens, pending, self.entry_gate)
        normed = self._normed(tokens, scale, shift)
        tokens = gated_sum(tokens, self.attention(normed, rotary), gate)
        normed = self.norm(tokens.float()).to(tokens.dtype)
        tokens = (tokens + self.prompt(normed)).to(tokens.dtype)
        normed = self._normed(tokens, mlp_scale, mlp_shift)
        return tokens, self.narrow(widened(normed, self.widen))

    def _normed(self, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(tokens.float(), scale.shape, scale, shift, self.eps).to(tokens.dtype)


def gated_sum(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Sum `tokens + gate update` in float32, [b n d] in the tokens' type."""
    return torch.addcmul(tokens.float(), update.float(), gate).to(tokens.dtype)


def widened(tokens: Tensor, layer: Any) -> Tensor:
    """Linear layer and approximate GELU; on CUDA in one product whose result is written once."""
    if not tokens.is_cuda:
        return functional.gelu(layer(tokens), approximate="tanh")
    flat = torch._addmm_activation(layer.bias, tokens.flatten(0, 1), layer.weight.t(), use_gelu=True)
    return flat.unflatten(0, tokens.shape[:2])


class FixedTransformer(nn.Module):
    """Output of the last block for a noised latent of one frame, at one noise level and one prompt.

    Args:
        transformer: Wan's transformer, cut behind the block that is read.
        prompt: The prompt's embedding, padded with zeros, [m d_text].
        noise_level: Share of noise in [0, 1].
        size: Height and width of the latent.
    """

    cosine: Tensor
    sine: Tensor
    exit_gate: Tensor

    def __init__(self, transformer: Any, prompt: Tensor, noise_level: float, size: tuple[int, int]) -> None:
        super().__init__()
        embed = transformer.patch_embedding
        self.dtype: torch.dtype = transformer.dtype
        self.patch: tuple[int, int] = tuple(embed.kernel_size[1:])
        self.weight, self.bias = embed.weight, embed.bias
        text, padding = embedded_prompt(transformer, prompt)
        modulation = constant_modulation(transformer, noise_level)
        gate = torch.ones_like(modulation[0])
        self.blocks = nn.ModuleList()
        for block in transformer.blocks:
            fixed = FixedBlock(block, modulation, text, padding, gate)
            self.blocks.append(fixed)
            gate = fixed.modulation[5]
        self.register_buffer("exit_gate", gate)
        latent = torch.empty(1, embed.in_channels, 1, *size, device=prompt.device)
        cosine, sine = rotary_tables(transformer, latent)
        self.register_buffer("cosine", cosine)
        self.register_buffer("sine", sine)

    def forward(self, latent: Tensor) -> Tensor:
        """Noised latent [b z h w] -> tokens [b n d] behind the last block."""
        return self.run(self.embed(latent), list(self.blocks))

    def embed(self, latent: Tensor) -> Tensor:
        """Noised latent [b z h w] -> tokens [b n d] before the first block."""
        (q, r) = self.patch
        patches = rearrange(latent.to(self.dtype), "b z (h q) (w r) -> b (h w) (z q r)", q=q, r=r)
        return functional.linear(patches, self.weight.flatten(1), self.bias)

    def run(self, tokens: Tensor, blocks: Sequence[Callable[..., tuple[Tensor, Tensor]]]) -> Tensor:
        """The blocks, as they are or compiled, [b n d] -> [b n d]."""
        pending, tokens = tokens, torch.zeros_like(tokens)
        for block in blocks:
            tokens, pending = block(tokens, pending, (self.cosine, self.sine))
        return gated_sum(tokens, pending, self.exit_gate)


def constant_modulation(transformer: Any, noise_level: float) -> Tensor:
    """What the noise level adds to the shift, scale and gate tables of all blocks, [6 d] float32."""
    embedder = transformer.condition_embedder
    device = embedder.time_proj.weight.device
    time = embedder.timesteps_proj(torch.tensor([1000 * noise_level], device=device))
    time = _linear(embedder.time_embedder.linear_1, time.float())
    time = _linear(embedder.time_embedder.linear_2, functional.silu(time))
    return _linear(embedder.time_proj, functional.silu(time)).reshape(6, -1)


def embedded_prompt(transformer: Any, prompt: Tensor) -> tuple[Tensor, int]:
    """The prompt after the text embedding with one token for all its padding.

    Args:
        transformer: Wan's transformer.
        prompt: The prompt's embedding, padded with zeros, [m d_text].

    Returns:
        Tokens [n+1 d] float32, the last one the padding's, and the number m - n of padding tokens.
    """
    filled = prompt.float().abs().amax(dim=1).nonzero()
    n = int(filled.max()) + 1 if len(filled) else 1
    embedder = transformer.condition_embedder.text_embedder
    words = functional.pad(prompt[:n].float(), (0, 0, 0, 1))
    hidden = functional.gelu(_linear(embedder.linear_1, words), approximate="tanh")
    return _linear(embedder.linear_2, hidden), len(prompt) - n


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.detach().float(), layer.bias.detach().float())


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


def obstacle(prior: Any) -> str | None:
    """Why a prior has no fast form, or None if it has one.

    Args:
        prior: A `LatentWorldSimulator`.
    """
    vae, transformer = prior.vae, prior.transformer
    if (type(vae), type(transformer)) != (AutoencoderKLWan, WanTransformer3DModel):
        return f"its networks are {type(vae).__name__} and {type(transformer).__name__}, not Wan's own"
    if vae.use_tiling:
        return "its autoencoder works in tiles"
    if transformer.config.patch_size[0] != 1:
        return f"its patches span {transformer.config.patch_size[0]} frames"
    if transformer.config.added_kv_proj_dim is not None:
        return "its transformer also attends to a reference image"
    return None


class FastWan(nn.Module):
    """A Wan prior for one frame size, noise level and prompt; batches of any length.

    Weights that the reductions leave alone are shared with the prior, the others are copied.

    Args:
        prior: A `LatentWorldSimulator` that `obstacle` finds nothing wrong with.

    Raises:
        ValueError: If the prior has no fast form.
    """

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __init__(self, prior: Any) -> None:
        super().__init__()
        reason = obstacle(prior)
        if reason is not None:
            raise ValueError(
                f"prior.engine=fast: this prior has no fast form: {reason}. Take prior.engine=plain."
            )
        self.noise_level: float = prior.noise_level
        self.frame: tuple[int, int] = prior.input_size
        scale = prior.vae.spatial_compression_ratio
        size = (self.frame[0] // scale, self.frame[1] // scale)
        self.encoder = FrameEncoder(prior.vae)
        self.transformer = FixedTransformer(prior.transformer, prior.prompt[0], self.noise_level, size)
        self.latent: tuple[int, ...] = (len(prior.latents_mean), 1, *size)
        self.rows = size[0] // self.transformer.patch[0]
        self.register_buffer("mean", prior.latents_mean[:, 0])
        self.register_buffer("std", prior.latents_std[:, 0])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """Features of single frames on the prior's own grid.

        Args:
            frames: Frames [n 3 h w], float32 in [0, 1].
            noise: Standard normal noise [z 1 gh gw] or [n z 1 gh gw] float32.
            noise_level: The level that the caller means, which must be the engine's.

        Returns:
            Features [n d gh gw] in the prior's floating-point type.

        Raises:
            ValueError: If shape, type, device or noise level are not those it was built for.
        """
        self.check(frames, noise, noise_level)
        tokens = self.enter(self.encoder(frames), noise)
        return self.leave(self.transformer.run(tokens, self.blocks))

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks."""
        return list(self.transformer.blocks)

    def enter(self, means: Tensor, noise: Tensor) -> Tensor:
        """From the encoder's means to the transformer's first tokens, [n z gh gw] -> [n m d]."""
        latent = (means.float() - self.mean) / self.std
        return self.transformer.embed((1 - self.noise_level) * latent + self.noise_level * noise.squeeze(-3))

    def leave(self, tokens: Tensor) -> Tensor:
        """[n m d] -> [n d gh gw]."""
        return rearrange(tokens, "n (gh gw) d -> n d gh gw", gh=self.rows)

    def check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        """Refuse what the engine was not built for; see `forward`."""
        expected = (3, *self.frame)
        if frames.ndim != 4 or tuple(frames.shape[1:]) != expected:
            refuse("frames", f"[n {' '.join(map(str, expected))}]", list(frames.shape))
        if tuple(noise.shape) not in (self.latent, (len(frames), *self.latent)):
            refuse("noise", f"{list(self.latent)} or {[len(frames), *self.latent]}", list(noise.shape))
        if frames.dtype != torch.float32 or noise.dtype != torch.float32:
            refuse("frames and noise", "float32", f"{frames.dtype} and {noise.dtype}")
        if frames.device != self.mean.device:
            refuse("frames", f"on {self.mean.device}", f"frames on {frames.device}")
        if noise_level != self.noise_level:
            refuse("a noise level", str(self.noise_level), noise_level)


def refuse(what: str, expected: str, found: Any) -> None:
    """Say what the engine was built for and what came instead."""
    raise ValueError(
        f"This engine was built for {what} {expected}; got {found}. Build the prior for it, or take "
        "prior.engine=plain, which takes what comes."
    )


WARM_UP = 3
"""Runs before a capture; in them libraries choose their kernels."""

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Attention kernels by speed on a few hundred tokens of an H100; torch itself starts with flash."""


@dataclass(frozen=True)
class Plan:
    """How a captured prior goes about its batch; nothing of it changes what is computed.

    Attributes:
        encode_at_once: Frames that the encoder takes at once; None takes all. Fewer stay in the GPU's cache.
        read_at_once: Frames that the transformer takes at once; None takes all.
        attention: The attention kernel that is tried first, of `ATTENTION`.
    """

    encode_at_once: int | None = None
    read_at_once: int | None = None
    attention: str = "cudnn"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is one of {', '.join(ATTENTION)}; got {self.attention!r}.")
        for count in (self.encode_at_once, self.read_at_once):
            if count is not None and count < 1:
                raise ValueError(f"At least one frame is taken at once; got {count}.")

    @property
    def kernels(self) -> list[SDPBackend]:
        """All attention kernels, the chosen one first."""
        return [ATTENTION[self.attention], *(k for name, k in ATTENTION.items() if name != self.attention)]


class CapturedWan:
    """A `FastWan` compiled for one batch size and captured as one CUDA graph.

    Blocks share one compiled function, so that building takes seconds, not minutes. Products are left to
    cuBLAS: the compiler's own, tuned for two minutes, were slower.

    Args:
        fast: The reductions, on a CUDA device.
        frames: Frames of the batch it is built for, [n 3 h w].
        noise: Their noise, [z 1 gh gw] or [n z 1 gh gw].
        plan: How the batch is gone about; None takes all of it at once.
    """

    def __init__(self, fast: FastWan, frames: Tensor, noise: Tensor, plan: Plan | None = None) -> None:
        fast.check(frames, noise, fast.noise_level)
        self.fast, self.batch, self.plan = fast, len(frames), plan or Plan()
        self._frames = frames.clone()
        self._noise = noise.expand(len(frames), *fast.latent).clone()
        compiled: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._encode, self._enter = (
            torch.compile(fast.encoder, **compiled),
            torch.compile(fast.enter, **compiled),
        )
        self.blocks: list[Any] = [torch.compile(block, **compiled) for block in fast.blocks]
        self._graph, self._features = capture(lambda: self.inline(self._frames, self._noise), self.plan)

    @torch.no_grad()
    def __call__(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As `FastWan.forward`, for batches of the captured length only."""
        self._check(frames, noise, noise_level)
        self._frames.copy_(frames)
        self._noise.copy_(noise)
        self._graph.replay()
        return self._features.clone()

    def _check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        self.fast.check(frames, noise, noise_level)
        if len(frames) != self.batch:
            refuse("batches of", f"{self.batch} frames", f"{len(frames)}")

    def nested(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As a call, without a graph of its own, to be captured in a larger one."""
        self._check(frames, noise, noise_level)
        return self.inline(frames, noise)

    def inline(self, frames: Tensor, noise: Tensor) -> Tensor:
        """The compiled work without a graph of its own, to be captured in a larger one."""
        return self.fast.leave(self.read(self.enter(frames, noise)))

    def enter(self, frames: Tensor, noise: Tensor) -> Tensor:
        """From frames to the transformer's first tokens, [n 3 h w] -> [n m d]."""
        parts = [self._encode(part) for part in frames.split(self.plan.encode_at_once or len(frames))]
        means = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._enter(means, noise.expand(len(frames), *self.fast.latent).contiguous())

    def read(self, tokens: Tensor) -> Tensor:
        """The compiled blocks, [n m d] -> [n m d]."""
        run, blocks = self.fast.transformer.run, self.blocks
        parts = [run(part, blocks) for part in tokens.split(self.plan.read_at_once or len(tokens))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def capture(run: Callable[[], Tensor], plan: Plan | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what a function does on the GPU; its inputs and its result stay where they are.

    Args:
        run: The work, without arguments and without synchronisation.
        plan: Says which attention kernel is tried first.

    Returns:
        The graph, and the tensor that each replay writes.
    """
    kernels = (plan or Plan()).kernels
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), sdpa_kernel(kernels, set_priority=True):
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result


class Engine:
    """What a prior with `engine` fast or auto runs: reductions, captured for the first batch met on CUDA.

    A graph holds for one batch size. Of later sizes `fast` refuses, while `auto` runs the same reductions
    uncompiled: no call but the first waits for a compiler.

    Args:
        prior: A `LatentWorldSimulator`.
        strict: Whether other batch sizes are refused on CUDA.
    """

    def __init__(self, prior: Any, strict: bool) -> None:
        self.fast = FastWan(prior)
        self.latent = self.fast.latent
        self.nested = False  # inside somebody else's capture a graph cannot be replayed
        self._strict = strict
        self._captured: CapturedWan | None = None

    def __call__(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As `FastWan.forward`."""
        run: Callable[[Tensor, Tensor, float], Tensor] = self.fast
        if frames.is_cuda:
            if self._captured is None:
                logger.info("Building the prior for batches of %d frames; this takes a while.", len(frames))
                self._captured = CapturedWan(self.fast, frames, noise)
            if self._strict or len(frames) == self._captured.batch:
                run = self._captured.nested if self.nested else self._captured
        return run(frames, noise, noise_level)


def make_engine(prior: Any, engine: str) -> Engine | None:
    """The engine a prior runs on; None stands for the plain path.

    Args:
        prior: A `LatentWorldSimulator`.
        engine: `plain`, `fast` or `auto`.

    Raises:
        ValueError: If `fast` is required and the prior has no fast form.
    """
    if engine == "plain":
        return None
    reason = obstacle(prior)
    if engine == "auto" and reason is not None:
        logger.info("prior.engine=auto takes the plain path: %s.", reason)
        return None
    made = Engine(prior, strict=engine == "fast")
    logger.info(
        "prior.engine=%s: exact reductions for frames of %dx%d, noise level %g.",
        engine,
        *made.fast.frame,
        made.fast.noise_level,
    )
    return made
