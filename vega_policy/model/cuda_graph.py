"""A whole control step as one CUDA graph: see, read, act without the host in between."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vega_policy.backbones.compact import CompactBackbone
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.priors.precomputed import PrecomputedPrior
from vega_policy.priors.unet import StableVideoDiffusion
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import capture

logger = logging.getLogger(__name__)

Step = Callable[[Observation, Tensor], Tensor]
"""(observation, noise [b t a]) -> chunk of normalised actions [b t a]."""


class CapturedSteps:
    """Control steps of one model, each kind captured when it is met for the second time.

    A kind is the shape of what is seen, the instructions, and the text encoder's weights: a graph holds its
    words. Each captured kind holds memory of its own and stays; where there are too many, or a step cannot be
    captured, it runs as it is, and the log says once why.

    Args:
        enabled: Whether anything is captured at all.
        capture: Makes the captured step of a model for an observation and its noise.
        kept: So many kinds are kept.
    """

    def __init__(
        self,
        enabled: bool,
        capture: "Callable[[VegaModel, Observation, Tensor], Step] | None" = None,
        kept: int = 4,
    ) -> None:
        self._enabled = enabled
        self._capture = capture or CapturedAct
        self._kept = kept
        self._kinds: dict[Hashable, Step | None] = {}
        self._told: set[str] = set()

    def forget(self) -> None:
        """Drop all captured steps: weights have moved to other places."""
        self._kinds.clear()

    def act(self, model: VegaModel, observation: Observation, noise: Tensor, plain: Step) -> Tensor:
        """A chunk of normalised actions.

        Args:
            model: The model.
            observation: What is seen.
            noise: Where the flow starts, [b t a].
            plain: The step as it runs uncaptured.
        """
        if not self._enabled:
            return plain(observation, noise)
        reason = obstacle(model, observation, noise)
        if reason is not None:
            self._tell(reason)
            return plain(observation, noise)
        assert observation.frames is not None  # `obstacle` says so
        shapes = (observation.frames.shape, observation.state.shape, noise.shape)
        words = sum(weight._version for weight in model.backbone.text_encoder.parameters())
        kind = (shapes, noise.dtype, tuple(observation.instruction), words)
        step, known = self._kinds.get(kind), kind in self._kinds
        if known and step is None:
            logger.info("Capturing the control step for frames of %s.", list(observation.frames.shape))
            step = self._capture(model, observation, noise)
        if not known and not self._room():
            self._tell(f"{self._kept} others are, and this one is of another kind")
            return plain(observation, noise)
        self._kinds[kind] = step
        return plain(observation, noise) if step is None else step(observation, noise)

    def _room(self) -> bool:
        """Whether one more kind may be met; the oldest that was met only once makes place."""
        if len(self._kinds) < self._kept:
            return True
        once = next((kind for kind, step in self._kinds.items() if step is None), None)
        if once is None:
            return False
        del self._kinds[once]
        return True

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            logger.info("Control steps are not captured: %s.", reason)
            self._told.add(reason)


def obstacle(model: VegaModel, observation: Observation, noise: Tensor) -> str | None:
    """Why a step cannot be captured, or None if it can.

    Args:
        model: The model.
        observation: What is seen.
        noise: Where the flow starts.
    """
    if not noise.is_cuda:
        return f"a CUDA graph needs a GPU, and this is {noise.device}"
    if not isinstance(model.backbone, CompactBackbone):
        return f"the backbone {model.config.backbone.name} prepares its inputs on the host"
    if observation.frames is None or observation.semantic is not None or observation.prior is not None:
        return "features are given instead of frames"
    if isinstance(model.prior, PrecomputedPrior | StableVideoDiffusion):
        return f"the prior {model.config.prior.name} reads on the host"
    if model.training or torch.is_autocast_enabled():
        return "the model trains, or runs under autocast"
    return None


class CapturedAct:
    """`VegaModel.act` for one batch, one instruction each, replayed as one CUDA graph.

    Small policies leave a GPU waiting for the host, which launches thousands of kernels a chunk; a graph
    launches them at once. Words are encoded once, when it is built.

    Args:
        model: A model in evaluation mode on a CUDA device.
        observation: An observation of the batch it is built for, with frames.
        noise: Where the flow starts, [b t a].

    Raises:
        ValueError: If the model is not on a CUDA device or the observation has no frames.
    """

    @torch.no_grad()
    def __init__(self, model: VegaModel, observation: Observation, noise: Tensor) -> None:
        if not noise.is_cuda or observation.frames is None:
            raise ValueError("A captured step needs frames and a CUDA device; take VegaModel.act elsewhere.")
        self.instruction = list(observation.instruction)
        self._frames, self._state = observation.frames.clone(), observation.state.clone()
        self._noise = noise.clone()
        held = Observation(self._frames, self._state, self.instruction)
        model.act(held, self._noise)  # builds the prior's engine, which must not happen in a capture
        with constant_words(model.backbone, self.instruction), _nested(model.prior):
            self._graph, self._chunk = capture(lambda: model.act(held, self._noise))

    @torch.no_grad()
    def __call__(self, observation: Observation, noise: Tensor) -> Tensor:
        """A chunk of normalised actions, as `VegaModel.act`, [b t a] -> [b t a].

        Raises:
            ValueError: If frames, state, noise or instruction are not what it was built for.
        """
        pairs = ((self._frames, observation.frames), (self._state, observation.state), (self._noise, noise))
        shapes = [(tuple(held.shape), None if new is None else tuple(new.shape)) for held, new in pairs]
        if any(held != new for held, new in shapes) or list(observation.instruction) != self.instruction:
            raise ValueError(
                f"This step was captured for frames, state and noise of {[held for held, _ in shapes]} and "
                f"{self.instruction}; got {[new for _, new in shapes]} and {observation.instruction}. "
                "Capture another one."
            )
        for held, new in pairs:
            if new is not None:
                held.copy_(new)
        self._graph.replay()
        return self._chunk.clone()


class _Words(nn.Module):
    """Stands in for a text encoder whose sentences do not change."""

    def __init__(self, words: Tensor, is_word: Tensor) -> None:
        super().__init__()
        self._words, self._is_word = words, is_word

    def forward(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        return self._words, self._is_word


@contextmanager
def _nested(prior: Any) -> Iterator[None]:
    """Let a prior with a graph of its own run without it: graphs cannot be captured in graphs."""
    if not isinstance(prior, LatentWorldSimulator):
        yield
        return
    with prior.nested():
        yield


@contextmanager
def constant_words(backbone: Any, instruction: list[str]) -> Iterator[None]:
    """Let the backbone meet encoded words: a tokenizer runs on the host and cannot be captured."""
    encoder = backbone.text_encoder
    backbone.text_encoder = _Words(*encoder(instruction))
    try:
        yield
    finally:
        backbone.text_encoder = encoder
