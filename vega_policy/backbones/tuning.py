"""What of a Hugging Face model learns, and how its backward pass is kept small."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vega_policy.parts import BackboneConfig

ENCODERS = ("vision_tower", "vision_model", "visual")
CONNECTORS = ("connector", "multi_modal_projector", "visual.merger", "visual.deepstack_merger_list")


def parts_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The sub-modules of a model that are called so."""
    there = dict(model.named_modules())
    return [there[name] for name in names if name in there]


def freeze_parts(model: nn.Module, decoder: nn.Module, config: BackboneConfig) -> None:
    """Fix the parts that a config names.

    Args:
        model: The image-text model without its head.
        decoder: Its language model.
        config: `freeze_*` and `lora_*`.

    Raises:
        ImportError: If adapters are asked for and PEFT is not installed.
        ValueError: If no layer has a name of `lora_targets`.
    """
    connectors = parts_of(model, CONNECTORS)
    for part in parts_of(model, ENCODERS):
        part.requires_grad_(not config.freeze_image_encoder)
    for part in connectors:  # after the encoders: Qwen's connectors lie within
        part.requires_grad_(not config.freeze_connector)
    if config.freeze_language_model:
        decoder.requires_grad_(False)
    if config.lora_rank:
        add_adapters(decoder, config)


def add_adapters(decoder: nn.Module, config: BackboneConfig) -> None:
    """Fix a language model and give its linear layers low-rank adapters (LoRA, arXiv 2106.09685).

    Adapters are float32 and start at zero: the model's output is unchanged at first.

    Args:
        decoder: The language model, changed in place.
        config: Rank, scale and targets.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("backbone.lora_rank needs PEFT: pip install 'lerobot_policy_vega[vlm]'.") from error
    targets = list(config.lora_targets)
    ends = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    if not ends & set(targets):
        raise ValueError(
            f"backbone.lora_targets: no linear layer is called {', '.join(targets)}; there are "
            f"{', '.join(sorted(ends))}."
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,  # pyright: ignore[reportArgumentType]
    )
    inject_adapter_in_model(lora, decoder)
    for name, weight in decoder.named_parameters():
        if "lora_" in name:  # steps of an optimizer vanish in the rounding of shorter types
            weight.data = weight.data.float()


def checkpoint_blocks(blocks: Any) -> None:
    """Let blocks be computed again in the backward pass, also where they are frozen and in evaluation mode.

    transformers' own switch works in training mode only, in which frozen parts never are.

    Args:
        blocks: The blocks of a language model, changed in place.
    """
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
