"""A pre-trained policy of LeRobot whose image tokens are fused with a prior's."""

from collections.abc import Callable
from math import isqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vega_policy.attention import Mlp
from vega_policy.bases import BASES
from vega_policy.bases.loading import load_base
from vega_policy.fusion import make_fusion
from vega_policy.priors import make_prior

if TYPE_CHECKING:
    from vega_policy.configuration_vega import VegaConfig


class BasedModel(nn.Module):
    """LeRobot's policy with its image embedding wrapped on the instance.

    The change that the fusion makes is scaled by one learned number that starts at zero, so that a new policy
    is its base, bit by bit. The prior reads each picture exactly as the base's image encoder does: resized
    and padded by the base.

    Args:
        config: Base, prior, fusion and features.

    Raises:
        ValueError: If the fusion or the prior's clips cannot work with a base.
    """

    base: Any
    prior: Any
    fusion: Any
    opening: Tensor

    def __init__(self, config: "VegaConfig") -> None:
        super().__init__()
        _check(config)
        self.base, self.fingerprint = load_base(config)
        self._eyes: list[Any] = [attrgetter(BASES[config.base.name].eyes)(self.base)]  # no second sub-module
        self._native: Callable[[Tensor], Tensor] = self._eyes[0].embed_image
        side, width = self._measure()
        self.__dict__["prior"] = make_prior(config.prior, (side, side))  # not a sub-module
        if self.prior is not None:
            self.project = Mlp(self.prior.width, width, width)
            self.fusion = make_fusion(width, config.fusion, (side, side))
            self.opening = nn.Parameter(torch.zeros(()))
            _check_fusion(config, self.fusion, side**2)
            self._eyes[0].embed_image = self.embed_image
        self.fresh_noise = config.prior.noise == "fresh"
        if config.base.tune == "lora":
            _add_adapters(self.base, config.base.lora_rank)

    @property
    def gate(self) -> Tensor | None:
        """Weight of the semantic stream in the last forward pass, [b n 1]; None without a gate."""
        return None if self.prior is None else self.fusion.gate

    @property
    def noise_width(self) -> int:
        """Width of the noise that an action starts from: the base pads actions."""
        config: Any = self.base.config
        return config.max_action_dim

    def embed_image(self, pictures: Tensor) -> Tensor:
        """Fused tokens in place of the base's image tokens, pictures [b 3 h w] in [-1, 1] -> [b n d]."""
        semantic = self._native(pictures)
        frames = ((pictures.float() + 1) / 2).clamp(0, 1)[:, None, None]
        fresh = torch.default_generator if self.training and self.fresh_noise else None
        dtype = self.opening.dtype
        prior = rearrange(self.prior(frames, fresh)[:, 0], "b d h w -> b (h w) d").to(dtype)
        plain = semantic.to(dtype)
        fused = self.fusion(plain, self.project(prior), None)
        return (plain + self.opening * (fused - plain)).to(semantic.dtype)

    def frozen_names(self) -> set[str]:
        """Names of the base's weights that do not learn: a checkpoint can do without them."""
        learning = {name for name, weight in self.named_parameters() if weight.requires_grad}
        return {name for name in self.state_dict() if name.startswith("base.") and name not in learning}

    @torch.no_grad()
    def _measure(self) -> tuple[int, int]:
        """Side of the token grid and token width, seen on one blank picture."""
        config: Any = self.base.config
        size = config.resize_imgs_with_padding if config.type == "smolvla" else config.image_resolution
        weight = next(self.base.parameters())
        tokens = self._native(torch.zeros(1, 3, size[1], size[0], device=weight.device))
        side = isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"The base {config.type!r} has {tokens.shape[1]} tokens a picture, which are no square grid."
            )
        return side, tokens.shape[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the prior along with the model (torch calls this for `.to`, `.cuda`, `.half`, ...)."""
        super()._apply(fn, recurse)
        prior: Any = self.__dict__["prior"]
        if prior is not None:
            prior._apply(fn, recurse)
        return self


def _check(config: "VegaConfig") -> None:
    if config.prior.clip != "frame":
        raise ValueError(
            f"prior.clip={config.prior.clip}: a base embeds one picture at a time; take prior.clip=frame."
        )


def _check_fusion(config: "VegaConfig", fusion: Any, n: int) -> None:
    if fusion.reads_instruction or fusion.tokens(n) != n:
        raise ValueError(
            f"fusion={config.fusion.name} cannot work with a base, which embeds pictures without the "
            f"instruction and has a place for {n} tokens of each. Take another, such as fusion=token_gate."
        )


def _add_adapters(policy: Any, rank: int) -> None:
    """Fix a policy and give it low-rank adapters where LeRobot puts them for its type."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("base.tune=lora needs PEFT: pip install 'lerobot_policy_vega[vlm]'.") from error
    policy.requires_grad_(False)
    targets = policy._get_default_peft_targets()["target_modules"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), policy)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
