"""The real networks of each prior: without weights, for sizes and arithmetic; with random ones, for time."""

import dataclasses
from importlib import import_module
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler
from torch import nn

from vega_policy.model.config import PriorConfig
from vega_policy.priors import make_prior, resolve

Architecture = dict[str, tuple[str, dict[str, Any]]]
"""Part of a checkpoint -> "module:class" and constructor arguments."""

_WAN_VAE = ("diffusers:AutoencoderKLWan", {})
_SD_ENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_SD_VAE = ("diffusers:AutoencoderKL", {**_SD_ENCODER, "up_block_types": ("UpDecoderBlock2D",) * 4})
_SD_PROMPT = (77, 1024)
_SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _wan(heads: int, feed_forward: int, layers: int, channels: int = 16, **options: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "ffn_dim": feed_forward,
        "num_layers": layers,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        **options,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "wan2.1_t2v_1.3b": {
        "vae": _WAN_VAE,
        "transformer": ("diffusers:WanTransformer3DModel", _wan(12, 8960, 30)),
    },
    "wan2.1_t2v_14b": {
        "vae": _WAN_VAE,
        "transformer": ("diffusers:WanTransformer3DModel", _wan(40, 13824, 40)),
    },
    "wan2.1_vace_1.3b": {
        "vae": _WAN_VAE,
        "transformer": (
            "diffusers:WanVACETransformer3DModel",
            _wan(12, 8960, 30, vace_layers=list(range(0, 30, 2)), vace_in_channels=96),
        ),
    },
    "wan2.2_ti2v_5b": {
        "vae": (
            "diffusers:AutoencoderKLWan",
            {
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
                "latents_mean": [0.0] * 48,
                "latents_std": [1.0] * 48,
            },
        ),
        "transformer": ("diffusers:WanTransformer3DModel", _wan(24, 14336, 30, 48)),
    },
    "sd21": {
        "vae": _SD_VAE,
        "unet": (
            "diffusers:UNet2DConditionModel",
            {
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
        ),
    },
    "svd": {
        "unet": ("diffusers:UNetSpatioTemporalConditionModel", {"num_attention_heads": (5, 10, 20, 20)}),
        "vae": ("diffusers:AutoencoderKLTemporalDecoder", _SD_ENCODER),
        "image_encoder": (
            "transformers:CLIPVisionModelWithProjection",  # ViT-H/14
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "patch_size": 14,
                "projection_dim": 1024,
                "hidden_act": "gelu",
            },
        ),
    },
    "sd_vae": {"vae": _SD_VAE},
    "wan_vae": {"vae": _WAN_VAE},
    "dinov3": {
        ".": (
            "transformers:DINOv3ViTModel",
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_register_tokens": 4,
            },
        )
    },
    "vjepa2": {
        ".": (
            "transformers:VJEPA2Model",
            {
                "hidden_size": 1408,
                "num_hidden_layers": 40,
                "num_attention_heads": 22,
                "mlp_ratio": 48 / 11,
            },
        )
    },
}
"""Prior -> its parts at their published sizes."""

READERS = {
    "wan2.1_t2v_1.3b": "vega_policy.priors.wan:LatentWorldSimulator",
    "wan2.1_t2v_14b": "vega_policy.priors.wan:LatentWorldSimulator",
    "wan2.1_vace_1.3b": "vega_policy.priors.wan:ControlledWorldSimulator",
    "wan2.2_ti2v_5b": "vega_policy.priors.wan:LatentWorldSimulator",
    "sd21": "vega_policy.priors.unet:StableDiffusion",
    "svd": "vega_policy.priors.unet:StableVideoDiffusion",
    "sd_vae": "vega_policy.priors.vae:StableDiffusionVae",
    "wan_vae": "vega_policy.priors.vae:WanVae",
    "dinov3": "vega_policy.priors.vit:Dinov3",
    "vjepa2": "vega_policy.priors.vit:VJepa2",
}
"""Prior -> class that reads it."""


