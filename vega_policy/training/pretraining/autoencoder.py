"""The small Wan's autoencoder: reconstruction of clips and of single pictures, with a weak Gaussian prior.

Wan's own is trained with L1, LPIPS, KL and at last an adversarial loss (arXiv 2503.20314). Here no network
judges pictures: L1, the L1 of image gradients (which keeps edges), and KL.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vega_policy.training.pretraining.clips import Clips
from vega_policy.training.pretraining.learner import Draws, Loss
from vega_policy.training.pretraining.settings import AutoencoderSettings

WATCHED = 16
"""Held-out clips that are looked at while it learns."""


def as_video(frames: np.ndarray, device: torch.device) -> Tensor:
    """Frames uint8 [n t h w 3] as the autoencoder takes them, [n 3 t h w] in [-1, 1]."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def cut(frames: np.ndarray, length: int, crop: int | None, rng: np.random.Generator) -> np.ndarray:
    """A window of a number of frames and a square, the same for all clips, [n t h w 3] -> [n t' h' w' 3].

    Raises:
        ValueError: If the clips are shorter than the window or smaller than the square.
    """
    _, t, h, w, _ = frames.shape
    side = min(h, w) if crop is None else crop
    if length > t or side > min(h, w):
        raise ValueError(
            f"vae.lengths and vae.crop ask for {length} frames of {side} pixels; clips have {t} of {h}x{w}"
        )
    first, top = int(rng.integers(t - length + 1)), int(rng.integers(h - side + 1))
    left = int(rng.integers(w - side + 1))
    return frames[:, first : first + length, top : top + side, left : left + side]


def gradient_difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of the image gradients of two videos [n 3 t h w]."""
    error = one - other
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return down + (error[..., 1:] - error[..., :-1]).abs().mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of a diagonal Gaussian to a standard normal, the mean over its numbers."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def autoencoder_loss(network: Any, clips: Clips, settings: AutoencoderSettings, device: torch.device) -> Loss:
    """The loss of one step.

    Args:
        network: An `AutoencoderKLWan`.
        clips: What is learned from.
        settings: Its training.
        device: Where the network is.
    """

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        indices = draws.order.integers(len(clips), size=settings.learning.batch_size)
        length = int(draws.order.choice(settings.lengths))
        video = as_video(cut(clips.take(indices), length, settings.crop, draws.order), device)
        posterior = network.encode(video).latent_dist
        decoded = network.decode(posterior.sample(generator=draws.noise)).sample
        absolute = functional.l1_loss(decoded, video)
        edges = gradient_difference(decoded, video)
        spread = divergence(posterior.mean.float(), posterior.logvar.float())
        total = absolute + settings.gradient_weight * edges + settings.kl_weight * spread
        return total, {"l1": absolute, "edges": edges, "kl": spread}

    return loss


@torch.no_grad()
def peak_signal_to_noise(network: Any, frames: np.ndarray, device: torch.device) -> Tensor:
    """PSNR in dB of each clip's reconstruction from the posterior's mean, uint8 [n t h w 3] -> [n]."""
    squared = []
    for clip in frames:
        video = as_video(clip[None], device)
        decoded = network.decode(network.encode(video).latent_dist.mode()).sample
        squared.append(((decoded.clamp(-1, 1) - video) / 2).square().mean())
    return -10 * torch.log10(torch.stack(squared)).cpu()


def watch(network: Any, clips: Clips, device: torch.device) -> Callable[[], dict[str, float]]:
    """Mean PSNR of a few held-out clips and of their first frames."""
    frames = clips.take(np.linspace(0, len(clips) - 1, min(WATCHED, len(clips))).astype(int))

    def measure() -> dict[str, float]:
        return {
            "held_out_psnr": peak_signal_to_noise(network, frames, device).mean().item(),
            "held_out_psnr_frame": peak_signal_to_noise(network, frames[:, :1], device).mean().item(),
        }

    return measure
