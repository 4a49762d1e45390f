"""Part `policy`: where each millisecond of a control step with a new chunk goes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vega_policy import flow
from vega_policy.benchmark.models import random_model
from vega_policy.benchmark.timing import measure
from vega_policy.captured import CapturedAct, obstacle
from vega_policy.observation import Observation
from vega_policy.parts import ModelConfig


@torch.no_grad()
def benchmark_policy(config: ModelConfig, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a stage of one control step (batch 1), the whole step, and the captured one where there is one.

    Args:
        config: The model; its weights are random.
        device: Where it runs.
        seconds: About how long each stage is timed.

    Yields:
        `stage`, `p50_ms`, `p95_ms`.
    """
    model: Any = random_model(config, device)
    side = config.frame_size
    frames = torch.rand(1, config.views, 1, 3, side, side, device=device)
    state = torch.randn(1, config.state_dim, device=device)
    noise = torch.randn(1, config.chunk_size, config.action_dim, device=device)
    seen = Observation(frames, state, ["lift the red cube"])
    for stage, call in _stages(model, seen, noise).items():
        latency = measure(call, device, seconds)
        yield {"stage": stage, "p50_ms": latency.p50, "p95_ms": latency.p95}
    if obstacle(model, seen, noise) is None:
        captured = CapturedAct(model, seen, noise)
        latency = measure(lambda: captured(seen, noise), device, seconds)
        error = (captured(seen, noise) - model.act(seen, noise)).abs().max().item()
        yield {"stage": "whole, captured", "p50_ms": latency.p50, "p95_ms": latency.p95, "error": error}


def _stages(model: Any, seen: Observation, noise: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The stages of `VegaModel.act`, each with what the one before it gave."""
    semantic = model.semantic_features(seen)
    prior = None if model.prior is None else model.prior_features(seen)
    cached = Observation(None, seen.state, seen.instruction, semantic, prior)
    tokens = model.see(cached)
    context, mask = model.backbone.read(tokens, seen.instruction, seen.state, semantic)
    stages: dict[str, Callable[[], Any]] = {
        "semantic encoder": lambda: model.semantic_features(seen),
        "prior": lambda: model.prior_features(seen),
        "projectors and fusion": lambda: model.see(cached),
        "backbone": lambda: model.backbone.read(tokens, seen.instruction, seen.state, semantic),
        "expert": lambda: model.expert.sample(context, mask, noise, flow.euler),
        "whole": lambda: model.act(seen, noise),
    }
    if model.prior is None:
        del stages["prior"]
    return stages
