"""Compile the blocks of a model in place, for training on a GPU in fewer and larger kernels.

Uncompiled, a step of the compact policy spends its time between the matrix products: casts of autocast,
norms, activations and sums each read and write whole activations. Compiled, these are one kernel. Blocks of
one kind share one compiled function, so compilation takes seconds; weights and checkpoints do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vega_policy.backbones.compact import CompactBackbone
from vega_policy.model.vega import VegaModel


def compile_blocks(model: VegaModel, **options: Any) -> None:
    """Compile image encoder, projectors, fusion, trunk and head, each for the first shapes it is called with.

    Args:
        model: A model with the compact backbone.
        **options: For `torch.compile`, such as `backend` or `mode`.

    Raises:
        ValueError: If it is another backbone, or a base.
    """
    if not isinstance(model, VegaModel) or not isinstance(model.backbone, CompactBackbone):
        found = type(model.backbone if isinstance(model, VegaModel) else model).__name__
        raise ValueError(f"compile=true compiles the compact backbone; got {found}. Set compile=false.")
    backbone = model.backbone
    parts = [backbone.project_image, backbone.project_state, *backbone.blocks]
    if not backbone.image_encoder.frozen:
        parts.append(backbone.image_encoder)
    if model.prior is not None and not model.fusion.reads_instruction:
        parts += [model.project, model.fusion]
    for part in [*parts, *model.head.blocks]:
        part.compile(**({"dynamic": False} | options))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model uncompiled, for shapes and modes that it was not compiled for."""
    held = [(part, part._compiled_call_impl) for part in model.modules()]
    for part, _ in held:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, compiled in held:
            part._compiled_call_impl = compiled
