"""The trained parts in the hub's folder layout, in bfloat16, as `vega_policy.priors.wan` loads them.

<output_dir>/wan_tiny/vae/ transformer/ scheduler/ empty_prompt.safetensors README.md
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from vega_policy.pretraining.autoencoder import normalised, peak_signal_to_noise, posterior_means, restored
from vega_policy.pretraining.clips import Clips
from vega_policy.pretraining.config import PretrainSettings
from vega_policy.pretraining.transformer import BATCH, EMPTY, PromptTable, loss_by_level, predict
from vega_policy.provenance import hardware
from vega_policy.run_dir import atomic_folder, write_json, write_text

LARGEST = 24_000_000
"""Bytes that a shipped folder may have."""


def write_part(network: Any, target: Path) -> None:
    """Write one network in bfloat16, whole or not at all."""
    state = network.state_dict()
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    with atomic_folder(target) as folder:
        network.save_config(folder)
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def take_weights(network: Any, path: Path) -> None:
    """Put the weights of a part that was written into a network.

    Raises:
        ValueError: If they are of another architecture.
    """
    weights = load_file(path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in network.state_dict().items()}:
        raise ValueError(f"{path} holds another architecture than the one that is trained")
    network.load_state_dict(weights)


def write_rest(folder: Path, prompt: Tensor, shift: float) -> None:
    """Write the scheduler's config and the embedding of the empty prompt, [n d].

    Args:
        folder: The checkpoint's folder.
        prompt: Embedding of the empty prompt, without padding.
        shift: The schedule's shift when sampling.
    """
    make_scheduler(shift).save_pretrained(folder / "scheduler")
    save_file({"prompt": prompt.float().contiguous()}, folder / "empty_prompt.safetensors")


def make_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Wan's solver: UniPC on the straight path."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def load_vae(folder: Path, device: torch.device) -> Any:
    """The autoencoder that was written, in float32."""
    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_transformer(folder: Path, device: torch.device) -> Any:
    """The transformer that was written, in float32."""
    network: Any = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return network.to(device).eval().requires_grad_(False)


def check_size(folder: Path) -> int:
    """Bytes of a checkpoint.

    Raises:
        ValueError: If it is too large to be shipped.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"{folder} has {size} bytes; at most {LARGEST} are shipped")
    return size


SHOWN, SAMPLES, FRAMES_PER_SECOND = 6, 4, 5
Figures = dict[str, Any]


