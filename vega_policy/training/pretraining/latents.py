"""Latents of clips: their statistics, which Wan keeps in the autoencoder's config, and a copy on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.training.pretraining.autoencoder import as_video
from vega_policy.training.pretraining.clips import Clips

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
