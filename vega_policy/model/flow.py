"""Flow matching as pure functions: the straight path between an action chunk and noise.

Time runs from t = 1 (noise) to t = 0 (actions), as in LeRobot and openpi:

    x_t = t * noise + (1 - t) * actions        v = d x_t / d t = noise - actions

Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747), with pi0's (arXiv 2410.24164)
direction.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Velocity field: (x_t [b t a], time [b]) -> velocity [b t a]."""

Integrator = Callable[[Denoise, Tensor, int], Tensor]
"""(velocity field, noise [b t a], steps) -> actions [b t a]."""


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Point x_t on the straight path, [b t a], [b t a], [b] -> [b t a]."""
    time = time[:, None, None]
    return time * noise + (1 - time) * actions


def velocity(actions: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path, the same at every time, [b t a], [b t a] -> [b t a]."""
    return noise - actions


def sample_time(batch: int, power: float, generator: torch.Generator | None = None) -> Tensor:
    """Training times in [0.001, 1], drawn on the CPU from Beta(power, 1) by inversion, u^(1/power).

    Args:
        batch: Number of times b.
        power: First parameter of the Beta distribution; 1 is uniform, more prefers noise.
        generator: Source of randomness on the CPU; None takes torch's own.

    Returns:
        Times [b], float32.
    """
    uniform = torch.rand(batch, generator=generator)
    return 0.001 + 0.999 * uniform.pow(1 / power)


def euler(denoise: Denoise, noise: Tensor, steps: int) -> Tensor:
    """Follow the velocity field from noise (t = 1) to actions (t = 0) in equal steps, [b t a] -> [b t a]."""
    x = noise
    for step in range(steps):
        time = torch.full((len(x),), 1 - step / steps, dtype=torch.float32, device=x.device)
        x = x - denoise(x, time) / steps
    return x


def masked_mean(values: Tensor, is_pad: Tensor | None) -> Tensor:
    """Mean over the steps of a chunk that exist, per sample, [b t a], [b t] -> [b].

    A sample whose every step is padding counts as zero.
    """
    mean = values.mean(dim=-1)  # [b t]
    if is_pad is None:
        return mean.mean(dim=1)
    valid = (~is_pad).to(mean.dtype)
    return (mean * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def masked_mean_square(error: Tensor, is_pad: Tensor | None) -> Tensor:
    """Mean square over the steps of a chunk that exist, per sample, [b t a], [b t] -> [b]."""
    return masked_mean(error.square(), is_pad)