def without_weights(name: str, device: str = "meta") -> dict[str, nn.Module]:
    """The parts of a prior at their published sizes.

    Args:
        name: A key of `ARCHITECTURES`.
        device: `meta` gives shapes and takes no memory; another one draws random weights there.

    Raises:
        ValueError: If the architecture of the prior is not listed.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"No architecture of the prior {name!r}. Known: {', '.join(sorted(ARCHITECTURES))}.")
    with torch.device(device):
        built = {part: _build(*definition) for part, definition in ARCHITECTURES[name].items()}
    return {part: network.to(device) for part, network in built.items()}  # diffusers' mixers stay on the CPU


def published_sizes(name: str) -> dict[str, int]:
    """Parameters of each whole network of a prior, before anything behind its read-out is dropped.

    Args:
        name: A prior; one without published networks (`random`, `wan_tiny`, `none`, ...) gives none.
    """
    if name not in ARCHITECTURES:
        return {}
    counted: dict[str, Any] = without_weights(name)
    if name == "vjepa2":  # the predictor beside it is no part of what the paper counts
        counted = {"encoder": counted["."].encoder}
    if "." in counted:
        counted = {"encoder": counted["."]}
    if name == "sd_vae":
        counted["its encoder"] = counted["vae"].encoder
    return {part: sum(weight.numel() for weight in network.parameters()) for part, network in counted.items()}


def reader_without_weights(config: PriorConfig, grid: tuple[int, int], device: str = "meta") -> Any:
    """The reader of a prior, cut behind its read-out as with a checkpoint's weights.

    Args:
        config: Prior config.
        grid: Token grid (gh, gw) of the backbone.
        device: `meta` gives shapes and takes no memory; another one draws random weights there, which are
            as fast as trained ones.

    Raises:
        ValueError: If the prior has no networks of published sizes.
    """
    config = resolve(dataclasses.replace(config, engine="plain"))
    if config.name in ("random", "wan_tiny", "wan_tiny_untrained"):
        return make_prior(config, grid).to(device)
    if config.name not in READERS:
        raise ValueError(
            f"The prior {config.name!r} has no reader without weights. Known: {', '.join(sorted(READERS))}."
        )
    parts: dict[str, Any] = without_weights(config.name, device)
    for part in parts.values():
        _cast(part, getattr(torch, str(config.dtype)))
    module, name = READERS[config.name].split(":")
    arguments = _arguments(config, parts, device)
    with torch.device(device):
        reader = getattr(import_module(module), name)(*arguments, config, grid, "none")
    return reader.eval().requires_grad_(False)


def _arguments(config: PriorConfig, parts: dict[str, Any], device: str) -> tuple[Any, ...]:
    """What a reader is given before its config: its networks, and the empty prompt (zeros)."""
    if config.name == "svd":
        return (parts,)
    if config.name == "sd21":
        schedule = DDIMScheduler(**_SD_SCHEDULE).alphas_cumprod  # read as numbers, so never without values
        return parts | {"schedule": schedule}, torch.zeros(_SD_PROMPT, device=device)
    if "transformer" in parts:
        width = ARCHITECTURES[config.name]["transformer"][1]["text_dim"]
        return parts["vae"], parts["transformer"], torch.zeros(1, width, device=device)
    if "vae" in parts:
        return (parts["vae"],)
    network = parts["."]
    return network, network.model if config.name == "dinov3" else network.encoder


def _cast(network: Any, dtype: torch.dtype) -> None:
    """The type in which a network is loaded; diffusers names parts that stay in float32."""
    kept = set(network._keep_in_fp32_modules or ())
    for name, weight in network.named_parameters():
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(dtype)


def _build(path: str, options: dict[str, Any]) -> nn.Module:
    module, name = path.split(":")
    cls: Any = getattr(import_module(module), name)
    if module == "transformers":
        return cls(cls.config_class(**options))
    return cls(**options)
