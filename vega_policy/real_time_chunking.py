"""Real-time chunking of VEGA's own experts: a chunk that goes on from what is left of the last one."""

from typing import Any

import torch
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor


def left_over(padded: Tensor | None, chunk_size: int) -> Tensor | None:
    """Return what is left of the last chunk, [1 t a]; None if nothing is.

    LeRobot's rollout pads it with zeros to a fixed length, and the new chunk would be drawn to those.

    Args:
        padded: Normalised actions [t a] or [1 t a]; None for the first chunk.
        chunk_size: Most actions that a chunk holds.
    """
    if padded is None:
        return None
    left = padded.reshape(-1, padded.shape[-1])[:chunk_size]
    told = left.ne(0).any(dim=-1).nonzero()
    return left[None, : int(told[-1]) + 1] if len(told) else None


def blend(
    processor: RTCProcessor,
    chunk: Tensor,
    left: Tensor,
    inference_delay: int = 0,
    execution_horizon: int | None = None,
) -> Tensor:
    """Begin a chunk as what is left goes on: kept in the delay, then less and less.

    An L1 expert has no flow to guide, so its chunk itself is weighed against what is left.

    Args:
        processor: Has the weights, those of a flow's guidance (Black et al., arXiv 2506.07339).
        chunk: The new chunk [b t a].
        left: What is left of the last one [1 t a].
        inference_delay: How many actions will have been executed when the new chunk arrives.
        execution_horizon: Up to which action the chunks are blended; None takes the processor's.
    """
    horizon = execution_horizon or processor.rtc_config.execution_horizon
    length = min(horizon, left.shape[1])
    weights = processor.get_prefix_weights(inference_delay, length, chunk.shape[1])
    kept = torch.nn.functional.pad(left, (0, 0, 0, chunk.shape[1] - left.shape[1]))
    weights = weights.to(chunk)[:, None]  # [t 1]
    return weights * kept.to(chunk) + (1 - weights) * chunk


def integrate(denoise: Any, noise: Tensor, steps: int, **guidance: Any) -> Tensor:
    """LeRobot's Euler integrator, so that its real-time chunking applies.

    That one takes the velocity's Jacobian for the identity, but would still record the network's graph.

    Args:
        denoise: Velocity of actions [b t a] at times [b].
        noise: Where the flow starts, [b t a].
        steps: Number of Euler steps.
        **guidance: `rtc_processor`, `rtc_enabled` and what they need.
    """
    return euler_integrate(torch.no_grad()(denoise), noise, steps, **guidance)
