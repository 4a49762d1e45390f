"""The small Wan's transformer, trained by flow matching on latents of clips and of single images.

Clips are noised alike in all latents (text to video), or but for the first one (image to video): that one is
clean and has time 0, as in Wan2.2-TI2V, and only the others are predicted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from vega_policy.pretraining import TransformerSettings
from vega_policy.pretraining.clips import Loss, StepRandomness
from vega_policy.priors.base import PROMPT_LENGTH
from vega_policy.run_dir import write_tensors

BATCH = 16  # clips that are measured at once
EMPTY = ""


def add_noise(latent: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the point z_t of the straight path, [b ...], [b ...], [b] -> [b ...]."""
    time = time.reshape(-1, *[1] * (latent.ndim - 1))
    return (1 - time) * latent + time * noise


def velocity(latent: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of the straight path, the same at every time, [b ...], [b ...] -> [b ...]."""
    return noise - latent


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move times [b] towards noise by a shift s > 1; 0 and 1 stay."""
    return shift * time / (1 + (shift - 1) * time)


def sample_time(
    batch: int, mean: float, deviation: float, shift: float, generator: torch.Generator
) -> Tensor:
    """Draw training times in (0, 1), [b]: the logit is normal, then shifted."""
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return shift_time(torch.sigmoid(mean + deviation * normal), shift)


def continue_frame(latent: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents [b z t h w] whose first one is clean, the others noised, and their times [b t]."""
    noisy = torch.cat([latent[:, :, :1], add_noise(latent, noise, time)[:, :, 1:]], dim=2)
    times = time[:, None].repeat(1, latent.shape[2])
    times[:, 0] = 0
    return noisy, times


def predict_velocity(network: Any, latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
    """Predict the velocity of noisy latents [b z t h w] at times [b] or [b t] with prompts [b 512 d]."""
    if time.ndim == 2:
        _, ph, pw = network.config.patch_size
        time = time.repeat_interleave(latent.shape[3] // ph * (latent.shape[4] // pw), dim=1)  # [b tokens]
    return network(latent, 1000 * time, prompt, return_dict=False)[0].float()


def matching_loss(
    network: Any,
    latents: np.ndarray,
    image_latents: np.ndarray,
    instructions: list[str],
    prompts: "PromptTable",
    settings: TransformerSettings,
    device: torch.device,
) -> Loss:
    """Return the loss of one step of a `WanTransformer3DModel`, on clips or on single images of them.

    Latents are normalised: clips [n z t h w], k single images of each clip [n k z 1 h w].
    """

    def loss(randomness: StepRandomness) -> tuple[Tensor, dict[str, Tensor]]:
        indices = randomness.order.integers(len(latents), size=settings.learning.batch_size)
        single = randomness.order.random() < settings.single_frames
        continues = not single and _draw(settings.image_to_video, randomness.order)
        moments = randomness.order.integers(image_latents.shape[1], size=len(indices))
        chosen = image_latents[indices, moments] if single else latents[indices]
        latent = torch.from_numpy(np.ascontiguousarray(chosen)).to(device).float()
        noise = torch.randn(latent.shape, generator=randomness.noise, device=device)
        time = sample_time(
            len(latent), settings.time_mean, settings.time_deviation, settings.shift, randomness.noise
        )
        prompt = prompts([instructions[index] for index in indices])
        if continues:
            is_pure = torch.rand(time.shape, generator=randomness.noise, device=device) < settings.pure_noise
            time = time.masked_fill(is_pure, 1.0)
            error = future_error(network, latent, noise, time, prompt).mean()
            return error, {"loss_future": error}
        predicted = predict_velocity(network, add_noise(latent, noise, time), time, prompt)
        error = functional.mse_loss(predicted, velocity(latent, noise))
        return error, {"loss_frames" if single else "loss_clips": error}

    return loss


def _draw(fraction: float, rng: np.random.Generator) -> bool:
    """Return true in a fraction of the calls; 0 draws nothing, so that other draws stay as they are."""
    return fraction > 0 and rng.random() < fraction


def future_error(network: Any, latent: Tensor, noise: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
    """Return the squared error of the velocity of all latents but the clean first one, [b z t-1 h w]."""
    predicted = predict_velocity(network, *continue_frame(latent, noise, time), prompt)
    return (predicted - velocity(latent, noise))[:, :, 1:].square()


def make_validation(
    network: Any,
    latents: np.ndarray,
    instructions: list[str],
    prompts: "PromptTable",
    device: torch.device,
    continues: bool = False,
) -> Callable[[], dict[str, float]]:
    """Return a function that measures the loss at noise level 0.3 on held-out clips and first frames.

    With `continues` also that of continuing their first frames from pure noise, beside the loss of a video in
    which nothing moves.
    """
    chosen = np.linspace(0, len(latents) - 1, min(2 * BATCH, len(latents))).astype(int)
    clips, texts = np.array(latents[chosen]), [instructions[index] for index in chosen]

    def validate() -> dict[str, float]:
        losses = {
            name: loss_by_level(network, part, texts, prompts, [0.3], device)[0.3]
            for name, part in (("clips", clips), ("frames", clips[:, :, :1]))
        }
        measured = {f"held_out_{name}_0.3": loss.mean().item() for name, loss in losses.items()}
        if continues:
            futures = loss_by_level(network, clips, texts, prompts, [1.0], device, continues=True)
            measured["held_out_future_1.0"] = futures[1.0].mean().item()
            measured["held_out_still_1.0"] = still_loss(clips).mean().item()
        return measured

    return validate


@torch.no_grad()
def loss_by_level(
    network: Any,
    latents: np.ndarray,
    instructions: list[str],
    prompts: "PromptTable",
    levels: list[float],
    device: torch.device,
    continues: bool = False,
) -> dict[float, Tensor]:
    """Return the losses [n] of normalised latents [n z t h w] by noise level, always with the same noise.

    With `continues` they are those of the latents behind a clean first one.
    """
    losses: dict[float, list[Tensor]] = {level: [] for level in levels}
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise on every device
    for start in range(0, len(latents), BATCH):
        latent = torch.from_numpy(np.array(latents[start : start + BATCH])).float()
        noise = torch.randn(latent.shape, generator=generator).to(device)
        latent, prompt = latent.to(device), prompts(instructions[start : start + BATCH])
        for level in levels:
            time = torch.full((len(latent),), level, device=device)
            if continues:
                error = future_error(network, latent, noise, time, prompt)
                losses[level].append(error.flatten(1).mean(dim=1).cpu())
                continue
            predicted = predict_velocity(network, add_noise(latent, noise, time), time, prompt)
            error = predicted - velocity(latent, noise)
            losses[level].append(error.square().flatten(1).mean(dim=1).cpu())
    return {level: torch.cat(parts) for level, parts in losses.items()}


def still_loss(latents: np.ndarray) -> Tensor:
    """Return the loss [n] of predicting the first latent again, at any noise level, [n z t h w]."""
    latent = torch.from_numpy(np.array(latents)).float()
    return (latent[:, :, 1:] - latent[:, :, :1]).square().flatten(1).mean(dim=1)


def write_prompts(path: Path, instructions: list[str]) -> None:
    """Write the embeddings of the empty prompt and of instructions, each [n 384] float32, to one file."""
    # not needed where the file was copied from elsewhere
    from vega_policy.backbones.compact import TextEncoder

    encoder = TextEncoder(None, pretrained=True, frozen=True)
    sentences = list(dict.fromkeys([EMPTY, *instructions]))
    tensors = {}
    for index, sentence in enumerate(sentences):
        tokens, mask = encoder([sentence])
        tensors[f"{index}"] = tokens[0][mask[0]].contiguous()
    write_tensors(path, tensors, {"sentences": json.dumps(sentences)})


def read_prompts(path: Path) -> dict[str, Tensor]:
    """Return the embedding of each sentence without padding, [n d].

    Raises:
        FileNotFoundError: If there is no such file; says how to make it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; embed the instructions: stages=[prompts]")
    with safe_open(path, framework="pt") as file:
        sentences = json.loads(file.metadata()["sentences"])
        return {sentence: file.get_tensor(str(index)) for index, sentence in enumerate(sentences)}


class PromptTable:
    """Padded embeddings on a device, by sentence."""

    def __init__(self, prompts: dict[str, Tensor], device: torch.device) -> None:
        self._indices = {sentence: index for index, sentence in enumerate(prompts)}
        padded = [
            functional.pad(tokens, (0, 0, 0, PROMPT_LENGTH - len(tokens))) for tokens in prompts.values()
        ]
        self._table = torch.stack(padded).to(device)

    def __call__(self, sentences: list[str]) -> Tensor:
        """Return the embeddings of b sentences, [b 512 d]."""
        unknown = sorted({sentence for sentence in sentences if sentence not in self._indices})
        if unknown:
            raise ValueError(
                f"no embedding of {unknown[:3]} ({len(unknown)} sentences); embed the instructions of these "
                "clips: stages=[prompts]"
            )
        return self._table[[self._indices[sentence] for sentence in sentences]]
