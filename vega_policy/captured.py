"""A whole control step as one CUDA graph: see, read, act without the host in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vega_policy.model import VegaModel
from vega_policy.observation import Observation
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import capture


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
        with _constant_words(model.backbone, self.instruction), _nested(model.prior):
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
def _constant_words(backbone: Any, instruction: list[str]) -> Iterator[None]:
    """Let the backbone meet encoded words: a tokenizer runs on the host and cannot be captured."""
    encoder = backbone.text_encoder
    backbone.text_encoder = _Words(*encoder(instruction))
    try:
        yield
    finally:
        backbone.text_encoder = encoder
