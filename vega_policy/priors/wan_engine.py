"""What a Wan prior runs on: the plain path, its exact reductions, or on a GPU a captured graph of them."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vega_policy.priors.wan_captured import CapturedWan
from vega_policy.priors.wan_fast import FastWan, obstacle

logger = logging.getLogger(__name__)


class Engine:
    """What a prior with `engine` fast or auto runs: reductions, captured for the first batch met on CUDA.

    A graph holds for one batch size. Of later sizes `fast` refuses, while `auto` runs the same reductions
    uncompiled: no call but the first waits for a compiler.

    Args:
        prior: A `LatentWorldSimulator`.
        strict: Whether other batch sizes are refused on CUDA.
        float8: As for `FastWan`.
    """

    def __init__(self, prior: Any, strict: bool, float8: bool = False) -> None:
        self.fast = FastWan(prior, float8)
        self.latent = self.fast.latent
        self.nested = False  # inside somebody else's capture a graph cannot be replayed
        self._strict = strict
        self._captured: CapturedWan | None = None

    def __call__(self, frames: Tensor, noise: Tensor, noise_level: float) -> Tensor:
        """As `FastWan.forward`."""
        run: Callable[[Tensor, Tensor, float], Tensor] = self.fast
        if frames.is_cuda:
            if self._captured is None:
                logger.info("Building the prior for batches of %d frames; this takes a while.", len(frames))
                self._captured = CapturedWan(self.fast, frames, noise)
            if self._strict or len(frames) == self._captured.batch:
                run = self._captured.nested if self.nested else self._captured
        return run(frames, noise, noise_level)


def make_engine(prior: Any, engine: str) -> Engine | None:
    """The engine a prior runs on; None stands for the plain path.

    Args:
        prior: A `LatentWorldSimulator`.
        engine: `plain`, `fast`, `auto` or `fp8`.

    Raises:
        ValueError: If `fast` or `fp8` is asked for and the prior has no fast form.
    """
    if engine == "plain":
        return None
    reason = obstacle(prior)
    if engine == "auto" and reason is not None:
        logger.info("prior.engine=auto takes the plain path: %s.", reason)
        return None
    made = Engine(prior, strict=engine != "auto", float8=engine == "fp8")
    logger.info(
        "prior.engine=%s: %s for frames of %dx%d, noise level %g.",
        engine,
        "products rounded to eight bits" if engine == "fp8" else "exact reductions",
        *made.fast.frame,
        made.fast.noise_level,
    )
    return made
