"""The trained parts in the hub's folder layout, in bfloat16, as `vega_policy.priors.wan` loads them.

<output_dir>/wan_tiny/vae/ transformer/ scheduler/ empty_prompt.safetensors README.md
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from vega_policy.training.folders import atomic_folder

LARGEST = 24_000_000
"""Bytes that a shipped folder may have."""


def write_part(network: Any, target: Path) -> None:
    """Write one network in bfloat16, whole or not at all."""
    state = network.state_dict()
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    with atomic_folder(target) as folder:
        network.save_config(folder)
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def take_weights(network: Any, path: Path) -> None:
    """Put the weights of a part that was written into a network.

    Raises:
        ValueError: If they are of another architecture.
    """
    weights = load_file(path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in network.state_dict().items()}:
        raise ValueError(f"{path} holds another architecture than the one that is trained")
    network.load_state_dict(weights)


def write_rest(folder: Path, prompt: Tensor, shift: float) -> None:
    """Write the scheduler's config and the embedding of the empty prompt, [n d].

    Args:
        folder: The checkpoint's folder.
        prompt: Embedding of the empty prompt, without padding.
        shift: The schedule's shift when sampling.
    """
    make_scheduler(shift).save_pretrained(folder / "scheduler")
    save_file({"prompt": prompt.float().contiguous()}, folder / "empty_prompt.safetensors")


def make_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Wan's solver: UniPC on the straight path."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def load_vae(folder: Path, device: torch.device) -> Any:
    """The autoencoder that was written, in float32."""
    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_transformer(folder: Path, device: torch.device) -> Any:
    """The transformer that was written, in float32."""
    network: Any = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return network.to(device).eval().requires_grad_(False)


def check_size(folder: Path) -> int:
    """Bytes of a checkpoint.

    Raises:
        ValueError: If it is too large to be shipped.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"{folder} has {size} bytes; at most {LARGEST} are shipped")
    return size
