"""Sizes of real policies, read off networks without weights."""

import sys
from functools import cache

import pytest

from tests.policies import SMALL_ENCODERS
from vega_policy.cli.commands import inspect
from vega_policy.model.config import (
    ActionHeadConfig,
    BackboneConfig,
    DisplacementConfig,
    FusionConfig,
    ModelConfig,
    PriorConfig,
)
from vega_policy.model.sizes import PRIOR_ARCHITECTURES, inspect_model, published_sizes, without_weights

SIZES = {"views": 2, "state_dim": 8, "action_dim": 7}
COMPACT = BackboneConfig(
    freeze_image_encoder=True, freeze_text_encoder=True, width=64, depth=1, heads=2, **SMALL_ENCODERS
)


@cache
def parts_of(**fields):
    head = ActionHeadConfig(width=64, depth=1, heads=2, steps=2)
    config = ModelConfig(**SIZES, **{"frame_size": 64, "backbone": COMPACT, "head": head} | fields)
    return {part.name: part for part in inspect_model(config)}


def test_language_models_have_their_published_sizes():
    published = {  # as the hub counts safetensors; a tied or dropped head is the word embedding once more
        "smolvlm2_500m": 507_482_304 - 49_280 * 960,
        "paligemma2_3b": 3_032_242_416,
        "qwen2.5_vl_3b": 3_754_622_976,
    }
    for name, count in published.items():
        backbone = without_weights(BackboneConfig(name=name), state_dim=8, views=1, frame_size=224)
        assert sum(weight.numel() for weight in backbone.model.parameters()) == count, name


def test_only_what_is_read_of_wan_is_counted_and_nothing_of_it_learns():
    parts = parts_of(prior=PriorConfig(name="wan2.1_t2v_1.3b"))
    prior = parts["prior wan2.1_t2v_1.3b"]
    early = parts_of(prior=PriorConfig(name="wan2.1_t2v_1.3b", layer=10))["prior wan2.1_t2v_1.3b"]
    assert prior.trainable == 0
    width, inner = 1536, 8960
    attention = 4 * (width**2 + width) + 2 * width  # four projections, norms of queries and keys
    mlp = 2 * width * inner + inner + width
    assert prior.frozen - early.frozen == 10 * (2 * attention + mlp + 2 * width + 6 * width)
    assert prior.flops > 1.5 * early.flops


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_parts_add_up(weight):
    displacement = DisplacementConfig(weight=weight)
    parts = list(parts_of(prior=PriorConfig(name="wan_vae"), displacement=displacement).values())
    assert ("displacement" in [part.name for part in parts]) == (weight > 0)
    for field in ("trainable", "frozen", "weights", "flops"):
        assert sum(getattr(part, field) or 0 for part in parts[:-1]) == getattr(parts[-1], field), field


def test_arithmetic_of_a_projector_is_two_operations_a_weight_and_token():
    parts = parts_of(prior=PriorConfig(name="wan_vae"))
    weights = 16 * 64 + 64 * 64
    assert parts["projector of the prior"].flops == 2 * weights * 2 * 16
    assert parts["projector of the prior"].trainable == weights + 2 * 64


def test_each_step_costs_the_flow_alike_and_the_context_is_read_into_keys_and_values_once():
    first, second, third = (
        parts_of(prior=PriorConfig(name="none"), head=ActionHeadConfig(width=64, depth=1, heads=2, steps=n))
        for n in (5, 10, 15)
    )
    one, two, three = (parts["head flow"].flops for parts in (first, second, third))
    assert three - two == two - one > 0
    assert 2 * one - two == 2 * (64 * 128) * first["trunk"].tokens


def test_adapters_are_what_learns_in_a_language_model():
    parts = parts_of(
        prior=PriorConfig(name="none"),
        frame_size=224,
        backbone=BackboneConfig(
            name="qwen2.5_vl_3b", freeze_image_encoder=True, freeze_connector=True, lora_rank=32
        ),
    )
    assert parts["image encoder"].trainable == parts["connector"].trainable == 0
    assert 0 < parts["language model"].trainable < 0.03 * parts["language model"].frozen
    assert parts["language model"].tokens == 2 * 64 + 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in PRIOR_ARCHITECTURES if name not in ("wan2.1_t2v_14b", "wan2.2_ti2v_5b")]
)
def test_every_reader_runs_without_weights(name):
    clip = "future" if name == "wan2.1_i2v_14b" else "frame"  # the one that it was trained to continue
    assert parts_of(prior=PriorConfig(name=name, clip=clip))[f"prior {name}"].flops > 0


def test_a_backbone_of_unknown_sizes_is_refused():
    with pytest.raises(ValueError, match="No published sizes of the backbone 'gemma3_4b'"):
        parts_of(backbone=BackboneConfig(name="gemma3_4b"), fusion=FusionConfig())


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vega-inspect", *arguments, "policy.device=cpu"])
    inspect.main()


def test_the_script_prints_a_table_of_the_method(monkeypatch, capsys):
    run_script(monkeypatch, "experiment=libero_wan")
    shown = capsys.readouterr().out
    for word in ("views 2", "prior wan2.1_t2v_1.3b", "language model", "361,944,000", "head flow", "GFLOP"):
        assert word in shown
    assert "prior wan2.1_t2v_1.3b, published: vae 126,892,531, transformer 1,418,996,800" in shown


def test_the_script_needs_no_dataset(monkeypatch, capsys):
    run_script(monkeypatch, "prior=none", "backbone.pretrained=false")
    assert "head flow" in capsys.readouterr().out


def test_the_script_counts_no_published_network_where_a_prior_comes_from_a_seed(monkeypatch, capsys):
    run_script(monkeypatch, "experiment=demo", "prior=random", "backbone.pretrained=false")
    shown = capsys.readouterr().out
    assert "prior random" in shown
    assert "published" not in shown


def test_the_script_refuses_to_show_a_policy_that_a_base_would_replace(monkeypatch):
    with pytest.raises(SystemExit, match="base=smolvla: the networks of a pre-trained policy lie in its"):
        run_script(monkeypatch, "experiment=smolvla_wan")


@pytest.mark.parametrize("name", ["sd21", pytest.param("svd", marks=pytest.mark.slow)])
def test_a_unet_prior_is_read_down_to_its_middle_without_weights(name):
    early, usual, middle = (
        parts_of(prior=PriorConfig(name=name, layer=layer))[f"prior {name}"] for layer in (2, None, 4)
    )
    assert early.frozen < usual.frozen < middle.frozen < sum(published_sizes(name).values())
    assert 0 < usual.flops < middle.flops
    assert middle.trainable == 0
