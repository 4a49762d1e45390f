"""Flow matching as pure functions: the straight path between an action chunk and noise.

Time runs from t = 1 (noise) to t = 0 (actions), as in LeRobot and openpi:

    x_t = t * noise + (1 - t) * actions        v = d x_t / d t = noise - actions

Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747), with pi0's (arXiv 2410.24164)
direction.
"""

from collections.abc import Callable

import torch
from torch import Tensor

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t [b t a], time [b]) -> velocity [b t a]."""

Integrator = Callable[[VelocityField, Tensor, int], Tensor]
"""(velocity field, noise [b t a], steps) -> actions [b t a]."""


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the point x_t on the straight path, [b t a], [b t a], [b] or [b t] -> [b t a]."""
    time = time[:, None, None] if time.dim() == 1 else time[..., None]
    return time * noise + (1 - time) * actions


def velocity(actions: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of the straight path, the same at every time, [b t a], [b t a] -> [b t a]."""
    return noise - actions


def sample_time(batch: int, power: float, generator: torch.Generator | None = None) -> Tensor:
    """Sample training times in [0.001, 1] on the CPU, float32 [batch].

    They follow Beta(power, 1), sampled by inversion as u^(1 / power): 1 is uniform, more prefers noise.
    """
    uniform = torch.rand(batch, generator=generator)
    return 0.001 + 0.999 * uniform.pow(1 / power)


def euler(field: VelocityField, noise: Tensor, steps: int) -> Tensor:
    """Integrate from noise (t = 1) to actions (t = 0) in equal Euler steps, [b t a] -> [b t a]."""
    x = noise
    for step in range(steps):
        time = torch.full((len(x),), 1 - step / steps, dtype=torch.float32, device=x.device)
        x = x - field(x, time) / steps
    return x


def masked_mean(values: Tensor, is_pad: Tensor | None) -> Tensor:
    """Return the mean over the unpadded steps of each sample, [b t a], [b t] -> [b].

    A sample of padding only counts as zero.
    """
    mean = values.mean(dim=-1)  # [b t]
    if is_pad is None:
        return mean.mean(dim=1)
    valid = (~is_pad).to(mean.dtype)
    return (mean * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def masked_mean_square(error: Tensor, is_pad: Tensor | None) -> Tensor:
    """Return the mean square over the unpadded steps of each sample, [b t a], [b t] -> [b]."""
    return masked_mean(error.square(), is_pad)
