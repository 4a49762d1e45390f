"""Export of the trained parts in the hub's folder layout, in bfloat16, and measurements on held-out clips.

<output_dir>/wan_tiny/vae/ transformer/ scheduler/ empty_prompt.safetensors README.md
"""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from vega_policy.pretraining import PretrainSettings, ReportSettings
from vega_policy.pretraining.autoencoder import (
    as_frames,
    denormalise,
    normalise,
    peak_signal_to_noise,
    posterior_means,
)
from vega_policy.pretraining.clips import Clips
from vega_policy.pretraining.transformer import (
    BATCH,
    EMPTY,
    PromptTable,
    loss_by_level,
    predict_velocity,
    still_loss,
)
from vega_policy.priors.wan import TRAINING
from vega_policy.run_dir import atomic_folder, hardware, read_tensors, write_bytes, write_json, write_text

LARGEST = 24_000_000  # bytes that a shipped folder may have
SHOWN, SAMPLES, FRAMES_PER_SECOND = 6, 4, 5
Figures = dict[str, Any]


def write_part(network: Any, target: Path) -> None:
    """Write one network in bfloat16, atomically."""
    state = network.state_dict()
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    with atomic_folder(target) as folder:
        network.save_config(folder)
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_weights(network: Any, path: Path) -> None:
    """Load the weights of an exported part into a network.

    Raises:
        ValueError: If they are of another architecture.
    """
    weights = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in network.state_dict().items()}:
        raise ValueError(f"{path} holds another architecture than `prior`; give another start")
    network.load_state_dict(weights)


def write_rest(folder: Path, prompt: Tensor, shift: float) -> None:
    """Write the config of the scheduler, and the empty prompt's embedding without padding, [n d]."""
    make_scheduler(shift).save_pretrained(folder / "scheduler")
    save_file({"prompt": prompt.float().contiguous()}, folder / "empty_prompt.safetensors")


def write_training(folder: Path, settings: PretrainSettings) -> None:
    """Write beside the weights that they continue a frame, which `prior.clip=future` needs."""
    learned = asdict(settings.transformer) | {"learning": asdict(settings.transformer.learning)}
    write_json(folder / TRAINING, {"transformer": learned, "clips": settings.clips.order})


def make_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Return Wan's solver: UniPC on the straight path."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def load_vae(folder: Path, device: torch.device) -> Any:
    """Load the exported autoencoder, in float32."""
    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_transformer(folder: Path, device: torch.device) -> Any:
    """Load the exported transformer, in float32."""
    network: Any = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return network.to(device).eval().requires_grad_(False)


