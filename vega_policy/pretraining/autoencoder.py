"""The small Wan's autoencoder: its loss, its fast layers, and the latents that it encodes.

Wan's own is trained with L1, LPIPS, KL and finally an adversarial loss (arXiv 2503.20314). Here no network
judges images: L1, the L1 of image gradients (which keeps edges), and KL.
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

from vega_policy.pretraining import AutoencoderSettings
from vega_policy.pretraining.clips import Clips, Loss, StepRandomness
from vega_policy.run_dir import atomic_file

_VALIDATED = 16  # held-out clips that are measured during training
_BATCH, _MEASURED = 32, 1024  # clips encoded at once, and clips whose latents give the statistics, at most


def autoencoder_loss(network: Any, clips: Clips, settings: AutoencoderSettings, device: torch.device) -> Loss:
    """Return the loss of one step of an `AutoencoderKLWan` on `device`."""

    def loss(randomness: StepRandomness) -> tuple[Tensor, dict[str, Tensor]]:
        indices = randomness.order.integers(len(clips), size=settings.learning.batch_size)
        length = int(randomness.order.choice(settings.lengths))
        frames = crop_clips(clips.take(indices), length, settings.crop, randomness.order)
        video = as_video(frames, device)
        posterior = network.encode(video).latent_dist
        decoded = network.decode(posterior.sample(generator=randomness.noise)).sample
        absolute = functional.l1_loss(decoded, video)
        edges = gradient_difference(decoded, video)
        divergence = kl_divergence(posterior.mean.float(), posterior.logvar.float())
        total = absolute + settings.gradient_weight * edges + settings.kl_weight * divergence
        return total, {"l1": absolute, "edges": edges, "kl": divergence}

    return loss


def as_video(frames: np.ndarray, device: torch.device) -> Tensor:
    """Convert frames uint8 [n t h w 3] to the autoencoder's input [n 3 t h w] in [-1, 1]."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def as_frames(video: Tensor) -> np.ndarray:
    """Invert `as_video`, [n 3 t h w] in [-1, 1] -> uint8 [n t h w 3]."""
    scaled = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).cpu().numpy()


def crop_clips(frames: np.ndarray, length: int, crop: int | None, rng: np.random.Generator) -> np.ndarray:
    """Crop all clips alike to a random window of frames and a square, [n t h w 3] -> [n t' h' w' 3].

    Raises:
        ValueError: If the clips are shorter than the window or smaller than the square.
    """
    _, t, h, w, _ = frames.shape
    side = min(h, w) if crop is None else crop
    if length > t or side > min(h, w):
        raise ValueError(
            f"vae.lengths and vae.crop give {length} frames of {side} pixels; clips have {t} of {h}x{w}"
        )
    first, top = int(rng.integers(t - length + 1)), int(rng.integers(h - side + 1))
    left = int(rng.integers(w - side + 1))
    return frames[:, first : first + length, top : top + side, left : left + side]


def gradient_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean absolute difference of the image gradients of two videos [n 3 t h w]."""
    error = one - other
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return down + (error[..., 1:] - error[..., :-1]).abs().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of a diagonal Gaussian from a standard normal, the mean over dimensions."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def make_validation(network: Any, clips: Clips, device: torch.device) -> Callable[[], dict[str, float]]:
    """Return a function that measures the mean PSNR of a few held-out clips and of their first frames."""
    frames = clips.take_spread(_VALIDATED)

    def validate() -> dict[str, float]:
        return {
            "held_out_psnr": peak_signal_to_noise(network, frames, device).mean().item(),
            "held_out_psnr_frame": peak_signal_to_noise(network, frames[:, :1], device).mean().item(),
        }

    return validate


@torch.no_grad()
def peak_signal_to_noise(network: Any, frames: np.ndarray, device: torch.device) -> Tensor:
    """Return each clip's PSNR (dB) after reconstruction from the mean, uint8 [n t h w 3] -> [n]."""
    squared = []
    for clip in frames:
        video = as_video(clip[None], device)
        decoded = network.decode(network.encode(video).latent_dist.mode()).sample
        squared.append(((decoded.clamp(-1, 1) - video) / 2).square().mean())
    return -10 * torch.log10(torch.stack(squared)).cpu()


