"""Ways to compute a Wan prior's features, by name: `fast`, `fp8`, and these with choices, `fast/encode=8`."""

import copy
from dataclasses import dataclass
from typing import Any

from vega_policy.priors.wan_captured import Plan

PATHS = ("released", "all_blocks", "early_stop", "fast", "fp8")
"""As the released code runs; as a user of diffusers would write it, with all blocks or up to the layer; the
exact reductions; those with products in eight bits.
"""

CHOICES = ("encode", "read", "attention", "layer")


@dataclass(frozen=True)
class FastPath:
    """One way to run the reductions.

    Attributes:
        plan: How the batch is gone about on a GPU.
        float8: Whether products are rounded to eight bits.
        layer: Block that is read, for fewer blocks than the prior's own; None reads the prior's own.
    """

    plan: Plan
    float8: bool
    layer: int | None

    def prior(self, prior: Any) -> Any:
        """The prior with no block behind the one that is read; weights are shared."""
        if self.layer is None:
            return prior
        shorter, transformer = copy.copy(prior), copy.copy(prior.transformer)
        transformer._modules = transformer._modules | {"blocks": prior.transformer.blocks[: self.layer + 1]}
        shorter._modules = prior._modules | {"transformer": transformer}
        return shorter


def fast_path(name: str) -> FastPath | None:
    """What a name such as `fp8/encode=8/read=16/attention=flash/layer=12` stands for; None if it is not fast.

    Raises:
        ValueError: If path or choice is unknown.
    """
    path, *choices = name.split("/")
    pairs = [choice.partition("=") for choice in choices]
    unknown = [key for key, _, value in pairs if key not in CHOICES or not value]
    if path not in PATHS or unknown or (choices and path not in ("fast", "fp8")):
        raise ValueError(
            f"--paths: known are {', '.join(PATHS)}, the last two also with {', '.join(CHOICES)}, such as "
            f"fast/encode=8; got {name}."
        )
    if path not in ("fast", "fp8"):
        return None
    given = {key: value for key, _, value in pairs}
    counts = {key: int(given[key]) for key in ("encode", "read", "layer") if key in given}
    plan = Plan(counts.get("encode"), counts.get("read"), given.get("attention", "cudnn"))
    return FastPath(plan, path == "fp8", counts.get("layer"))