def check_size(folder: Path) -> int:
    """Return the size of a checkpoint in bytes.

    Raises:
        ValueError: If it is too large to be shipped.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"{folder} has {size} bytes; at most {LARGEST} are shipped")
    return size


def interval(values: Tensor) -> dict[str, float | None]:
    """Return the mean of independent values [n] with a normal 95% interval; None for its ends if n is 1."""
    mean = values.mean().item()
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": len(values)}
    half = 1.96 * values.std().item() / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def measure(
    vae: Any, transformer: Any, clips: Clips, prompts: PromptTable, settings: PretrainSettings
) -> Figures:
    """Measure reconstruction and validation loss of the exported networks on held-out clips."""
    device = next(vae.parameters()).device
    chosen = clips.spread(settings.report.clips)
    frames, texts = clips.take(chosen), [clips.instructions[index] for index in chosen]
    parts = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
    latents = torch.cat([normalise(vae, posterior_means(vae, part, device)).cpu() for part in parts]).numpy()
    levels = settings.report.noise_levels
    losses = {
        name: loss_by_level(transformer, shown, texts, prompts, levels, device)
        for name, shown in (("clips", latents), ("frames", latents[:, :, :1]))
    }
    futures = {}
    if settings.transformer.image_to_video > 0:
        by_level = loss_by_level(transformer, latents, texts, prompts, [1.0], device, continues=True)
        futures = {"future": {"pure_noise": interval(by_level[1.0]), "still": interval(still_loss(latents))}}
    return futures | {
        "psnr_clips": interval(peak_signal_to_noise(vae, frames, device)),
        "psnr_frames": interval(peak_signal_to_noise(vae, frames[:, :1], device)),
        "loss": {
            f"{level:g}": {name: interval(by_level[level]) for name, by_level in losses.items()}
            for level in levels
        },
        "loss_of_predicting_zero": 1.0 + float(np.square(latents).mean()),
    }


@torch.no_grad()
def sample(
    vae: Any,
    transformer: Any,
    prompt: Tensor,
    latent: tuple[int, ...],
    settings: ReportSettings,
    first: Tensor | None = None,
) -> np.ndarray:
    """Sample videos uint8 [n t h w 3] for prompts [n 512 d] from noise of the shape [z t h w].

    They continue the frames of the latents `first` [n z 1 h w], if given.
    """
    scheduler = make_scheduler(settings.sample_shift)
    scheduler.set_timesteps(settings.sample_steps, device=prompt.device)
    noisy = torch.randn(len(prompt), *latent, generator=torch.Generator().manual_seed(0)).to(prompt.device)
    for moment in scheduler.timesteps:
        time = (moment / 1000).expand(len(prompt)).to(prompt.device)
        if first is not None:
            noisy = torch.cat([first, noisy[:, :, 1:]], dim=2)
            time = torch.cat(
                [torch.zeros_like(time)[:, None], time[:, None].expand(-1, latent[1] - 1)], dim=1
            )
        predicted = predict_velocity(transformer, noisy, time, prompt)
        (noisy,) = scheduler.step(predicted, moment, noisy, return_dict=False)
    noisy = noisy if first is None else torch.cat([first, noisy[:, :, 1:]], dim=2)
    return as_frames(vae.decode(denormalise(vae, noisy)).sample)


@torch.no_grad()
def write_reconstructions(path: Path, vae: Any, clips: Clips) -> None:
    """Write an image of some held-out frames, originals above and reconstructions below."""
    device = next(vae.parameters()).device
    frames = clips.take_spread(SHOWN)
    decoded = as_frames(vae.decode(posterior_means(vae, frames, device)).sample)
    middle = frames.shape[1] // 2
    rows = [np.concatenate(list(one[:, middle]), axis=1) for one in (frames, decoded)]
    write_bytes(path, imageio.imwrite("<bytes>", np.concatenate(rows, axis=0), extension=".png"))


def write_video(
    path: Path, vae: Any, transformer: Any, prompts: dict[str, Tensor], settings: PretrainSettings
) -> None:
    """Write an mp4 of samples side by side, half with the empty prompt, half with an instruction.

    They are as long and as large as the run's clips.
    """
    instructions = [text for text in prompts if text][: SAMPLES // 2]
    texts = ([EMPTY] * SAMPLES + instructions)[-SAMPLES:]
    table = PromptTable(prompts, next(vae.parameters()).device)
    frames, size = settings.clips.order["frames"], settings.clips.order["frame_size"]
    side = size // vae.spatial_compression_ratio
    shape = (vae.config.z_dim, 1 + (frames - 1) // vae.config.scale_factor_temporal, side, side)
    videos = sample(vae, transformer, table(texts), shape, settings.report)
    _write_mp4(path, np.concatenate(list(videos), axis=2))


def write_futures(
    path: Path, vae: Any, transformer: Any, clips: Clips, prompts: PromptTable, settings: ReportSettings
) -> None:
    """Write an mp4 of held-out clips, above, and of sampled futures of their first frames, below."""
    device = next(vae.parameters()).device
    chosen = clips.spread(SHOWN)
    frames, texts = clips.take(chosen), [clips.instructions[index] for index in chosen]
    latents = normalise(vae, posterior_means(vae, frames, device))
    shape = tuple(latents.shape[1:])
    futures = sample(vae, transformer, prompts(texts), shape, settings, first=latents[:, :, :1])
    rows = [np.concatenate(list(videos), axis=2) for videos in (frames, futures)]
    _write_mp4(path, np.concatenate(rows, axis=1))


def _write_mp4(path: Path, video: np.ndarray) -> None:
    buffer = io.BytesIO()
    with imageio.imopen(buffer, "w", extension=".mp4", plugin="pyav") as file:
        file.write(video, codec="libx264", fps=FRAMES_PER_SECOND)
    write_bytes(path, buffer.getvalue())


def write_card(folder: Path, figures: Figures, learned: Figures, settings: PretrainSettings) -> None:
    """Write the card of the checkpoint in `folder`, and its figures (of `measure`) as JSON beside it.

    `learned` describes the training: clips, shots, steps.

    Raises:
        ValueError: If the checkpoint is too large.
    """
    found = hardware()
    machine = settings.report.hardware or ", ".join(
        [*found["gpus"], f"{found['processor']}, {found['cores']} cores"]
    )
    report = {"hardware": machine, "learned": learned, "figures": figures, "settings": asdict(settings)}
    write_json(folder.parent / "report" / "report.json", report)
    write_text(folder / "README.md", card(figures, learned, machine))
    check_size(folder)


def card(figures: Figures, learned: Figures, machine: str) -> str:
    """Return the card's text."""
    rows = [
        f"| {level} | {format_interval(row['clips'])} | {format_interval(row['frames'])} |"
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
        *([f"- started from the weights {learned['start']}"] if learned["start"] else []),
        f"- steps: autoencoder {learned['vae_steps']}, transformer {learned['transformer_steps']}",
        f"- hardware: {machine}",
        f"- held-out clips (whole shards): {learned['held_out']}; intervals: 95%, normal, over clips",
        f"- reconstruction, PSNR in dB: clips {format_interval(figures['psnr_clips'])}, single frames "
        f"{format_interval(figures['psnr_frames'])}. LPIPS is not given: its weights are not installed.",
        "",
        f"Validation loss (mean square of the velocity's error; predicting zero gives "
        f"{figures['loss_of_predicting_zero']:.3f}):",
        "",
        "| noise level | clips | single frames |",
        "|---|---|---|",
        *rows,
        "",
        *_describe_futures(figures),
        "These numbers are of the bfloat16 weights in this folder.",
        "",
    ]
    return "\n".join(lines)


def _describe_futures(figures: Figures) -> list[str]:
    if "future" not in figures:
        return []
    future, still = (format_interval(figures["future"][name]) for name in ("pure_noise", "still"))
    return [
        f"Continuing a clean first frame from pure noise (`prior.clip=future`), loss of the other latents: "
        f"{future}; a video in which nothing moves has {still}.",
        "",
    ]


def format_interval(value: dict[str, float | None]) -> str:
    """Return a mean of `interval` as text, without an interval where there is none."""
    ends = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{ends}"
