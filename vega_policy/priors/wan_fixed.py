"""Wan's transformer at one noise level and one prompt: what no longer depends on the frame is a constant.

- The noise level fixes the time embedding, and with it every block's shift, scale and gate.
- The prompt fixes the keys and values of cross-attention. It is padded with zeros, so that all keys behind
  its n tokens are one vector: softmax over n + 1 keys, with the logarithm of the padding's length added to
  the last logit, is the same as over all of them.
- A head then mixes n + 1 constant vectors with weights that sum to one, so that values and output projection
  fold into a table of heads x n rows and a constant.

Constants are computed in float32, whatever the type of the weights.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

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
        self.product: nn.Module = linear(torch.cat(weights), torch.cat(biases))
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
    if not tokens.is_cuda or not isinstance(layer, nn.Linear):
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
