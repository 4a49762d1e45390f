"""Exact, faster form of a Wan prior for one frame size, one noise level and one prompt.

A robot's frames change at every step; their size, the noise level and the prompt do not. What depends on
these alone is computed once, and what they make zero or equal is left out. Features equal those of the plain
path up to rounding (1e-5 in float32):

- One noise level: the time embedding, and with it every shift, scale and gate, is constant (`FixedBlock`).
  With `clip=future` there are two, that of the clean frame and that of the slots behind it.
- One prompt: keys and values of cross-attention are constant. Its padding tokens are all equal, so that one
  token with a counted weight stands for them, and the output projection folds into the values
  (`PromptAttention`). Where each sample has its instruction, only the counting remains (`WordAttention`).
- One frame: a causal 3D convolution sees zeros before it, so that a 2D convolution remains (`FrameEncoder`).
- Query, key and value are one product, and rotary pairs are reordered to contiguous halves (`SelfAttention`).

`FastWan` combines these, `CapturedWan` compiles them for one batch size and replays them as one CUDA graph;
`wan.make_engine` chooses what a prior runs on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from vega_policy.config import check_choices, check_numbers
from vega_policy.priors.base import PROMPT_LENGTH

Rotary = tuple[Tensor, Tensor]
"""Cosine and signed sine of each token's rotation, [n 1 e] float32, e the width of a head."""


# The transformer's blocks


