import dataclasses
import json

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_policy_config, make_pre_post_processors
from safetensors import safe_open

from tests.policies import CAMERAS, batch, tiny_config
from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.config import BaseConfig, FusionConfig, PriorConfig
from vega_policy.model.observation import Observation
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.optim import make_optimizer


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return VegaPolicy(tiny_config(PriorConfig(name="wan_tiny"))).eval()


def test_frames_of_another_size_are_refused_with_the_way_to_bring_them_to_it(policy):
    side = policy.config.frame_size
    observation = Observation(torch.rand(1, 2, 1, 3, 480, 640), torch.zeros(1, 8), ["lift"])
    with pytest.raises(ValueError, match=rf"expected \[b v t 3 {side} {side}\], got .*480, 640.*stack_views"):
        policy.model.semantic_features(observation)


def test_the_default_config_is_the_method():
    config = VegaConfig(device="cpu")
    assert config.prior == PriorConfig(name="wan2.1_t2v_1.3b")
    assert (config.fusion.name, config.fusion.blend) == ("token_gate", "residual")
    assert (config.backbone.name, config.head.name) == ("compact", "flow")
    assert not config.backbone.freeze_image_encoder


def test_vega_is_a_registered_policy_type():
    assert isinstance(make_policy_config("vega", device="cpu"), VegaConfig)


def test_steps_that_were_captured_are_forgotten_when_the_policy_trains_on(policy, monkeypatch):
    asked = []
    monkeypatch.setattr(policy.captured_steps, "clear", lambda: asked.append(policy.training))
    policy.train()
    policy.eval()
    assert asked == [False, True]  # before each change of mode


def test_the_same_noise_gives_the_same_actions_and_other_noise_others(policy):
    seen, noise = batch(), torch.randn(2, 4, 7)
    first = policy.predict_action_chunk(seen, noise=noise)
    assert first.shape == (2, 4, 7)
    assert torch.equal(first, policy.predict_action_chunk(seen, noise=noise))
    assert not torch.equal(first, policy.predict_action_chunk(seen, noise=-noise))


def test_select_action_executes_a_chunk_before_it_asks_for_another(policy):
    seen, noise = batch(), torch.randn(2, 4, 7)
    chunk = policy.predict_action_chunk(seen, noise=noise)
    policy.reset()
    taken = [policy.select_action(seen, noise=noise) for _ in range(3)]
    assert torch.equal(torch.stack(taken, dim=1), chunk[:, [0, 1, 0]])


def test_reset_forgets_the_rest_of_a_chunk(policy):
    seen, noise = batch(), torch.randn(2, 4, 7)
    policy.reset()
    first = policy.select_action(seen, noise=noise)
    policy.reset()
    assert torch.equal(first, policy.select_action(seen, noise=noise))