def interval(values: Tensor) -> dict[str, float]:
    """Mean of independent values [n] with a normal 95% interval."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    mean = values.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def measure(
    vae: Any, transformer: Any, clips: Clips, prompts: PromptTable, settings: PretrainSettings
) -> Figures:
    """Reconstruction and validation loss on held-out clips.

    Args:
        vae: The autoencoder that was written.
        transformer: The transformer that was written.
        clips: Held-out clips.
        prompts: Embeddings of their instructions.
        settings: The run.
    """
    device = next(vae.parameters()).device
    chosen = np.linspace(0, len(clips) - 1, min(settings.report.clips, len(clips))).astype(int)
    frames, told = clips.take(chosen), [clips.instructions[index] for index in chosen]
    parts = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
    latents = torch.cat([normalised(vae, posterior_means(vae, part, device)).cpu() for part in parts]).numpy()
    levels = settings.report.noise_levels
    losses = {
        name: loss_by_level(transformer, shown, told, prompts, levels, device)
        for name, shown in (("clips", latents), ("frames", latents[:, :, :1]))
    }
    return {
        "psnr_clips": interval(peak_signal_to_noise(vae, frames, device)),
        "psnr_frames": interval(peak_signal_to_noise(vae, frames[:, :1], device)),
        "loss": {
            f"{level:g}": {name: interval(by_level[level]) for name, by_level in losses.items()}
            for level in levels
        },
        "loss_of_predicting_zero": 1.0 + float(np.square(latents).mean()),
    }


@torch.no_grad()
def sample(vae: Any, transformer: Any, prompt: Tensor, latent: tuple[int, ...], settings: Any) -> np.ndarray:
    """Videos from noise, uint8 [n t h w 3].

    Args:
        vae: The autoencoder.
        transformer: The transformer.
        prompt: Embedded prompts [n 512 d].
        latent: Shape [z t h w] of one latent.
        settings: `ReportSettings`.
    """
    scheduler = make_scheduler(settings.sample_shift)
    scheduler.set_timesteps(settings.sample_steps, device=prompt.device)
    noisy = torch.randn(len(prompt), *latent, generator=torch.Generator().manual_seed(0)).to(prompt.device)
    for moment in scheduler.timesteps:
        time = (moment / 1000).expand(len(prompt)).to(prompt.device)
        (noisy,) = scheduler.step(predict(transformer, noisy, time, prompt), moment, noisy, return_dict=False)
    return as_frames(vae.decode(restored(vae, noisy)).sample)


def as_frames(video: Tensor) -> np.ndarray:
    """The inverse of `as_video`, [n 3 t h w] in [-1, 1] -> uint8 [n t h w 3]."""
    scaled = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).cpu().numpy()


@torch.no_grad()
def write_reconstructions(path: Path, vae: Any, clips: Clips) -> None:
    """Write a picture of some held-out frames, above the original and below what comes back."""
    device = next(vae.parameters()).device
    chosen = np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).astype(int)
    frames = clips.take(chosen)
    decoded = as_frames(vae.decode(posterior_means(vae, frames, device)).sample)
    middle = frames.shape[1] // 2
    rows = [np.concatenate(list(one[:, middle]), axis=1) for one in (frames, decoded)]
    imageio.imwrite(path, np.concatenate(rows, axis=0))


def write_film(
    path: Path, vae: Any, transformer: Any, prompts: dict[str, Tensor], settings: PretrainSettings
) -> None:
    """Write a sample video, side by side: half with the empty prompt, half with an instruction.

    Args:
        path: The mp4 file.
        vae: The autoencoder.
        transformer: The transformer.
        prompts: Embeddings by sentence.
        settings: The run; samples are as long and as large as its clips.
    """
    told = [text for text in prompts if text][: SAMPLES // 2]
    texts = ([EMPTY] * SAMPLES + told)[-SAMPLES:]
    table = PromptTable(prompts, next(vae.parameters()).device)
    frames, size = settings.clips.order["frames"], settings.clips.order["frame_size"]
    side = size // vae.spatial_compression_ratio
    shape = (vae.config.z_dim, 1 + (frames - 1) // vae.config.scale_factor_temporal, side, side)
    videos = sample(vae, transformer, table(texts), shape, settings.report)
    with imageio.imopen(path, "w", plugin="pyav") as file:
        file.write(np.concatenate(list(videos), axis=2), codec="libx264", fps=FRAMES_PER_SECOND)


def write_card(folder: Path, figures: Figures, learned: Figures, settings: PretrainSettings) -> None:
    """Write the card of the checkpoint in `folder`, and its figures as JSON beside it.

    Args:
        folder: The checkpoint's folder.
        figures: By `measure`.
        learned: Number of clips, shots and steps: what it was learned from.
        settings: The run.

    Raises:
        ValueError: If the checkpoint is too large.
    """
    machine = settings.report.hardware or _machine()
    told = {"hardware": machine, "learned": learned, "figures": figures, "settings": asdict(settings)}
    write_json(folder.parent / "report" / "report.json", told)
    write_text(folder / "README.md", card(figures, learned, machine))
    check_size(folder)


def card(figures: Figures, learned: Figures, machine: str) -> str:
    """The card's text."""
    rows = [
        f"| {level} | {_with_interval(row['clips'])} | {_with_interval(row['frames'])} |"
        for level, row in figures["loss"].items()
    ]
    lines = [
        "# A small Wan trained on simulated video",
        "",
        "Architecture of Wan2.1 (`AutoencoderKLWan`, `WanTransformer3DModel`) with a few million weights,",
        "trained from scratch; no weight of Wan itself. Read as `prior=wan_tiny prior.path=FOLDER`.",
        "",
        f"- data: {learned['clips']} clips of {learned['frames']} frames, {learned['size']} pixels, of "
        f"{', '.join(learned['suites'])}; shots: {', '.join(learned['shots'])}. Scenes and episodes are "
        "drawn by seeds; no official initial state is used.",
        *([f"- set out from the weights {learned['start']}"] if learned["start"] else []),
        f"- steps: autoencoder {learned['vae_steps']}, transformer {learned['transformer_steps']}",
        f"- hardware: {machine}",
        f"- held-out clips (whole shards): {learned['held_out']}; intervals: 95%, normal, over clips",
        f"- reconstruction, PSNR in dB: clips {_with_interval(figures['psnr_clips'])}, single frames "
        f"{_with_interval(figures['psnr_frames'])}. LPIPS is not given: no package here carries its weights.",
        "",
        f"Validation loss (mean square of the velocity's error; predicting zero gives "
        f"{figures['loss_of_predicting_zero']:.3f}):",
        "",
        "| noise level | clips | single frames |",
        "|---|---|---|",
        *rows,
        "",
        "These numbers are of the bfloat16 weights in this folder.",
        "",
    ]
    return "\n".join(lines)


def _with_interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _machine() -> str:
    found = hardware()
    return ", ".join([*found["gpus"], f"{found['processor']}, {found['cores']} cores"])