class SelfAttention(nn.Module):
    """Self-attention (`attn1` of Wan's block) with one product for query, key and value.

    Rotary pairs (2i, 2i + 1) move to (i, i + e/2) in queries and keys alike, which leaves scalar products
    unchanged and makes reads contiguous.
    """

    norms: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.eps: float = attention.norm_q.eps
        order = split_pairs(attention.inner_dim, attention.heads)
        query, key, value = attention.to_q, attention.to_k, attention.to_v
        weights = [query.weight.detach()[order], key.weight.detach()[order], value.weight.detach()]
        biases = [query.bias.detach()[order], key.bias.detach()[order], value.bias.detach()]
        gains = [norm.weight.detach().float()[order] for norm in (attention.norm_q, attention.norm_k)]
        self.product = make_linear(torch.cat(weights), torch.cat(biases))
        self.register_buffer("norms", torch.stack(gains))
        self.out = attention.to_out[0]

    def forward(self, tokens: Tensor, rotary: Rotary) -> Tensor:
        """[b n d] -> [b n d]."""
        query, key, value = self.product(tokens).chunk(3, dim=-1)
        query, key = (
            rotate(self._split_heads(functional.rms_norm(x.float(), x.shape[-1:], gain, self.eps)), rotary)
            for x, gain in ((query, self.norms[0]), (key, self.norms[1]))
        )
        query, key, value = (
            x.to(tokens.dtype).transpose(1, 2) for x in (query, key, self._split_heads(value))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


def make_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a linear layer that holds these very tensors, [out in] and [out]."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def split_pairs(width: int, heads: int) -> Tensor:
    """Return the order of rows that moves each head's even ones before its odd ones, [d]."""
    return rearrange(torch.arange(width), "(k e two) -> (k two e)", k=heads, two=2)


def rotary_tables(transformer: Any, latent: Tensor) -> Rotary:
    """Return the rotations of all tokens of a latent [1 z 1 h w], in the order of `split_pairs`."""
    cosine, sine = (table[0, :, :, 0::2].float() for table in transformer.rope(latent))  # [n 1 e/2]
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each pair (i, i + e/2) by its token's angle, [b n k e] -> [b n k e]."""
    cosine, sine = rotary
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cosine + swapped * sine


class PromptAttention(nn.Module):
    """Cross-attention (`attn2` of Wan's block) to a constant prompt of n tokens and `padding` equal ones.

    `prompt` holds the tokens after the text embedding and, last, that of the padding, [n+1 d]. Logits are
    taken relative to the padding's key k_0, and with its value v_0 the output is v_0 + sum_j w_j (v_j - v_0):
    keys and values are stored as differences.
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
        """Return what the prompt adds to each token, [b n d] -> [b n d] float32."""
        query = functional.rms_norm(self.query(tokens).float(), tokens.shape[-1:], eps=self.eps)
        query = query.unflatten(-1, (self.heads, -1))
        logits = torch.stack([(query * key).sum(dim=-1) for key in self.keys], dim=-1)  # [b n k j]
        weights = padded_softmax(logits, self.padding).flatten(-2).to(self.table.dtype)
        return weights @ self.table + self.constant


Words = tuple[Tensor, Tensor]
"""Instructions of b samples: words [b w d_text] padded with zeros, and their number in each, [b] float32."""


class WordAttention(nn.Module):
    """Cross-attention (`attn2` of Wan's block) to each sample's words and to one counted padding token."""

    gains: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.eps: float = attention.norm_q.eps
        self.query, self.key, self.value, self.out = (
            attention.to_q,
            attention.to_k,
            attention.to_v,
            attention.to_out[0],
        )
        gains = [norm.weight.detach().float() for norm in (attention.norm_q, attention.norm_k)]
        self.register_buffer("gains", torch.stack(gains))

    def forward(self, tokens: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        """Tokens [b n d], words after the text embedding [b m d], bias of their logits [b m] -> [b n d]."""
        query, key = (
            functional.rms_norm(x.float(), x.shape[-1:], gain, self.eps).to(tokens.dtype)
            for x, gain in ((self.query(tokens), self.gains[0]), (self.key(words), self.gains[1]))
        )
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, self.value(words))
        )
        mask = bias[:, None, None].to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def prompt_keys_values(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of a constant prompt in float32, [n d] -> [n k e] twice."""
    key, value = float_linear(attention.to_k, prompt), float_linear(attention.to_v, prompt)
    gain = attention.norm_k.weight.detach().float()
    key = functional.rms_norm(key, key.shape[-1:], gain, attention.norm_k.eps)
    return key.unflatten(-1, (attention.heads, -1)), value.unflatten(-1, (attention.heads, -1))


def padded_softmax(logits: Tensor, padding: int) -> Tensor:
    """Softmax over n keys and `padding` further ones whose logit is zero, [... n] -> [... n].

    The n weights sum to less than one: the padding holds the rest.
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    blank = math.log(padding) if padding else -math.inf
    return torch.softmax(logits, dim=-1) * torch.sigmoid(total - blank)


class FixedBlock(nn.Module):
    """A block of Wan's transformer at one noise level and one prompt, or without `prompt` at instructions.

    It returns its last sum unadded, so that a compiler can join it with the next block's norm. `modulation`
    [6 d] float32 is what the noise level adds to the block's own table, `entry_gate` [d] float32 the gate of
    the sum that the previous block left. With `levels` [n], the number of each token's noise level, both have
    a leading axis of the levels.
    """

    entry_gate: Tensor
    modulation: Tensor
    levels: Tensor | None

    def __init__(
        self,
        block: Any,
        modulation: Tensor,
        prompt: tuple[Tensor, int] | None,
        entry_gate: Tensor,
        levels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.eps: float = block.norm1.eps
        scales = modulation + block.scale_shift_table.detach()[0].float()
        scales = scales + torch.tensor([0.0, 1, 0, 0, 1, 0], device=scales.device)[:, None]
        self.register_buffer("modulation", scales)
        self.register_buffer("entry_gate", entry_gate)
        self.attention = SelfAttention(block.attn1)
        self.norm = block.norm2
        self.prompt: Any = (
            WordAttention(block.attn2) if prompt is None else PromptAttention(block.attn2, *prompt)
        )
        self.widen, self.narrow = block.ffn.net[0].proj, block.ffn.net[2]

    def forward(
        self, tokens: Tensor, pending: Tensor, rotary: Rotary, words: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Map tokens and what is still to be added to them, [b n d] twice -> [b n d] twice."""
        # each [d], or [n d] where tokens differ in noise level
        shift, scale, gate, mlp_shift, mlp_scale, _ = by_token(self.modulation, self.levels).unbind(dim=-2)
        tokens = gated_sum(tokens, pending, by_token(self.entry_gate, self.levels))
        normed = self._modulate(tokens, scale, shift)
        tokens = gated_sum(tokens, self.attention(normed, rotary), gate)
        normed = self.norm(tokens.float()).to(tokens.dtype)
        tokens = (tokens + self.prompt(normed, *words)).to(tokens.dtype)
        normed = self._modulate(tokens, mlp_scale, mlp_shift)
        return tokens, self.narrow(linear_gelu(normed, self.widen))

    def _modulate(self, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if scale.ndim == 1:
            return functional.layer_norm(tokens.float(), scale.shape, scale, shift, self.eps).to(tokens.dtype)
        normed = functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=self.eps)
        return torch.addcmul(shift, normed, scale).to(tokens.dtype)


def by_token(values: Tensor, levels: Tensor | None) -> Tensor:
    """Return the values of each token's noise level, [l ...], [n] -> [n ...]; with one level, as they are."""
    return values if levels is None else values[levels]


def gated_sum(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return `tokens + gate update`, summed in float32, [b n d] in the tokens' type."""
    return torch.addcmul(tokens.float(), update.float(), gate).to(tokens.dtype)


def linear_gelu(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a linear layer and approximate GELU; on CUDA in one kernel that writes its result once."""
    if not tokens.is_cuda:
        return functional.gelu(layer(tokens), approximate="tanh")
    flat = torch._addmm_activation(layer.bias, tokens.flatten(0, 1), layer.weight.t(), use_gelu=True)
    return flat.unflatten(0, tokens.shape[:2])


class FixedTransformer(nn.Module):
    """Wan's transformer, cut behind the last block that is read, for one frame of `size` latent pixels.

    `prompt` is the prompt's embedding, padded with zeros, [m d_text]; None for an instruction a sample.
    `slots` latents at the noise level follow a clean frame, 0 for a frame that has that level itself. The
    outputs of the blocks `earlier` are read too.
    """

    cosine: Tensor
    sine: Tensor
    exit_gate: Tensor
    levels: Tensor | None

    def __init__(
        self,
        transformer: Any,
        prompt: Tensor | None,
        noise_level: float,
        size: tuple[int, int],
        slots: int = 0,
        earlier: Sequence[int] = (),
    ) -> None:
        super().__init__()
        embed = transformer.patch_embedding
        self.dtype: torch.dtype = transformer.dtype
        self.patch: tuple[int, int] = tuple(embed.kernel_size[1:])
        self.weight, self.bias = embed.weight, embed.bias
        self.earlier = tuple(earlier)
        self.embed_text = transformer.condition_embedder.text_embedder
        text = None if prompt is None else embed_prompt(transformer, prompt)
        device = self.weight.device
        modulation, levels = constant_modulation(transformer, noise_level), None
        if slots:
            modulation = torch.stack([constant_modulation(transformer, 0.0), modulation])
            count = (size[0] // self.patch[0]) * (size[1] // self.patch[1])
            levels = (torch.arange((1 + slots) * count, device=device) >= count).long()
        self.register_buffer("levels", levels)
        gate = torch.ones_like(modulation[..., 0, :])
        self.blocks = nn.ModuleList()
        for block in transformer.blocks:
            fixed = FixedBlock(block, modulation, text, gate, levels)
            self.blocks.append(fixed)
            gate = fixed.modulation[..., 5, :]
        self.register_buffer("exit_gate", gate)
        latent = torch.empty(1, embed.in_channels, 1 + slots, *size, device=device)
        cosine, sine = rotary_tables(transformer, latent)
        self.register_buffer("cosine", cosine)
        self.register_buffer("sine", sine)

    def forward(self, latent: Tensor) -> Tensor:
        """Map a noised latent [b z h w], or of a frame and its slots [b z t h w], to features [b n d]."""
        return self.run(self.embed(latent), list(self.blocks))

    def embed(self, latent: Tensor) -> Tensor:
        """Map a noised latent [b z h w] or [b z t h w] to tokens [b n d] before the first block."""
        (q, r) = self.patch
        video = latent[:, :, None] if latent.ndim == 4 else latent
        patches = rearrange(video.to(self.dtype), "b z t (h q) (w r) -> b (t h w) (z q r)", q=q, r=r)
        return functional.linear(patches, self.weight.flatten(1), self.bias)

    def embed_words(self, words: Words) -> tuple[Tensor, Tensor]:
        """Return words after the text embedding, the padding's last, [b w+1 d], and their bias [b w+1]."""
        text, count = words
        embedded = self.embed_text(functional.pad(text.to(self.dtype), (0, 0, 0, 1)))
        is_word = torch.arange(text.shape[1], device=text.device) < count[:, None]
        # finite, and no weight even so: kernels differ in how they treat infinity
        bias = torch.zeros_like(is_word, dtype=torch.float32).masked_fill(~is_word, -3e4)
        return embedded, torch.cat([bias, (PROMPT_LENGTH - count).log()[:, None]], dim=1)

    def run(
        self,
        tokens: Tensor,
        blocks: Sequence[Callable[..., tuple[Tensor, Tensor]]],
        words: Words | None = None,
    ) -> Tensor:
        """Run the blocks, as they are or compiled, and join what is read, [b n d] -> [b n l*d]."""
        given = () if words is None else (self.embed_words(words),)
        pending, tokens = tokens, torch.zeros_like(tokens)
        outputs = []
        for layer, block in enumerate(blocks):
            tokens, pending = block(tokens, pending, (self.cosine, self.sine), *given)
            if layer in self.earlier:
                following: Any = self.blocks[layer + 1]
                outputs.append(gated_sum(tokens, pending, by_token(following.entry_gate, self.levels)))
        last = gated_sum(tokens, pending, by_token(self.exit_gate, self.levels))
        return torch.cat([*outputs, last], dim=-1) if outputs else last


def constant_modulation(transformer: Any, noise_level: float) -> Tensor:
    """Return what the noise level adds to shifts, scales and gates of all blocks, [6 d] float32."""
    embedder = transformer.condition_embedder
    device = embedder.time_proj.weight.device
    time = embedder.timesteps_proj(torch.tensor([1000 * noise_level], device=device))
    time = float_linear(embedder.time_embedder.linear_1, time.float())
    time = float_linear(embedder.time_embedder.linear_2, functional.silu(time))
    return float_linear(embedder.time_proj, functional.silu(time)).reshape(6, -1)


def embed_prompt(transformer: Any, prompt: Tensor) -> tuple[Tensor, int]:
    """Apply the text embedding to a prompt [m d_text] padded with zeros, of its padding to one token.

    Returns:
        Tokens [n+1 d] float32, the last one the padding's, and the number m - n of padding tokens.
    """
    filled = prompt.float().abs().amax(dim=1).nonzero()
    n = int(filled.max()) + 1 if len(filled) else 1
    embedder = transformer.condition_embedder.text_embedder
    words = functional.pad(prompt[:n].float(), (0, 0, 0, 1))
    hidden = functional.gelu(float_linear(embedder.linear_1, words), approximate="tanh")
    return float_linear(embedder.linear_2, hidden), len(prompt) - n


def float_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer in float32, whatever its type."""
    return functional.linear(x, layer.weight.detach().float(), layer.bias.detach().float())


# The autoencoder on one frame


def frame_convolution(conv: Any, channels: int | None = None) -> nn.Conv2d:
    """Return the 2D convolution that a causal 3D one is on one frame, with its first `channels` outputs."""
    weight = conv.weight[:channels, :, -1]  # earlier slices meet the zeros before the first frame
    return make_convolution(weight, conv.bias, conv.stride[1:], (conv._padding[2], conv._padding[0]))


def make_convolution(weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> nn.Conv2d:
    """Return a 2D convolution with a weight in channels-last layout and as many biases as outputs."""
    size: Any = (weight.shape[1], weight.shape[0], weight.shape[2:])
    with torch.device("meta"):
        conv = nn.Conv2d(*size, stride=stride, padding=padding, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach()[: len(weight)].clone())
    return conv


class ChannelNorm(nn.Module):
    """Norm of Wan's autoencoder: each pixel's channels at unit root mean square, scaled."""

    gain: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("gain", norm.scale * norm.gamma.detach().float().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c h w]."""
        return (functional.normalize(x.float(), dim=1) * self.gain).to(x.dtype)


class FrameBlock(nn.Module):
    """Residual block: twice norm, activation, convolution."""

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
    """Self-attention of one head over the pixels of the coarsest map."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm = ChannelNorm(block.norm)
        self.query_key_value, self.out = (
            make_linear(conv.weight.detach()[:, :, 0, 0].clone(), conv.bias.detach().clone())
            for conv in (block.to_qkv, block.proj)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c h w]."""
        tokens = rearrange(self.norm(x), "n c h w -> n 1 (h w) c")
        mixed = functional.scaled_dot_product_attention(*self.query_key_value(tokens).chunk(3, dim=-1))
        return x + rearrange(self.out(mixed), "n 1 (h w) c -> n c h w", h=x.shape[2])


class FrameDownBlock(nn.Module):
    """Down-sampling block of Wan2.2: residual blocks beside an average over pixels and channels.

    The average also runs over pairs of frames; a single frame is paired with zeros, as at a video's start.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        down = [] if block.downsampler is None else [down_convolution(block.downsampler)]
        self.layers = nn.Sequential(*map(FrameBlock, block.resnets), *down)
        self.average = block.avg_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[n c h w] -> [n c' h/2 w/2], or [n c' h w] in the last block."""
        return self.layers(x) + self.average(x[:, :, None])[:, :, 0]


def down_convolution(layer: Any) -> nn.Module:
    """Return the padding and strided convolution of a down-sampling layer, without its temporal part."""
    pad, conv = layer.resample
    return nn.Sequential(pad, make_convolution(conv.weight, conv.bias, conv.stride, conv.padding))


FORMS: dict[type, Callable[[Any], nn.Module]] = {
    WanResidualBlock: FrameBlock,
    WanAttentionBlock: FrameAttention,
    WanResample: down_convolution,
    WanResidualDownBlock: FrameDownBlock,
}
"""Layer of Wan's encoder -> what it is on a single frame."""


class FrameEncoder(nn.Module):
    """`AutoencoderKLWan.encode(...).latent_dist.mode()` for videos of one frame, of Wan2.1 or Wan2.2."""

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
        """Return the posterior's mean, frames [n 3 h w] in [0, 1] -> [n z gh gw] in the encoder's type."""
        pixels = (2 * frames - 1).to(self.dtype)
        if self.patch > 1:
            pixels = rearrange(pixels, "n c (h q) (w r) -> n (c r q) h w", q=self.patch, r=self.patch)
        return self.layers(pixels.contiguous(memory_format=torch.channels_last))


# Both together


class FastWan(nn.Module):
    """A Wan prior for one frame size, noise level and prompt; batches of any length.

    Weights that the reductions do not change are shared with the prior, the others are copied. `wan.obstacle`
    says which priors have a fast form.
    """

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.noise_level: float = prior.noise_level
        self.slots: int = prior.slots
        self.frame: tuple[int, int] = prior.input_size
        scale = prior.vae.spatial_compression_ratio
        size = (self.frame[0] // scale, self.frame[1] // scale)
        self.encoder = FrameEncoder(prior.vae)
        prompt = prior.prompt[0] if prior.encode_words is None else None
        self.transformer = FixedTransformer(
            prior.transformer, prompt, self.noise_level, size, self.slots, prior.layers[:-1]
        )
        self.latent: tuple[int, ...] = (len(prior.latents_mean), 1 + self.slots, *size)
        self.register_buffer("mean", prior.latents_mean[:, 0])
        self.register_buffer("std", prior.latents_std[:, 0])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(
        self, frames: Tensor, noise: Tensor, noise_level: float, words: Words | None = None
    ) -> Tensor:
        """Return features of single frames, [n 3 h w] float32 in [0, 1] -> [n d gh gw] in the prior's type.

        With k slots they are those of the frames and their slots, [n 1+k d gh gw]. `noise` is standard
        normal, [z 1+k h w] or [n z 1+k h w] float32; a clean frame leaves the first of it out.

        Raises:
            ValueError: If shape, type, device or noise level are not those it was built for.
        """
        self.check(frames, noise, noise_level)
        return self.to_grid(self.run_blocks(self.embed(frames, noise), words))

    def embed(self, frames: Tensor, noise: Tensor) -> Tensor:
        """Map frames to the transformer's first tokens, [n 3 h w] -> [n m d]."""
        return self.embed_means(self.encoder(frames), noise)

    def embed_means(self, means: Tensor, noise: Tensor) -> Tensor:
        """Map the encoder's means to the transformer's first tokens, [n z h w] -> [n m d]."""
        latent = (means.float() - self.mean) / self.std
        if not self.slots:
            noisy = (1 - self.noise_level) * latent + self.noise_level * noise.squeeze(-3)
            return self.transformer.embed(noisy)
        clean = latent[:, :, None]
        slots = (1 - self.noise_level) * clean + self.noise_level * noise[..., 1:, :, :]
        return self.transformer.embed(torch.cat([clean, slots], dim=2))

    def run_blocks(self, tokens: Tensor, words: Words | None = None) -> Tensor:
        """Run the transformer's blocks, [n m d] -> [n m d]."""
        return self.transformer.run(tokens, list(self.transformer.blocks), words)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """[n m d] -> [n d gh gw], or with slots [n t d gh gw]."""
        gh = self.latent[-2] // self.transformer.patch[0]
        if not self.slots:
            return rearrange(tokens, "n (gh gw) d -> n d gh gw", gh=gh)
        return rearrange(tokens, "n (t gh gw) d -> n t d gh gw", t=1 + self.slots, gh=gh)

    def check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        """Refuse inputs that the engine was not built for; see `forward`."""
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
    """Raise a ValueError that names what the engine was built for and what it received."""
    raise ValueError(
        f"This engine was built for {what} {expected}; got {found}. Build the prior for it, or take "
        "prior.engine=plain, which accepts any."
    )


# One batch size, compiled and captured


WARM_UP = 3
"""Runs before a capture, in which libraries choose their kernels."""

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Attention kernels by speed on a few hundred tokens of an H100; torch itself starts with flash."""


@dataclass(frozen=True)
class Plan:
    """How a captured prior divides its batch; it does not change what is computed."""

    encode_at_once: int | None = (
        None  # frames in one run of the encoder, None for all; few fit the GPU's cache
    )
    read_at_once: int | None = None  # frames in one run of the transformer, None for all
    attention: str = "cudnn"  # the kernel of `ATTENTION` that is tried first

    def __post_init__(self) -> None:
        check_choices(self, "", attention=ATTENTION)
        check_numbers(self, "", encode_at_once="[1, inf)", read_at_once="[1, inf)")

    @property
    def kernels(self) -> list[SDPBackend]:
        """All attention kernels, the chosen one first."""
        return [ATTENTION[self.attention], *(k for name, k in ATTENTION.items() if name != self.attention)]


class CapturedWan:
    """A `FastWan` on a CUDA device, compiled for the batch size of `frames` and captured as one CUDA graph.

    Blocks share one compiled function, so that building takes seconds, not minutes. Products are left to
    cuBLAS: the compiler's own, tuned for two minutes, were slower.
    """

    def __init__(
        self,
        fast: FastWan,
        frames: Tensor,
        noise: Tensor,
        plan: Plan | None = None,
        words: Words | None = None,
    ) -> None:
        fast.check(frames, noise, fast.noise_level)
        self.fast, self.batch, self.plan = fast, len(frames), plan or Plan()
        self._frames = frames.clone()
        self._noise = noise.expand(len(frames), *fast.latent).clone()
        self._words = None if words is None else (words[0].clone(), words[1].clone())
        compiled: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._encode = torch.compile(fast.encoder, **compiled)
        self._embed = torch.compile(fast.embed_means, **compiled)
        self._blocks: list[Any] = [torch.compile(block, **compiled) for block in fast.transformer.blocks]
        self._graph, self._features = capture(
            lambda: self._run(self._frames, self._noise, self._words), self.plan
        )

    @torch.no_grad()
    def __call__(
        self, frames: Tensor, noise: Tensor, noise_level: float, words: Words | None = None
    ) -> Tensor:
        """Replay the graph; as `FastWan.forward`, for batches of the captured length only."""
        self._check(frames, noise, noise_level)
        self._frames.copy_(frames)
        self._noise.copy_(noise)
        for held, new in zip(self._words or (), words or (), strict=True):
            held.copy_(new)
        self._graph.replay()
        return self._features.clone()

    def run_nested(
        self, frames: Tensor, noise: Tensor, noise_level: float, words: Words | None = None
    ) -> Tensor:
        """Run as a call, but without the graph, so that a larger graph can capture it."""
        self._check(frames, noise, noise_level)
        return self._run(frames, noise, words)

    def embed(self, frames: Tensor, noise: Tensor) -> Tensor:
        """Map frames to the transformer's first tokens, [n 3 h w] -> [n m d]."""
        parts = [self._encode(part) for part in frames.split(self.plan.encode_at_once or len(frames))]
        means = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._embed(means, noise.expand(len(frames), *self.fast.latent).contiguous())

    def run_blocks(self, tokens: Tensor, words: Words | None = None) -> Tensor:
        """Run the compiled blocks, [n m d] -> [n m d]."""
        run, blocks = self.fast.transformer.run, self._blocks
        if words is not None or self.plan.read_at_once is None:
            return run(tokens, blocks, words)
        return torch.cat([run(part, blocks) for part in tokens.split(self.plan.read_at_once)])

    def _run(self, frames: Tensor, noise: Tensor, words: Words | None = None) -> Tensor:
        return self.fast.to_grid(self.run_blocks(self.embed(frames, noise), words))

    def _check(self, frames: Tensor, noise: Tensor, noise_level: float) -> None:
        self.fast.check(frames, noise, noise_level)
        if len(frames) != self.batch:
            refuse("batches of", f"{self.batch} frames", f"{len(frames)}")


@torch.no_grad()
def capture(run: Callable[[], Tensor], plan: Plan | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record the GPU work of a function; its inputs and its result keep their memory.

    `run` takes no arguments and does not synchronize.

    Returns:
        The graph, and the tensor that each replay writes.
    """
    kernels = (plan or Plan()).kernels
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), sdpa_kernel(kernels, set_priority=True):
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result
