"""Fewer, larger kernels on a GPU: blocks compiled for training, and a control step as one CUDA graph.

Uncompiled, a training step of the compact policy spends its time between the matrix products: casts of
autocast, norms, activations and sums each read and write whole activations. Compiled, these are one kernel.
Blocks of one kind share one compiled function, so compilation takes seconds; weights and checkpoints do not
change. A captured control step goes from observation to actions without work on the host in between.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vega_policy.backbones.compact import CompactBackbone
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.priors.baselines import PrecomputedPrior
from vega_policy.priors.unet import StableVideoDiffusion
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import capture


def compile_blocks(model: VegaModel, **options: Any) -> None:
    """Compile image encoder, projectors, fusion, trunk and head, each for the first shapes it is called with.

    Options are those of `torch.compile`.

    Raises:
        ValueError: If it is another backbone, or a base.
    """
    if not isinstance(model, VegaModel) or not isinstance(model.backbone, CompactBackbone):
        found = type(model.backbone if isinstance(model, VegaModel) else model).__name__
        raise ValueError(f"compile=true compiles the compact backbone; got {found}. Set compile=false.")
    backbone = model.backbone
    parts = [backbone.project_image, backbone.project_state, *backbone.blocks]
    if not backbone.image_encoder.frozen:
        parts.append(backbone.image_encoder)
    if model.prior is not None and not model.fusion.reads_instruction:
        parts += [model.project, model.fusion]
    if model.forecast is not None:
        parts += [*model.forecast.blocks, *([model.forecast.target] if model.forecast.target else [])]
    for part in [*parts, *model.head.blocks]:
        part.compile(**({"dynamic": False} | options))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model uncompiled, for shapes and modes that it was not compiled for."""
    held = [(part, part._compiled_call_impl) for part in model.modules()]
    for part, _ in held:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, compiled in held:
            part._compiled_call_impl = compiled


logger = logging.getLogger(__name__)

Step = Callable[[Observation, Tensor], Tensor]
"""(observation, noise [b t a]) -> chunk of normalised actions [b t a]."""


class CapturedControlStep:
    """`VegaModel.sample_actions` for one batch shape and its instructions, replayed as one CUDA graph.

    Small policies leave a GPU waiting for the host, which launches thousands of kernels per chunk; a graph
    launches them at once. Instructions are encoded when the graph is captured. The model is in evaluation
    mode.

    Raises:
        ValueError: If the model is not on a CUDA device or the observation has no frames.
    """

    @torch.no_grad()
    def __init__(self, model: VegaModel, observation: Observation, noise: Tensor) -> None:
        if not noise.is_cuda or observation.frames is None:
            raise ValueError("A captured step needs frames and a CUDA device; use VegaModel.sample_actions.")
        self.instruction = list(observation.instruction)
        self._frames, self._state = observation.frames.clone(), observation.state.clone()
        self._noise = noise.clone()
        held = Observation(self._frames, self._state, self.instruction)
        model.sample_actions(held, self._noise)  # builds the prior's engine, which a capture cannot
        words = model.backbone.text_encoder(self.instruction)  # a tokenizer runs on the host
        held = replace(held, words=words)
        with _without_own_graph(model.prior):
            self._graph, self._chunk = capture(lambda: model.sample_actions(held, self._noise))

    @torch.no_grad()
    def __call__(self, observation: Observation, noise: Tensor) -> Tensor:
        """Return a chunk of normalised actions, [b t a] -> [b t a]."""
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


class CapturedSteps:
    """Control steps of one model, captured per kind when a kind occurs for the second time.

    A kind is the shapes of the inputs, the instructions and the version of the text encoder's weights. Each
    captured kind keeps its own memory, `capacity` at most. Steps that cannot be captured, or that exceed the
    capacity, run uncaptured; the log says why, once.
    """

    def __init__(
        self,
        enabled: bool,
        capture: Callable[[VegaModel, Observation, Tensor], Step] = CapturedControlStep,
        capacity: int = 4,
    ) -> None:
        self._enabled, self._capture, self._capacity = enabled, capture, capacity
        self._kinds: dict[Hashable, Step | None] = {}  # None: occurred once
        self._logged: set[str] = set()

    def clear(self) -> None:
        """Drop all captured steps, because weights have moved in memory."""
        self._kinds.clear()

    def sample_actions(
        self, model: VegaModel, observation: Observation, noise: Tensor, uncaptured: Step
    ) -> Tensor:
        """Return a chunk of normalised actions from a captured step, or from `uncaptured`."""
        if not self._enabled:
            return uncaptured(observation, noise)
        reason = capture_obstacle(model, observation, noise)
        if reason is not None:
            self._log_once(reason)
            return uncaptured(observation, noise)
        assert observation.frames is not None  # `capture_obstacle` checks it
        shapes = (observation.frames.shape, observation.state.shape, noise.shape)
        types = (observation.frames.dtype, noise.dtype)
        version = sum(weight._version for weight in model.backbone.text_encoder.parameters())
        kind = (shapes, types, tuple(observation.instruction), version)
        step, is_known = self._kinds.get(kind), kind in self._kinds
        if is_known and step is None:
            logger.info("Capturing the control step for frames of %s.", list(observation.frames.shape))
            step = self._capture(model, observation, noise)
        if not is_known and not self._make_room():
            self._log_once(f"{self._capacity} other kinds are captured already")
            return uncaptured(observation, noise)
        self._kinds[kind] = step
        return uncaptured(observation, noise) if step is None else step(observation, noise)

    def _make_room(self) -> bool:
        """Evict the oldest kind that occurred once, if need be; return whether there is room."""
        if len(self._kinds) < self._capacity:
            return True
        once = next((kind for kind, step in self._kinds.items() if step is None), None)
        if once is None:
            return False
        del self._kinds[once]
        return True

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            logger.info("Control steps are not captured: %s.", reason)
            self._logged.add(reason)


def capture_obstacle(model: VegaModel, observation: Observation, noise: Tensor) -> str | None:
    """Return why a step cannot be captured, or None if it can."""
    if not noise.is_cuda:
        return f"a CUDA graph needs a GPU, and this is {noise.device}"
    if not isinstance(model.backbone, CompactBackbone):
        return f"the backbone {model.config.backbone.name} prepares its inputs on the host"
    if observation.frames is None or observation.semantic is not None or observation.prior is not None:
        return "features are given instead of frames"
    if isinstance(model.prior, PrecomputedPrior | StableVideoDiffusion):
        return f"the prior {model.config.prior.name} runs on the host"
    if model.training or torch.is_autocast_enabled():
        return "the model is in training mode, or runs under autocast"
    return None


def _without_own_graph(prior: Any) -> AbstractContextManager[Any]:
    """Let a prior run without its own CUDA graph: graphs cannot be captured in graphs."""
    return prior.nested() if isinstance(prior, LatentWorldSimulator) else nullcontext()
