"""UNets at one noise level and under one condition: what no longer depends on the frame is a constant.

- The noise level fixes the time embedding, and with it what every residual block adds to its channels.
- A constant prompt fixes the keys and values of every cross-attention.
- Attention to a single token (a picture's embedding) gives that token's value, whatever is asked: queries,
  keys and softmax fall away.

All three leave the features as they are, but for rounding (1e-5 in float32).
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class Constant(nn.Module):
    """Stands in for a layer whose result is known, for any number of samples.

    Args:
        value: The result for one sample, without its leading axes.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The value, once for each leading index of what the layer is given."""
        return self.value.expand(*x.shape[: x.ndim - self.value.ndim], *self.value.shape)


class SingleToken(nn.Module):
    """Cross-attention to one token: its value behind the output projection, at every place.

    Args:
        attention: The cross-attention.
    """

    value: Any
    out: Any

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.value, self.out = attention.to_v, attention.to_out

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Tokens [b n d] and what they attend to, [b 1 c] -> [b n d].

        Raises:
            ValueError: If there is more than one token to attend to.
        """
        if encoder_hidden_states.shape[1] != 1:
            raise ValueError(
                f"This cross-attention was reduced to a single token; got {encoder_hidden_states.shape[1]}. "
                "Take prior.engine=plain."
            )
        mixed = self.value(encoder_hidden_states)
        for layer in self.out:
            mixed = layer(mixed)
        return mixed.expand(-1, tokens.shape[1], -1)


@torch.no_grad()
def fix_time(unet: nn.Module, embedded: Tensor) -> int:
    """Replace the time projection of every residual block by its result, in place.

    Args:
        unet: The UNet, cut behind its read-out.
        embedded: Time embedding [d] of the one noise level.

    Returns:
        How many there were.
    """
    blocks: list[Any] = [
        block for block in unet.modules() if isinstance(getattr(block, "time_emb_proj", None), nn.Linear)
    ]
    for block in blocks:
        projection = block.time_emb_proj
        block.time_emb_proj = Constant(projection(block.nonlinearity(embedded.to(projection.weight))))
    return len(blocks)


@torch.no_grad()
def fix_prompt(unet: nn.Module, prompt: Tensor) -> int:
    """Replace keys and values of every cross-attention to a constant prompt by their results, in place.

    Args:
        unet: The UNet, cut behind its read-out.
        prompt: The prompt's embedding with its padding, [m c].

    Returns:
        How many there were.
    """
    attentions: list[Any] = [
        part for part in unet.modules() if isinstance(part, Attention) and part.is_cross_attention
    ]
    for attention in attentions:
        words = prompt.to(attention.to_k.weight)
        attention.to_k, attention.to_v = Constant(attention.to_k(words)), Constant(attention.to_v(words))
    return len(attentions)


def fix_single_token(unet: nn.Module) -> int:
    """Replace every cross-attention by what it is on a single token, in place; returns their number."""
    places = [
        (parent, name, child)
        for parent in unet.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention) and child.is_cross_attention
    ]
    for parent, name, attention in places:
        setattr(parent, name, SingleToken(attention))
    return len(places)
