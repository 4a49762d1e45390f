"""What a Hugging Face backbone cannot do ends in one message that says what to do instead."""

import dataclasses

import pytest
import torch
from transformers import BertConfig

from tests.policies import tiny_config
from tests.vlm_checkpoints import Folders, build, vlm
from vega_policy.backbones import BACKBONES, make_backbone
from vega_policy.data.feature_cache import check_cacheable
from vega_policy.model.config import BackboneConfig, FusionConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def test_frozen_features_can_be_cached_and_learning_ones_cannot():
    prior, wanted = PriorConfig(name="none"), ["semantic"]
    fixed = vlm("x", freeze_image_encoder=True, freeze_connector=True)
    assert check_cacheable(fixed, prior, wanted) == wanted
    with pytest.raises(ValueError, match=r"backbone\.freeze_connector=false"):
        check_cacheable(dataclasses.replace(fixed, freeze_connector=False), prior, wanted)


def test_a_fusion_with_more_tokens_than_places_is_refused(folders):
    with pytest.raises(ValueError, match=r"takes 16 tokens of each view; fusion=sequence_concat returns 32"):
        VegaPolicy(
            dataclasses.replace(
                tiny_config(fusion=FusionConfig(name="sequence_concat")), backbone=vlm(folders("smolvlm"))
            )
        )


def test_more_views_than_were_trained_are_refused(folders):
    backbone = build(folders("smolvlm"), views=1)
    features = backbone.encode(torch.rand(1, 2, 3, 64, 64))
    with pytest.raises(ValueError, match="built for 1 cameras; the observation has 2"):
        backbone.encode_context(backbone.project(features), [""], torch.zeros(1, 8), features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 3}, r"backbone\.layer: the language model has blocks 0 to 2; got 3"),
        (
            {"lora_rank": 2, "lora_targets": ("qkv",)},
            r"lora_targets: no linear layer is called qkv; there are .*q_proj",
        ),
    ],
)
def test_layers_that_do_not_exist_are_refused(folders, fields, message):
    with pytest.raises(ValueError, match=message):
        build(folders("smolvlm"), **fields)


def test_another_architecture_is_refused(folders, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError, match=r"type 'bert', which transformers does not know as image-text-to-text"
    ):
        build(str(tmp_path))


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \*processor_config.json, tokenizer\*, \*.safetensors"):
        build(str(tmp_path))


def test_a_hub_out_of_reach_says_what_is_missing_and_how_to_give_a_folder(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("vega_policy.backbones.vlm.snapshot_download", unreachable)
    expected = (
        r"google/gemma-3-4b-it.*Missing: config.json.*backbone\.path.*gated, under the Gemma terms.*compact"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        make_backbone(BackboneConfig(name="gemma3_4b"), state_dim=8, views=1, frame_size=224)


def test_weights_with_terms_of_use_are_announced(caplog, folders):
    config = BackboneConfig(name="qwen2.5_vl_3b", path=folders("qwen2_5_vl"))
    make_backbone(config, state_dim=8, views=1, frame_size=64)
    assert "non-commercial" in caplog.text


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'smolvlm2_500'.*Did you mean 'smolvlm2_500m'\? Known: compact"):
        make_backbone(BackboneConfig(name="smolvlm2_500"), state_dim=8, views=1, frame_size=64)


def test_the_compact_backbone_refuses_fields_of_the_others():
    with pytest.raises(ValueError, match=r"backbone\.lora_rank concerns Hugging Face models"):
        BackboneConfig(lora_rank=8)


def test_every_backbone_of_the_table_names_a_source():
    assert {name for name, entry in BACKBONES.items() if entry.source is None} == {"compact", "vlm"}
