"""The small Wan's transformer, trained by flow matching on latents of clips and of single pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vega_policy.training.pretraining.learner import Draws, Loss
from vega_policy.training.pretraining.matching import noised, sample_time, velocity
from vega_policy.training.pretraining.prompts import PromptTable
from vega_policy.training.pretraining.settings import TransformerSettings

BATCH = 16


def predict(network: Any, latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
    """Velocity that the network predicts, noised latents [b z t h w], times [b], prompts [b 512 d]."""
    return network(latent, 1000 * time, prompt, return_dict=False)[0].float()


def matching_loss(
    network: Any,
    latents: np.ndarray,
    pictures: np.ndarray,
    instructions: list[str],
    prompts: PromptTable,
    settings: TransformerSettings,
    device: torch.device,
) -> Loss:
    """The loss of one step: clips, or single pictures of them, with their instruction or the empty prompt.

    Args:
        network: A `WanTransformer3DModel`.
        latents: Normalised latents [n z t h w].
        pictures: Those of single pictures of the same clips [n k z 1 h w].
        instructions: One a clip.
        prompts: Their embeddings.
        settings: Its training.
        device: Where the network is.
    """

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        indices = draws.order.integers(len(latents), size=settings.learning.batch_size)
        single = draws.order.random() < settings.single_frames
        moments = draws.order.integers(pictures.shape[1], size=len(indices))
        chosen = pictures[indices, moments] if single else latents[indices]
        latent = torch.from_numpy(np.ascontiguousarray(chosen)).to(device).float()
        noise = torch.randn(latent.shape, generator=draws.noise, device=device)
        time = sample_time(
            len(latent), settings.time_mean, settings.time_deviation, settings.shift, draws.noise
        )
        prompt = prompts([instructions[index] for index in indices])
        predicted = predict(network, noised(latent, noise, time), time, prompt)
        error = functional.mse_loss(predicted, velocity(latent, noise))
        return error, {"loss_frames" if single else "loss_clips": error}

    return loss


@torch.no_grad()
def loss_by_level(
    network: Any,
    latents: np.ndarray,
    instructions: list[str],
    prompts: PromptTable,
    levels: list[float],
    device: torch.device,
) -> dict[float, Tensor]:
    """Each latent's loss at fixed noise levels, the same noise whenever and whoever is measured.

    Args:
        network: A `WanTransformer3DModel`.
        latents: Normalised latents [n z t h w].
        instructions: One each.
        prompts: Their embeddings.
        levels: Noise levels in [0, 1].
        device: Where the network is.

    Returns:
        Noise level -> losses [n].
    """
    losses: dict[float, list[Tensor]] = {level: [] for level in levels}
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise on every device
    for start in range(0, len(latents), BATCH):
        latent = torch.from_numpy(np.array(latents[start : start + BATCH])).float()
        noise = torch.randn(latent.shape, generator=generator).to(device)
        latent, prompt = latent.to(device), prompts(instructions[start : start + BATCH])
        for level in levels:
            time = torch.full((len(latent),), level, device=device)
            error = predict(network, noised(latent, noise, time), time, prompt) - velocity(latent, noise)
            losses[level].append(error.square().flatten(1).mean(dim=1).cpu())
    return {level: torch.cat(parts) for level, parts in losses.items()}


def watch(
    network: Any, latents: np.ndarray, instructions: list[str], prompts: PromptTable, device: torch.device
) -> Callable[[], dict[str, float]]:
    """Loss at noise level 0.3 of a few held-out clips, and of their first frames."""
    chosen = np.linspace(0, len(latents) - 1, min(2 * BATCH, len(latents))).astype(int)
    some, told = np.array(latents[chosen]), [instructions[index] for index in chosen]

    def measure() -> dict[str, float]:
        measured = {
            name: loss_by_level(network, part, told, prompts, [0.3], device)[0.3].mean().item()
            for name, part in (("clips", some), ("frames", some[:, :, :1]))
        }
        return {f"held_out_{name}_0.3": value for name, value in measured.items()}

    return measure