def use_channels_last(network: Any) -> Any:
    """Lay out the kernels of an `AutoencoderKLWan`, and thereby its activations, channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
    return network


def convolve_images_in_2d(network: Any) -> Any:
    """Let the causal convolutions of an `AutoencoderKLWan` skip the empty past of single images."""
    for module in network.modules():
        if isinstance(module, WanCausalConv3d) and _is_causal_with_unit_stride(module):
            module.forward = _ImageForward(module)
    return network


def _is_causal_with_unit_stride(layer: WanCausalConv3d) -> bool:
    return layer._padding[4] == layer.kernel_size[0] - 1 and layer.stride[0] == 1


class _ImageForward:
    """`forward` of one layer: of a single image only the kernel's last time step meets data."""

    def __init__(self, layer: WanCausalConv3d) -> None:
        self._layer = layer
        self._video_forward = layer.forward

    def __call__(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        layer = self._layer
        if x.shape[2] > 1 or cache_x is not None:
            return self._video_forward(x, cache_x)
        side, _, top, *_ = (int(width) for width in layer._padding)
        weight, stride = layer.weight[:, :, -1], (layer.stride[1], layer.stride[2])
        return functional.conv2d(x[:, :, 0], weight, layer.bias, stride, (top, side))[:, :, None]


@torch.no_grad()
def posterior_means(vae: Any, frames: np.ndarray, device: torch.device) -> Tensor:
    """Return the posterior's mean, not normalised, uint8 [n t h w 3] -> [n z t' h/8 w/8] float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        return vae.encode(as_video(frames, device)).latent_dist.mode().float()


def measure_statistics(vae: Any, clips: Clips, device: torch.device) -> None:
    """Write each channel's mean and standard deviation over clips into the autoencoder's config."""
    chosen = clips.spread(_MEASURED)
    total = torch.zeros(2, vae.config.z_dim, dtype=torch.float64, device=device)
    count = 0
    for part in np.array_split(chosen, -(-len(chosen) // _BATCH)):
        latent = posterior_means(vae, clips.take(part), device).double()
        total += torch.stack([latent.sum(dim=(0, 2, 3, 4)), latent.square().sum(dim=(0, 2, 3, 4))])
        count += latent.numel() // latent.shape[1]
    mean, square = total / count
    deviation = (square - mean.square()).clamp(min=1e-12).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def normalise(vae: Any, latent: Tensor) -> Tensor:
    """Normalise latents [n z t h w] by the statistics of the autoencoder's config."""
    return (latent - _column(vae.config.latents_mean, latent)) / _column(vae.config.latents_std, latent)


def denormalise(vae: Any, latent: Tensor) -> Tensor:
    """Invert `normalise`."""
    return latent * _column(vae.config.latents_std, latent) + _column(vae.config.latents_mean, latent)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None, None]


def write_latents(path: Path, vae: Any, clips: Clips, device: torch.device) -> np.ndarray:
    """Return normalised latents of all clips, float16 [n z t' h/8 w/8], mapped into memory.

    They are computed once: the file's name must identify autoencoder and clips.
    """
    return _write_once(path, clips, lambda frames: _encode(vae, frames, device))


def write_image_latents(path: Path, vae: Any, clips: Clips, device: torch.device) -> np.ndarray:
    """Return latents of every fourth frame as a single image, float16 [n t' z 1 h/8 w/8].

    Only a clip's first latent frame is that of a single image, all others depend on earlier frames; a
    policy's prior reads single images.
    """

    def encode(frames: np.ndarray) -> np.ndarray:
        singles = frames[:, ::4, None]
        latents = _encode(vae, singles.reshape(-1, *singles.shape[2:]), device)
        return latents.reshape(len(frames), -1, *latents.shape[1:])

    return _write_once(path, clips, encode)


def _encode(vae: Any, frames: np.ndarray, device: torch.device) -> np.ndarray:
    return normalise(vae, posterior_means(vae, frames, device)).half().cpu().numpy()


def _write_once(path: Path, clips: Clips, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if not path.is_file():
        parts = np.array_split(np.arange(len(clips)), -(-len(clips) // _BATCH))
        encoded = [encode(clips.take(part)) for part in tqdm(parts, desc="Encoding", mininterval=1.0)]
        with atomic_file(path) as draft, draft.open("wb") as file:
            np.save(file, np.concatenate(encoded))
    return np.load(path, mmap_mode="r")
