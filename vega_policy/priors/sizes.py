"""Networks of published sizes: without weights, for parameters and arithmetic; with random ones, for time."""

from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler
from torch import nn
from transformers import PreTrainedModel

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PRIORS, make_prior, resolve


def _wan(heads: int, ffn_dim: int, layers: int, channels: int = 16, **options: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": heads, "ffn_dim": ffn_dim, "num_layers": layers, "text_dim": 4096}
    return sizes | {"in_channels": channels, "out_channels": channels} | options


_WAN_5B_VAE = {
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
}
_SVD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_SD_VAE = {**_SVD_VAE, "up_block_types": ("UpDecoderBlock2D",) * 4}
_SD_UNET = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_CLIP_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
_DINOV3_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
}
_VJEPA2_G = {
    "hidden_size": 1408,
    "num_hidden_layers": 40,
    "num_attention_heads": 22,
    "mlp_ratio": 48 / 11,
}

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "wan2.1_t2v_1.3b": {"vae": {}, "transformer": _wan(12, 8960, 30)},
    "wan2.1_t2v_14b": {"vae": {}, "transformer": _wan(40, 13824, 40)},
    "wan2.1_vace_1.3b": {
        "vae": {},
        "transformer": _wan(12, 8960, 30, vace_layers=list(range(0, 30, 2)), vace_in_channels=96),
    },
    "wan2.2_ti2v_5b": {"vae": _WAN_5B_VAE, "transformer": _wan(24, 14336, 30, channels=48)},
    "sd21": {"vae": _SD_VAE, "unet": _SD_UNET},
    "svd": {"vae": _SVD_VAE, "unet": {"num_attention_heads": (5, 10, 20, 20)}, "image_encoder": _CLIP_H},
    "sd_vae": {"vae": _SD_VAE},
    "wan_vae": {"vae": {}},
    "dinov3": {".": _DINOV3_L},
    "vjepa2": {".": _VJEPA2_G},
}
"""Prior -> network -> arguments other than the defaults of its class (in transformers: of its config)."""


def prior_class(name: str) -> Any:
    """Return the class of a prior that is built from networks."""
    return resolve_name(PRIORS[name].build).__self__


def build_networks(name: str, device: str = "meta") -> dict[str, Any]:
    """Build the networks of a prior at their published sizes, or those of its registry entry.

    `meta` gives shapes and takes no memory; on another device weights are random.

    Raises:
        ValueError: If the prior has no published networks.
    """
    architecture = ARCHITECTURES.get(name) or (PRIORS[name].architecture if name in PRIORS else None)
    if architecture is None:
        raise ValueError(f"No architecture of the prior {name!r}. Known: {', '.join(sorted(ARCHITECTURES))}.")
    classes = prior_class(name).networks
    with torch.device(device):
        networks = {part: _build(classes[part], options) for part, options in architecture.items()}
    # diffusers' mixing factors are made on the CPU
    return {part: network.to(device) for part, network in networks.items()}


def _build(cls: Any, options: dict[str, Any]) -> nn.Module:
    is_transformers = issubclass(cls, PreTrainedModel)  # those take a config, diffusers' take its fields
    make_config: Any = cls.config_class if is_transformers else None
    return cls(make_config(**options)) if is_transformers else cls(**options)


def published_sizes(name: str) -> dict[str, int]:
    """Count the parameters of each whole network of a prior; empty for a prior without published networks."""
    if name not in ARCHITECTURES:
        return {}
    networks = build_networks(name)
    if "." in networks:  # V-JEPA 2's predictor is no part of the published count
        network = networks["."]
        networks = {"encoder": network.encoder if name == "vjepa2" else network}
    if name == "sd_vae":
        networks["its encoder"] = networks["vae"].encoder
    return {
        part: sum(weight.numel() for weight in network.parameters()) for part, network in networks.items()
    }


def build_without_weights(config: PriorConfig, grid: tuple[int, int], device: str = "meta") -> Any:
    """Build a prior at its published size, cut behind the layer that is read, for a token grid (gh, gw).

    `meta` gives shapes and takes no memory; on another device weights are random.

    Raises:
        ValueError: If the prior has no networks of published sizes.
    """
    config = resolve(replace(config, engine="plain"))
    if config.name in ("random", "wan_tiny", "wan_tiny_untrained"):
        return make_prior(config, grid).to(device)
    if config.name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"The prior {config.name!r} has no networks of published size. Known: {known}.")
    parts = build_networks(config.name, device)
    for network in parts.values():
        cast_as_loaded(network, getattr(torch, str(config.dtype)))
    if "transformer" in parts:
        parts["prompt"] = torch.zeros(1, parts["transformer"].config.text_dim, device=device)
    if config.name == "sd21":
        parts["prompt"] = torch.zeros(77, 1024, device=device)
        betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        parts["schedule"] = DDIMScheduler(**betas).alphas_cumprod  # its values are read, so not on `meta`
    with torch.device(device):
        prior = prior_class(config.name)(parts, config, grid, "none")
    return prior.eval().requires_grad_(False)


def cast_as_loaded(network: Any, dtype: torch.dtype) -> None:
    """Cast weights as `from_pretrained` does, in place: some modules of diffusers stay in float32."""
    kept = set(network._keep_in_fp32_modules or ())
    for name, weight in network.named_parameters():
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(dtype)
