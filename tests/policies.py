"""Small policies for tests: no download, no GPU, seconds to build."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import Tensor

from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.processor_vega import make_vega_pre_post_processors

SIZE = 64
CAMERAS = ("observation.images.image", "observation.images.image2")
TEXT_ENCODER = str(Path(__file__).parent / "text_encoder")
"""One-layer BERT of 16 channels that knows a few words and all letters; its weights are random."""
SMALL_ENCODERS: dict[str, Any] = {
    "pretrained": False,
    "image_encoder": "test_efficientnet",
    "text_encoder": TEXT_ENCODER,
}
"""Fields of a compact backbone: the packaged encoders' 27 million weights take seconds of every test."""


def tiny_config(
    prior: PriorConfig | None = None,
    fusion: FusionConfig | None = None,
    views: int = 2,
    **backbone: Any,
) -> VegaConfig:
    """A policy for 64-pixel frames, an 8-d state and 7-d actions; `backbone` overrides fields of its part."""
    return VegaConfig(
        device="cpu",
        chunk_size=4,
        n_action_steps=2,
        frame_size=SIZE,
        prior=prior or PriorConfig(name="random"),
        fusion=fusion or FusionConfig(),
        backbone=BackboneConfig(**{"width": 32, "depth": 1, "heads": 2} | SMALL_ENCODERS | backbone),
        head=ActionHeadConfig(width=32, depth=1, heads=2, steps=2),
        input_features={
            **{key: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for key in CAMERAS[:views]},
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )


def model_config(prior: str = "random") -> ModelConfig:
    """A model for 32-pixel frames of two cameras, an 8-d state and 7-d actions."""
    return ModelConfig(
        views=2,
        state_dim=8,
        action_dim=7,
        chunk_size=4,
        frame_size=32,
        prior=PriorConfig(name=prior),
        backbone=BackboneConfig(width=32, depth=1, heads=2, freeze_text_encoder=True, **SMALL_ENCODERS),
        head=ActionHeadConfig(width=32, depth=1, heads=2, steps=2),
    )


def batch(size: int = 2, views: int = 2, seed: int = 0) -> dict[str, Any]:
    """A normalised training batch of random content."""
    generator = torch.Generator().manual_seed(seed)
    frames = {key: torch.rand(size, 3, SIZE, SIZE, generator=generator) for key in CAMERAS[:views]}
    return {
        **frames,
        "observation.state": torch.randn(size, 8, generator=generator),
        "action": torch.randn(size, 4, 7, generator=generator),
        "action_is_pad": torch.zeros(size, 4, dtype=torch.bool),
        "task": ["lift the red cube"] * size,
    }


def frames(views: int = 1, size: int = SIZE, seed: int = 0) -> Tensor:
    """Random frames [1 v 1 3 size size] in [0, 1]."""
    return torch.rand(1, views, 1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def statistics() -> dict[str, dict[str, Tensor]]:
    """Random statistics of state and action."""
    rng = np.random.default_rng(0)
    ranges = {"action": 7, "observation.state": 8}
    return {
        key: {
            "mean": torch.from_numpy(rng.normal(size=size)).float(),
            "std": torch.from_numpy(rng.uniform(1, 2, size)).float(),
            "min": torch.from_numpy(rng.uniform(-3, -1, size)).float(),
            "max": torch.from_numpy(rng.uniform(1, 3, size)).float(),
        }
        for key, size in ranges.items()
    }


def write_checkpoint(folder: Path, head: ActionHeadConfig | None = None) -> Path:
    """A small policy with its processors; returns the folder."""
    torch.manual_seed(0)
    config = tiny_config()
    config.head = head or config.head
    policy = VegaPolicy(config)
    policy.save_pretrained(folder)
    for processor in make_vega_pre_post_processors(policy.config, statistics()):
        processor.save_pretrained(folder)
    return folder
