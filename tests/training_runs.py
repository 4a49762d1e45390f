"""Tiny runs for the training tests: a policy of a few thousand learned weights on a synthetic dataset."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.synthetic_dataset import REPO_ID
from vega_policy.configuration_vega import VegaConfig
from vega_policy.parts import BackboneConfig, ExpertConfig, PriorConfig
from vega_policy.training.config import DatasetConfig, TrainConfig


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
        "expert": ExpertConfig(width=16, depth=1, heads=2, steps=2),
        "optimizer_lr": 1e-3,
        "scheduler_warmup_steps": 1,
        "scheduler_decay_steps": 4,
    }
    return VegaConfig(**{**values, **fields})


def tiny_backbone(**fields: Any) -> BackboneConfig:
    """A narrow trunk; both encoders frozen."""
    small = BackboneConfig(width=16, depth=1, heads=2, freeze_image_encoder=True, freeze_text_encoder=True)
    return replace(small, **fields)


def tiny_run(root: Path, output: Path, *, policy: VegaConfig | None = None, **fields: Any) -> TrainConfig:
    """A run of four steps; `dataset.` fields are given as `dataset={...}`."""
    dataset = {"cache": "ram", "cache_root": str(output.parent / "cache"), "workers": 0}
    dataset |= fields.pop("dataset", {})
    values = {"steps": 4, "batch_size": 5, "log_every": 1, "save_every": 2, "seed": 3, "precision": "no"}
    return TrainConfig(
        policy=policy or tiny_policy(),
        dataset=DatasetConfig(repo_id=REPO_ID, root=str(root), **dataset),
        output_dir=str(output),
        **{**values, **fields},
    )
