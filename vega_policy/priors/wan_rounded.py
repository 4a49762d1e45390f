"""The fixed Wan transformer with products in eight bits: not exact, and faster where a GPU has such products.

Weights and activations are float8 (e4m3: a sign, four bits of exponent, three of mantissa), each row with a
scale of its own, sums are float32 (torch's `_scaled_mm`, Ada and later). Norms, attention, modulation and
residual sums stay as they are. What it costs in accuracy the benchmark prints: path `fp8`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vega_policy.priors.wan_fixed import FixedTransformer

LARGEST = torch.finfo(torch.float8_e4m3fn).max
CAPABILITY = (8, 9)
"""First compute capability with products in float8."""


class Float8Linear(nn.Module):
    """A linear layer whose weight and input are rounded to float8, row by row.

    Args:
        layer: The layer; its bias is kept.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = rounded(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())  # [1 out]
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[b n in] -> [b n out] in the input's type."""
        rows, scale = rounded(x.flatten(0, -2))
        if x.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.t(), scale, self.scale, self.bias, out_dtype=x.dtype, use_fast_accum=True
            )
        else:
            out = ((rows.float() @ self.weight.float().t()) * scale * self.scale + self.bias).to(x.dtype)
        return out.unflatten(0, x.shape[:-1])


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to float8 and what each is to be multiplied by, [m k] -> [m k], [m 1] float32."""
    values = x.float()
    scale = (values.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=1e-12)
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def round_products(transformer: FixedTransformer, device: torch.device) -> None:
    """Round the products of all blocks to float8, in place.

    Args:
        transformer: The fixed transformer.
        device: Where it runs.

    Raises:
        ValueError: If the GPU has no products in float8, or the weights are not bfloat16 on it.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY or transformer.dtype != torch.bfloat16:
            raise ValueError(
                f"prior.engine=fp8 needs bfloat16 weights and a GPU of compute capability {CAPABILITY[0]}."
                f"{CAPABILITY[1]} or higher; got {transformer.dtype} and {found[0]}.{found[1]}. Take "
                "prior.engine=fast."
            )
    block: Any
    for block in transformer.blocks:
        block.attention.product = Float8Linear(block.attention.product)
        block.attention.out = Float8Linear(block.attention.out)
        block.prompt.query = Float8Linear(block.prompt.query)
        block.widen, block.narrow = Float8Linear(block.widen), Float8Linear(block.narrow)