def test_cached_features_stand_in_for_frames(policy):
    seen, noise = batch(), torch.randn(2, 4, 7)
    observation = policy.observe(seen)
    with torch.no_grad():
        cached = {
            "vega.semantic": policy.model.semantic_features(observation),
            "vega.prior": policy.model.prior_features(observation),
        }
    without_frames = {key: value for key, value in seen.items() if key not in CAMERAS} | cached
    assert torch.equal(
        policy.predict_action_chunk(without_frames, noise=noise),
        policy.predict_action_chunk(seen, noise=noise),
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parts_stay_frozen_and_the_rest_learns(frozen):
    torch.manual_seed(0)
    learner = VegaPolicy(
        tiny_config(PriorConfig(name="wan_tiny"), freeze_image_encoder=frozen, freeze_text_encoder=frozen)
    ).train()
    optimizer = torch.optim.AdamW(learner.get_optim_params(), lr=1e-2)
    before = {name: value.clone() for name, value in learner.named_parameters()}
    prior_before = [value.clone() for value in learner.model.prior.parameters()]
    for step in range(3):  # the head's adaLN-zero opens the way to the rest in the first steps
        loss, _ = learner(batch(seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in learner.named_parameters() if not torch.equal(value, before[name])}
    encoders = {name for name in before if "image_encoder" in name or "text_encoder" in name}
    expected = set(before) - (encoders if frozen else set())
    assert moved == expected
    assert all(map(torch.equal, prior_before, learner.model.prior.parameters()))


def test_the_prior_is_in_no_optimizer_no_checkpoint_and_no_state(policy, tmp_path):
    frozen = {id(parameter) for parameter in policy.model.prior.parameters()}
    assert frozen
    assert not frozen & {id(parameter) for parameter in policy.parameters()}
    assert not frozen & {id(parameter) for parameter in policy.get_optim_params()}
    assert not any(name.startswith("model.prior") for name in policy.state_dict())
    policy.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(policy.state_dict())


def test_the_prior_moves_with_the_policy(policy):
    assert policy.model.prior.prompt.dtype == torch.float32
    policy.double()
    assert policy.model.prior.prompt.dtype == torch.float64
    policy.float()


def test_a_checkpoint_gives_the_same_actions_and_holds_what_was_resolved(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = VegaPolicy.from_pretrained(tmp_path)
    seen, noise = batch(), torch.randn(2, 4, 7)
    assert torch.equal(
        loaded.predict_action_chunk(seen, noise=noise), policy.predict_action_chunk(seen, noise=noise)
    )
    stored = json.loads((tmp_path / "config.json").read_text())["prior"]
    assert (stored["layer"], stored["noise_level"]) == (3, 0.5)
    assert stored["fingerprint"] == policy.model.prior.fingerprint


def test_a_checkpoint_with_a_missing_weight_is_refused(policy, tmp_path):
    state = policy.state_dict()
    state.pop("model.head.output.1.weight")
    policy.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match=r"model.head.output.1.weight"):
        VegaPolicy.from_pretrained(tmp_path)


def test_a_checkpoint_trained_with_other_prior_weights_is_refused(tmp_path):
    policy = VegaPolicy(tiny_config(PriorConfig(name="wan_tiny_untrained")))
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert isinstance(config, VegaConfig)
    config.prior = dataclasses.replace(config.prior, seed=1)
    with pytest.raises(ValueError, match="trained with other weights of the prior 'wan_tiny_untrained'"):
        VegaPolicy.from_pretrained(tmp_path, config=config)


def test_without_a_prior_there_is_no_fusion_and_no_gate():
    plain = VegaPolicy(tiny_config(PriorConfig(name="none")))
    assert plain.model.prior is None
    assert not hasattr(plain.model, "fusion")
    _, log = plain(batch())
    assert "gate" not in log


def test_without_sight_frames_and_cached_features_change_nothing_and_the_state_does():
    torch.manual_seed(0)
    blind = VegaPolicy(tiny_config(PriorConfig(name="none"), sight=False)).eval()

    def context(**changed):
        with torch.no_grad():
            return blind.model.encode_context(blind.observe({**batch(), **changed}))[0]

    assert torch.equal(context(), context(**{key: 1.0 - batch()[key] for key in CAMERAS}))
    features = blind.model.backbone.encode(torch.rand(2, 2, 3, 64, 64))
    assert features.any()
    assert torch.equal(context(), context(**{"vega.semantic": features}))
    assert not torch.equal(context(), context(**{"observation.state": torch.ones(2, 8)}))
    assert not torch.equal(context(), context(task=["close the drawer"] * 2))


@pytest.mark.parametrize("changed", [{"prior": PriorConfig(name="random")}, {"base": BaseConfig("smolvla")}])
def test_a_policy_without_sight_refuses_parts_that_see(changed):
    config = tiny_config(PriorConfig(name="none"), sight=False)
    with pytest.raises(ValueError, match=r"backbone\.sight=false"):
        VegaPolicy(dataclasses.replace(config, **changed))


def test_training_logs_the_mean_gate(policy):
    _, log = policy(batch())
    assert 0 < log["gate"] < 1


def test_no_reduction_gives_one_loss_a_sample(policy):
    torch.manual_seed(0)
    losses, _ = policy(batch(3), reduction="none")
    torch.manual_seed(0)
    loss, _ = policy(batch(3))
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.mean(), loss)


def test_a_batch_without_a_camera_names_both_lists(policy):
    seen = batch()
    seen.pop(CAMERAS[1])
    with pytest.raises(ValueError, match=r"lacks \['observation.images.image2'\]; it holds .*images.image'"):
        policy.predict_action_chunk(seen)


def test_frames_of_0_to_255_are_refused_by_the_policy(policy):
    seen = batch()
    seen[CAMERAS[0]] = seen[CAMERAS[0]] * 255
    with pytest.raises(ValueError, match=r"expected frames in \[0, 1\]"):
        policy.predict_action_chunk(seen)


def test_features_without_camera_state_or_action_are_refused():
    config = tiny_config()
    config.input_features = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (3,))}
    with pytest.raises(ValueError, match=r"a camera .*, observation.state; the features are"):
        VegaPolicy(config)


def test_more_steps_than_a_chunk_holds_are_refused():
    with pytest.raises(ValueError, match="between 1 and chunk_size"):
        VegaConfig(device="cpu", chunk_size=4, n_action_steps=5)


def test_fusion_and_prior_are_one_field_each(policy):
    assert type(VegaPolicy(tiny_config(fusion=FusionConfig(name="add"))).model.fusion).__name__ == "Add"
    read_early = VegaPolicy(tiny_config(PriorConfig(name="wan_tiny", layer=1)))
    assert len(read_early.model.prior.transformer.blocks) == 2


def test_processors_normalise_and_restore_actions(policy, tmp_path):
    stats = {
        "action": {"min": torch.full((7,), -2.0), "max": torch.full((7,), 4.0)},
        "observation.state": {"mean": torch.full((8,), 3.0), "std": torch.full((8,), 2.0)},
    }
    before, after = make_pre_post_processors(policy.config, dataset_stats=stats)
    seen = batch()
    normalised = before(seen)
    torch.testing.assert_close(normalised["observation.state"], (seen["observation.state"] - 3) / 2)
    torch.testing.assert_close(after(normalised["action"]), seen["action"])
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    reloaded, _ = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    torch.testing.assert_close(reloaded(seen)["observation.state"], normalised["observation.state"])


def test_the_gate_can_learn_more_slowly_than_the_rest():
    policy = VegaPolicy(tiny_config(PriorConfig(name="wan_tiny"), fusion=FusionConfig(gate_lr_scale=0.01)))
    optimizer, scheduler = make_optimizer(policy, 100)
    others, gate = optimizer.param_groups
    names = {id(weight): name for name, weight in policy.named_parameters()}
    assert {names[id(weight)] for weight in gate["params"]} == {
        "model.fusion.logit.weight",
        "model.fusion.logit.bias",
    }
    together = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert together == {id(weight) for weight in policy.parameters() if weight.requires_grad}
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    assert gate["lr"] == pytest.approx(0.01 * others["lr"])
    assert (
        len(make_optimizer(VegaPolicy(tiny_config(PriorConfig(name="wan_tiny"))), 100)[0].param_groups) == 1
    )
