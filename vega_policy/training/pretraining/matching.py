"""Flow matching on latents as pure functions, in the convention of VEGA-3D's reader and of Wan.

Time runs from t = 0 (data) to t = 1 (noise), and t is the noise level that a prior is read at:

    z_t = (1 - t) z_0 + t noise        v = d z_t / d t = noise - z_0        the network is told 1000 t

Wan's report (arXiv 2503.20314) trains a rectified flow with logit-normally distributed times and joint
batches of pictures and videos; its published schedule shifts times by s t / (1 + (s - 1) t) with s = 3 or 5
when sampling. How much it shifted in training is not published. Our choice: logit-normal (0, 1) and no shift,
because shifting makes up for many correlated tokens, and these latents have few.
"""

import torch
from torch import Tensor


def noised(latent: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Point z_t on the straight path, [b ...], [b ...], [b] -> [b ...]."""
    time = time.reshape(-1, *[1] * (latent.ndim - 1))
    return (1 - time) * latent + time * noise


def velocity(latent: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path, the same at every time, [b ...], [b ...] -> [b ...]."""
    return noise - latent


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times moved towards noise by a shift s > 1, [b] -> [b]; 0 and 1 stay."""
    return shift * time / (1 + (shift - 1) * time)


def sample_time(
    batch: int, mean: float, deviation: float, shift: float, generator: torch.Generator
) -> Tensor:
    """Training times in (0, 1), [b]: the logit is normal, then shifted."""
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return shifted(torch.sigmoid(mean + deviation * normal), shift)
