"""Small pre-training runs: clips of a moving square, prompts, and networks smaller than wan_tiny."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from vega_policy.config import from_config
from vega_policy.pretraining import PretrainSettings

CPU = torch.device("cpu")
WIDTH = 12
TINY = {
    "vae": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "transformer": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "text_dim": WIDTH,
        "freq_dim": 16,
    },
}
"""wan_tiny's classes, smaller still."""


def moving_square(count, seed):
    """Clips in which a square moves over a plane of another colour, uint8 [n 5 16 16 3]."""
    rng = np.random.default_rng(seed)
    frames = np.empty((count, 5, 16, 16, 3), np.uint8)
    for clip in frames:
        clip[:] = rng.integers(0, 100, 3)
        colour, top, left = rng.integers(155, 256, 3), *rng.integers(0, 6, 2)
        for moment, frame in enumerate(clip):
            frame[top + moment : top + moment + 6, left : left + 6] = colour
    return frames


def write_shards(folder, shards=3, count=4):
    folder.mkdir(parents=True)
    for place in range(shards):
        path = folder / f"square-{place}.npy"
        np.save(path, moving_square(count, place))
        shown = [{"shot": "fixed", "instruction": "move it" if clip % 2 else ""} for clip in range(count)]
        note = {"bytes": path.stat().st_size, "clips": shown}
        path.with_suffix(".json").write_text(json.dumps(note))


def write_prompts(path):
    generator = torch.Generator().manual_seed(1)
    tensors = {str(place): torch.randn(2 + place, WIDTH, generator=generator) for place in range(2)}
    save_file(tensors, path, metadata={"sentences": json.dumps(["", "move it"])})


def settings(folder, **changes):
    if not (folder / "clips").exists():
        write_shards(folder / "clips")
        write_prompts(folder / "prompts.safetensors")
    learning = {"steps": 3, "batch_size": 2, "learning_rate": 3e-3, "warmup": 2}
    values = {
        "output_dir": str(folder),
        "clips": {
            "folder": str(folder / "clips"),
            "order": {"suites": ["square"], "frames": 5, "frame_size": 16},
        },
        "vae": {"learning": learning, "lengths": [1, 5]},
        "transformer": {"learning": learning},
        "report": {"clips": 2, "sample_steps": 2},
        "stages": ["vae", "transformer"],
        "device": "cpu",
        "tensorboard": False,
        "log_every": 1,
        "save_every": 2,
        "validate_every": 3,
    }
    return from_config(PretrainSettings, values | changes)
