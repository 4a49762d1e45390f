"""Ablations inside a VEGA policy: each takes away what it says, and nothing else."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml

from tests.evaluations import STATISTICS, GoalSeeker, noise_for, observe, save_checkpoint
from tests.policies import tiny_config
from vega_policy.checkpoints import find_checkpoint
from vega_policy.evaluation.ablations import (
    ABLATIONS,
    Features,
    NeighboursPrior,
    NoisePrior,
    apply_ablation,
    shuffle_tokens,
)
from vega_policy.evaluation.evaluate import choose_frames
from vega_policy.evaluation.policies import load_lerobot_policy
from vega_policy.model.config import PriorConfig
from vega_policy.modeling_vega import VegaPolicy

INSIDE = [name for name in ABLATIONS if name not in ("none", "blind")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for prior in ("random", "none"):
        torch.manual_seed(0)
        policy = VegaPolicy(tiny_config(PriorConfig(name=prior)))
        with torch.no_grad():
            for parameter in policy.parameters():  # an head that has learned nothing ignores its context
                parameter += 0.1 * torch.randn_like(parameter)
        folders[prior] = find_checkpoint(save_checkpoint(policy, tmp_path_factory.mktemp(prior), STATISTICS))
    return folders


def features(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randn(rows, 2, 5, 4, 4, generator=generator)
    prior = 3 + 2 * torch.randn(rows, 2, 7, 4, 4, generator=generator)
    return Features(semantic, prior, list(range(rows)))


@pytest.mark.parametrize("name", INSIDE)
def test_every_ablation_changes_the_actions_and_is_repeated_exactly_after_a_reset(folders, name):
    plain = load_lerobot_policy(folders["random"], device="cpu")
    batch, noise = observe(3), noise_for(plain, 3)
    ablated = apply_ablation(name, plain, folders["random"])
    ablated.reset()
    first = [ablated.chunk(batch, noise), ablated.chunk(observe(3, seed=1), noise)]
    ablated.reset()
    again = [ablated.chunk(batch, noise), ablated.chunk(observe(3, seed=1), noise)]
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], plain.chunk(batch, noise), atol=1e-4)


def test_an_unchanged_feature_gives_the_actions_of_the_policy_as_it_is(folders):
    from vega_policy.evaluation.ablations import Change, FeatureAblation

    plain = load_lerobot_policy(folders["random"], device="cpu")
    batch, noise = observe(2), noise_for(plain, 2)
    same = FeatureAblation(plain, "same", Change(lambda features: None), needs_prior=True)
    np.testing.assert_array_equal(same.chunk(batch, noise), plain.chunk(batch, noise))


def test_shuffled_tokens_keep_their_values_and_stay_registered():
    changed = features()
    changed.prior = changed.semantic * 2 + 1
    before = changed.semantic.clone()
    shuffle_tokens(changed)
    assert not torch.equal(changed.semantic, before)
    assert torch.equal(changed.semantic.flatten(3).sort().values, before.flatten(3).sort().values)
    assert torch.equal(changed.prior, changed.semantic * 2 + 1), "both streams are shuffled alike"


def test_noise_has_the_channels_statistics_of_the_first_batch_and_no_trace_of_later_ones():
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, 8.0)[:, None, None]
    first = Features(torch.zeros(1), scale * torch.randn(64, 2, 7, 4, 4, generator=generator) + scale, [0, 1])
    first.active = list(range(64))
    change = NoisePrior()
    change(first)
    torch.testing.assert_close(first.prior.mean((0, 1, 3, 4)), scale.flatten(), rtol=0.15, atol=0.1)
    torch.testing.assert_close(first.prior.std((0, 1, 3, 4)), scale.flatten(), rtol=0.1, atol=0)
    outcomes = []
    for seed in (1, 2):
        change.reset()
        change(features(seed=0))
        later = features(seed=seed)
        change(later)
        outcomes.append(later.prior)
    assert torch.equal(*outcomes)


def test_a_row_is_given_the_features_of_another_episode_now_or_from_its_beginning():
    first, second = features(seed=0), features(seed=1)
    originals = first.prior.clone(), second.prior.clone()
    now, beginning = NeighboursPrior(first_frames=False), NeighboursPrior(first_frames=True)
    for change, expected in ((now, originals[1]), (beginning, originals[0])):
        change(Features(first.semantic, originals[0].clone(), [0, 1, 2]))
        later = Features(second.semantic, originals[1].clone(), [0, 1, 2])
        change(later)
        assert torch.equal(later.prior, expected.roll(-1, dims=0))
    lonely = Features(first.semantic, originals[0].clone(), [1])
    now(lonely)
    assert torch.equal(lonely.prior[1], originals[1][2]), "an ended episode's last features stay known"
    with pytest.raises(ValueError, match="at least 2 rows"):
        NeighboursPrior(first_frames=False)(Features(first.semantic, originals[0], [1]))


def test_a_policy_without_a_prior_or_of_another_kind_is_refused(folders):
    plain = load_lerobot_policy(folders["none"], device="cpu")
    with pytest.raises(ValueError, match=r"'prior_zero' changes .*, but the checkpoint has no"):
        apply_ablation("prior_zero", plain, folders["none"])
    apply_ablation("tokens_shuffled", plain, folders["none"])
    with pytest.raises(ValueError, match="features of a vega policy; this one is 'seeker'"):
        apply_ablation("prior_zero", GoalSeeker(), folders["none"])


def test_an_evaluation_renders_as_the_training_data_and_warns_of_other_frames(tmp_path, caplog):
    unset = {"frame_size": None, "rendering": None}
    usual = {"frame_size": 64, "rendering": "full"}
    camera = {"type": "VISUAL", "shape": [3, 128, 128]}
    config = {"input_features": {"observation.images.image": camera}}
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    checkpoint.mkdir(parents=True)
    caplog.set_level(logging.INFO)

    def store(**fields):
        (checkpoint / "config.json").write_text(json.dumps(config | fields))

    store()
    assert choose_frames(checkpoint, unset, usual) == {"frame_size": 128, "rendering": "full"}
    assert "env.rendering=full (by default, that of the training is not known)" in caplog.text

    store(dataset_rendering="fast")
    assert choose_frames(checkpoint, unset, usual) == {"frame_size": 128, "rendering": "fast"}
    assert "env.frame_size=128 (as in training)" in caplog.text
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    given = {"frame_size": None, "rendering": "full"}
    assert choose_frames(checkpoint, given, usual) == {"frame_size": 128, "rendering": "full"}
    assert "rendering=fast, but is evaluated with rendering=full" in caplog.text

    store()  # as before the rendering was stored: it is in the run's dataset
    dataset = tmp_path / "dataset"
    (dataset / "meta").mkdir(parents=True)
    (dataset / "meta" / "vega.json").write_text('{"settings": {"rendering": "fast"}}')
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"dataset": {"root": str(dataset)}}))
    assert choose_frames(checkpoint, unset, usual) == {"frame_size": 128, "rendering": "fast"}
    store(input_features={"observation.image": {"type": "VISUAL", "shape": [3, 480, 640]}})
    assert choose_frames(checkpoint, unset, usual)["frame_size"] == 64
