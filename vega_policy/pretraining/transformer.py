"""The small Wan's transformer, trained by flow matching on latents of clips and of single pictures."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vega_policy.pretraining.config import TransformerSettings
from vega_policy.pretraining.trainer import Draws, Loss
from vega_policy.priors.weights import PROMPT_LENGTH


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


EMPTY = ""


def write_prompts(path: Path, instructions: list[str]) -> None:
    """Embed the empty prompt and instructions, each alone, [n 384] float32, into one file."""
    from vega_policy.backbones.compact import TextEncoder  # not needed where the file was brought along

    encoder = TextEncoder(None, pretrained=True, frozen=True)
    sentences = list(dict.fromkeys([EMPTY, *instructions]))
    tensors = {}
    for index, sentence in enumerate(sentences):
        tokens, mask = encoder([sentence])
        tensors[f"{index}"] = tokens[0][mask[0]].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, draft, metadata={"sentences": json.dumps(sentences)})
    draft.rename(path)


def read_prompts(path: Path) -> dict[str, Tensor]:
    """Sentence -> its embedding without padding, [n d].

    Raises:
        FileNotFoundError: If there is no such file; says how to make it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; embed the instructions: stages=[prompts]")
    with safe_open(path, framework="pt") as file:
        sentences = json.loads(file.metadata()["sentences"])
        return {sentence: file.get_tensor(str(index)) for index, sentence in enumerate(sentences)}


class PromptTable:
    """Padded embeddings by sentence.

    Args:
        prompts: As `read_prompts` gives them.
        device: Where they are wanted.
    """

    def __init__(self, prompts: dict[str, Tensor], device: torch.device) -> None:
        self._places = {sentence: place for place, sentence in enumerate(prompts)}
        padded = [
            functional.pad(tokens, (0, 0, 0, PROMPT_LENGTH - len(tokens))) for tokens in prompts.values()
        ]
        self._table = torch.stack(padded).to(device)

    def __call__(self, sentences: list[str]) -> Tensor:
        """Embeddings of b sentences, [b 512 d].

        Raises:
            ValueError: If a sentence is not in the table.
        """
        unknown = sorted({sentence for sentence in sentences if sentence not in self._places})
        if unknown:
            raise ValueError(
                f"no embedding of {unknown[:3]} ({len(unknown)} sentences); embed the instructions of these "
                "clips: stages=[prompts]"
            )
        return self._table[[self._places[sentence] for sentence in sentences]]


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
