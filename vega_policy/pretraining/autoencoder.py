"""The small Wan's autoencoder: reconstruction of clips and of single pictures, with a weak Gaussian prior.

Wan's own is trained with L1, LPIPS, KL and at last an adversarial loss (arXiv 2503.20314). Here no network
judges pictures: L1, the L1 of image gradients (which keeps edges), and KL.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vega_policy.pretraining.clips import Clips
from vega_policy.pretraining.config import AutoencoderSettings
from vega_policy.pretraining.trainer import Draws, Loss

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


def pictures_in_two_dimensions(network: Any) -> Any:
    """Let the causal convolutions of a network skip the empty past of single pictures.

    Args:
        network: An `AutoencoderKLWan`, which is changed.
    """
    for module in network.modules():
        if isinstance(module, WanCausalConv3d) and _only_sees_the_past(module):
            module.forward = _Forward(module)
    return network


def channels_last(network: Any) -> Any:
    """Lay the kernels of a network, and with them its activations, pixel by pixel in memory.

    Args:
        network: An `AutoencoderKLWan`, which is changed.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
    return network


def _only_sees_the_past(layer: WanCausalConv3d) -> bool:
    return layer._padding[4] == layer.kernel_size[0] - 1 and layer.stride[0] == 1


class _Forward:
    """`forward` of one layer."""

    def __init__(self, layer: WanCausalConv3d) -> None:
        self._layer = layer
        self._video = layer.forward

    def __call__(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        layer = self._layer
        if x.shape[2] > 1 or cache_x is not None:
            return self._video(x, cache_x)
        side, _, top, *_ = (int(width) for width in layer._padding)
        weight, stride = layer.weight[:, :, -1], (layer.stride[1], layer.stride[2])
        return functional.conv2d(x[:, :, 0], weight, layer.bias, stride, (top, side))[:, :, None]


BATCH, MEASURED = 32, 1024
"""Clips encoded at once, and clips whose latents give the statistics, at most."""


@torch.no_grad()
def posterior_means(vae: Any, frames: np.ndarray, device: torch.device) -> Tensor:
    """Mean of the posterior, not normalised, uint8 [n t h w 3] -> [n z t' h/8 w/8] float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        return vae.encode(as_video(frames, device)).latent_dist.mode().float()


def measure_statistics(vae: Any, clips: Clips, device: torch.device) -> None:
    """Write each channel's mean and standard deviation over clips into the autoencoder's config."""
    chosen = np.linspace(0, len(clips) - 1, min(MEASURED, len(clips))).astype(int)
    total = torch.zeros(2, vae.config.z_dim, dtype=torch.float64, device=device)
    count = 0
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        latent = posterior_means(vae, clips.take(part), device).double()
        total += torch.stack([latent.sum(dim=(0, 2, 3, 4)), latent.square().sum(dim=(0, 2, 3, 4))])
        count += latent.numel() // latent.shape[1]
    mean, square = total / count
    deviation = (square - mean.square()).clamp(min=1e-12).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def normalised(vae: Any, latent: Tensor) -> Tensor:
    """Latents [n z t h w] with the statistics of the autoencoder's config taken out."""
    return (latent - _column(vae.config.latents_mean, latent)) / _column(vae.config.latents_std, latent)


def restored(vae: Any, latent: Tensor) -> Tensor:
    """The inverse of `normalised`."""
    return latent * _column(vae.config.latents_std, latent) + _column(vae.config.latents_mean, latent)


def write_latents(path: Path, vae: Any, clips: Clips, device: torch.device) -> np.ndarray:
    """Normalised latents of all clips, float16 [n z t' h/8 w/8], mapped into memory; kept for the next start.

    Args:
        path: File whose name tells autoencoder and clips apart.
        vae: The autoencoder.
        clips: The clips.
        device: Where the autoencoder is.
    """
    return _written(path, clips, lambda frames: _encoded(vae, frames, device))


def write_picture_latents(path: Path, vae: Any, clips: Clips, device: torch.device) -> np.ndarray:
    """Latents of every fourth frame as a video of its own, float16 [n t' z 1 h/8 w/8]; see `write_latents`.

    A clip's first latent frame is that of its first picture alone, all others know what came before; a prior
    is read on single pictures.
    """

    def encode(frames: np.ndarray) -> np.ndarray:
        singles = frames[:, ::4, None]
        latents = _encoded(vae, singles.reshape(-1, *singles.shape[2:]), device)
        return latents.reshape(len(frames), -1, *latents.shape[1:])

    return _written(path, clips, encode)


def _encoded(vae: Any, frames: np.ndarray, device: torch.device) -> np.ndarray:
    return normalised(vae, posterior_means(vae, frames, device)).half().cpu().numpy()


def _written(path: Path, clips: Clips, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if not path.is_file():
        parts = np.array_split(np.arange(len(clips)), -(-len(clips) // BATCH))
        encoded = [encode(clips.take(part)) for part in tqdm(parts, desc="Encoding", mininterval=1.0)]
        draft = path.with_suffix(".partial")
        with draft.open("wb") as file:
            np.save(file, np.concatenate(encoded))
        draft.rename(path)
    return np.load(path, mmap_mode="r")


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None, None]
