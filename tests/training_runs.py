"""Tiny runs for the training tests: a policy of a few thousand learned weights on a synthetic dataset."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.policies import SMALL_ENCODERS
from tests.synthetic_dataset import REPO_ID
from vega_policy.checkpoints import checkpoint_path
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, PriorConfig
from vega_policy.run_dir import point_link
from vega_policy.training.config import TrainConfig


def tiny_policy(**fields: Any) -> VegaConfig:
    """A policy with frozen encoders, the random prior and 32-pixel frames."""
    values = {
        "device": "cpu",
        "push_to_hub": False,
        "chunk_size": 4,
        "n_action_steps": 2,
        "frame_size": 32,
        "prior": PriorConfig(name="random"),
        "backbone": tiny_backbone(),
        "head": ActionHeadConfig(width=16, depth=1, heads=2, steps=2),
        "optimizer_lr": 1e-3,
        "scheduler_warmup_steps": 1,
        "scheduler_decay_steps": 4,
    }
    return VegaConfig(**{**values, **fields})


def tiny_backbone(**fields: Any) -> BackboneConfig:
    """A narrow trunk; both encoders random and frozen."""
    frozen = {"freeze_image_encoder": True, "freeze_text_encoder": True}
    return BackboneConfig(**{"width": 16, "depth": 1, "heads": 2} | SMALL_ENCODERS | frozen | fields)


def tiny_run(root: Path, output: Path, *, policy: VegaConfig | None = None, **fields: Any) -> TrainConfig:
    """A run of four steps; `dataset.` fields are given as `dataset={...}`."""
    dataset = {"cache": "ram", "cache_root": str(output.parent / "cache"), "workers": 0}
    dataset |= fields.pop("dataset", {})
    values = {"steps": 4, "batch_size": 5, "log_every": 1, "save_every": 2, "seed": 3, "precision": "no"}
    return TrainConfig(
        policy=policy or tiny_policy(),
        dataset=DatasetConfig(**{"repo_id": REPO_ID, "root": str(root)} | dataset),
        output_dir=str(output),
        **{**values, **fields},
    )


def stopped_run(finished: Path, output: Path) -> Path:
    """Copy a finished run of four steps as if it had been killed before its second checkpoint."""
    shutil.copytree(finished, output, symlinks=True)
    shutil.rmtree(checkpoint_path(output, 4))
    point_link(output / "checkpoints" / "last", checkpoint_path(output, 2))
    return output


def cache_of(finished: Path) -> dict[str, Any]:
    """Return the dataset fields with which a copy of a finished run resumes."""
    return {"cache_root": str(finished.parent / "cache")}


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Averaged weights, raw weights and optimizer state of a checkpoint, by file and name."""
    files = ("pretrained_model/model", "training_state/weights", "training_state/optimizer_state")
    return {
        f"{file}:{name}": value
        for file in files
        for name, value in load_file(checkpoint / f"{file}.safetensors").items()
    }


def assert_bitwise_equal(first: Path, second: Path) -> None:
    """Fails with the names of what differs between two checkpoints."""
    expected, found = saved_weights(first), saved_weights(second)
    assert expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert differing == [], differing[:5]
