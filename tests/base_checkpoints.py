"""Small randomly initialised SmolVLA and pi policies in LeRobot's layout, with their processors."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

from tests.policies import CAMERAS, SIZE
from tests.vlm_checkpoints import SIGLIP, tokenizer, write_vlm
from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.config import BaseConfig, FusionConfig, PriorConfig

FEATURES: dict[str, Any] = {
    "input_features": {
        **{key: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for key in CAMERAS},
        "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
}
CHUNKS = {"chunk_size": 4, "n_action_steps": 2}
WIDTH = 16


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    """Statistics that change every number, so that a lost normalisation shows."""
    values = {"mean": 0.5, "std": 2.0, "min": -2.0, "max": 3.0, "q01": -1.5, "q99": 2.5}
    return {
        key: {name: torch.full((size,), value) for name, value in values.items()}
        for key, size in (("observation.state", 8), ("action", 7))
    }


def shrink_pi(name: str, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot builds pi0 and pi0.5 in one size and with a tokenizer of the hub; make both small and local."""
    module: Any = import_module(f"lerobot.policies.{name}.modeling_{name}")
    whole, sizes = module.PaliGemmaForConditionalGenerationWithPiGemma, module.GemmaConfig

    def small(config: Any) -> Any:
        config.text_config.vocab_size = 64
        for field, value in {**SIGLIP, "hidden_size": WIDTH, "projection_dim": WIDTH}.items():
            setattr(config.vision_config, field, value)
        config.projection_dim = config.hidden_size = WIDTH
        return whole(config=config)

    def variant(_: str) -> Any:
        return sizes(width=WIDTH, depth=2, mlp_dim=24, num_heads=8, num_kv_heads=1, head_dim=8)

    monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small)
    monkeypatch.setattr(module, "get_gemma_config", variant)
    processors: Any = import_module(f"lerobot.policies.{name}.processor_{name}")
    step = processors.TokenizerProcessorStep
    monkeypatch.setattr(
        processors,
        "TokenizerProcessorStep",
        lambda **options: step(**options | {"tokenizer_name": str(words)}),
    )


def write_base(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a base policy with seeded weights and its processors; returns its folder."""
    options: dict[str, Any] = (
        {"device": "cpu", "push_to_hub": False, "max_action_dim": 10} | CHUNKS | FEATURES
    )
    options["input_features"] = dict(FEATURES["input_features"])
    torch.manual_seed(0)
    if name == "smolvla":
        vlm = write_vlm("smolvlm", folder / "vlm")
        options |= {"vlm_model_name": str(vlm), "resize_imgs_with_padding": (64, 64), "num_vlm_layers": 2}
        options |= {"num_steps": 2, "tokenizer_max_length": 16}
    else:
        words = folder / "words"
        tokenizer(image_token="<image>").save_pretrained(words)
        shrink_pi(name, words, monkeypatch)
        options |= {"image_resolution": (64, 64), "num_inference_steps": 2, "tokenizer_max_length": 24}
    config = make_policy_config(name, **options)
    policy = get_policy_class(name)(config)
    target = folder / name
    policy.save_pretrained(target)
    for processor in make_pre_post_processors(config, dataset_stats=statistics()):
        processor.save_pretrained(target)
    return target


def based_config(name: str, folder: Path | str, prior: str = "random", **fields: Any) -> VegaConfig:
    """A VEGA policy on a base; `fields` are those of its BaseConfig."""
    return VegaConfig(
        device="cpu",
        prior=PriorConfig(name=prior),
        fusion=FusionConfig(),
        base=BaseConfig(name=name, path=str(folder), **fields),
        **CHUNKS,
        **FEATURES,
    )
