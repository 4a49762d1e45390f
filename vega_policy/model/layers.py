"""Transformer layers shared by backbones, fusions and action heads."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

KVCache = tuple[Tensor, Tensor]
"""Keys and values of a context, [b heads m d] each."""


class Attention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves if none is given."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(context_width or width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend, [b n d], context [b m c], mask [b m] (True: may be read) -> [b n d]."""
        return self.attend(tokens, self.kv_cache(tokens if context is None else context), mask)

    def kv_cache(self, context: Tensor) -> KVCache:
        """Return keys and values of a context, [b m c] -> [b heads m d] each."""
        # Unbinding before the transpose lets the backward pass assemble the gradient in one operation.
        both = rearrange(self.kv_proj(context), "b m (two k d) -> b m two k d", two=2, k=self.heads)
        key, value = both.unbind(dim=2)
        return key.transpose(1, 2), value.transpose(1, 2)

    def attend(self, tokens: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
        """Attend to cached keys and values, [b n d], mask [b m] (True: may be read) -> [b n d]."""
        query = rearrange(self.q_proj(tokens), "b n (k d) -> b k n d", k=self.heads)
        key, value = cache
        attn_mask = None if mask is None else mask[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.out_proj(rearrange(mixed, "b k n d -> b n (k d)"))


class Mlp(nn.Sequential):
    """Linear - GELU - Linear, [... d] -> [... out]."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[... d] -> [... out]; an own method, so that `torch.compile` has a function to compile."""
        return super().forward(x)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b n d], mask [b n] (True: may be read) -> [b n d]."""
        tokens = tokens + self.dropout(self.attention(self.norm_attention(tokens), mask=mask))
        return tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))


def sinusoid(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Return the sine and cosine embedding of real positions, [...] -> [... width]; `width` is even.

    Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5.
    """
    exponent = torch.arange(width // 2, device=position.device, dtype=torch.float32) / (width // 2)
    angle = position[..., None].float() * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """Return the 2D sine-cosine embedding of a token grid, -> [gh*gw channels].

    Half of the channels hold the row, half the column; `channels` is a multiple of 4. Coordinates are those
    of token centres in [0, 64), so that grids of different sizes embed the same place alike.
    """
    rows = 64 * (torch.arange(height) + 0.5) / height
    columns = 64 * (torch.arange(width) + 0.5) / width
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    half = channels // 2
    return torch.cat([sinusoid(row, half), sinusoid(column, half)], dim=-1).flatten(0, 1)
