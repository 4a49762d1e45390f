"""Pre-trained LeRobot policies as a base: the same policy at first, whose fusion then learns."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import supports_rtc_inference
from safetensors.torch import load_file, save_file

from tests.base_checkpoints import based_config, statistics, write_base
from tests.policies import batch
from vega_policy.model.config import FusionConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.processor_vega import make_vega_pre_post_processors
from vega_policy.training.train import make_policy

NAMES = ["smolvla", "pi0", "pi05"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of each base, written when it is first asked for."""
    written = {}
    with pytest.MonkeyPatch.context() as patch:

        def folder(name):
            if name not in written:
                written[name] = write_base(name, tmp_path_factory.mktemp(name), patch)
            return written[name]

        yield folder


def base_policy(folder):
    """The base as LeRobot loads it, and what its own pre-processor makes of a batch."""
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    before, _ = make_pre_post_processors(config, pretrained_path=str(folder))
    return policy.eval(), before(batch())


@pytest.mark.parametrize("name", NAMES)
def test_a_new_policy_is_its_base_bit_by_bit(name, bases):
    base, seen = base_policy(bases(name))
    policy = VegaPolicy(based_config(name, bases(name))).eval()
    noise = torch.randn(2, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    chunks = [p.predict_action_chunk(dict(seen), noise=noise) for p in (base, policy)]
    assert chunks[0].shape == (2, 4, 7)
    assert torch.equal(*chunks)
    losses = []
    for trained in (base, policy):
        torch.manual_seed(0)
        losses.append(trained(dict(seen))[0])
    assert torch.equal(*losses)
    with torch.no_grad():
        policy.model.scale += 1.0
    assert not torch.equal(policy.predict_action_chunk(dict(seen), noise=noise), chunks[0])


def test_a_new_fusion_begins_with_the_base_again(bases, tmp_path):
    policy = VegaPolicy(based_config("smolvla", bases("smolvla")))
    with torch.no_grad():
        policy.model.scale += 1.0
    policy.save_pretrained(tmp_path)
    policy.config.pretrained_path = tmp_path
    for new_fusion, scale in ((True, 0.0), (False, 1.0)):
        run = SimpleNamespace(vega=policy.config, new_fusion=new_fusion)
        assert make_policy(run, None, torch.device("cpu")).model.scale == scale


@pytest.mark.parametrize("name", NAMES)
def test_processors_are_the_bases_own_with_the_datas_statistics(name, bases):
    config = based_config(name, bases(name))
    _, expected = base_policy(bases(name))
    for given in (None, statistics()):
        made = make_vega_pre_post_processors(config, given)[0](batch())
        for key in ("observation.state", "action", "observation.language.tokens"):
            assert torch.equal(made[key], expected[key]), key
    other = statistics()
    for value in other["action"].values():
        value.mul_(2)
    assert not torch.equal(
        make_vega_pre_post_processors(config, other)[0](batch())["action"], expected["action"]
    )


def learning(module):
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


def test_what_learns_is_one_field(bases):
    folder = bases("smolvla")
    models = {t: VegaPolicy(based_config("smolvla", folder, tune=t)).model for t in ("all", "expert", "lora")}
    ours = {name for name in learning(models["lora"]) if not name.startswith("base.")}
    assert {name.partition(".")[0] for name in ours} == {"project", "fusion", "scale"}
    assert all(ours <= learning(model) for model in models.values())
    assert any("vision_model" in name for name in learning(models["all"]))
    assert not any(".vlm." in name for name in learning(models["expert"]))
    assert any("lm_expert" in name for name in learning(models["expert"]))
    assert all("lora_" in name for name in learning(models["lora"]) - ours)


@pytest.mark.parametrize("tune", ["all", "expert", "lora"])
def test_a_checkpoint_holds_what_differs_from_the_base_and_comes_back(tune, bases, tmp_path):
    policy = VegaPolicy(based_config("smolvla", bases("smolvla"), tune=tune)).eval()
    with torch.no_grad():
        for weight in policy.get_optim_params():
            weight += 0.01
    policy.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors").keys()
    assert any("vision_model" in name for name in held) == (tune == "all")
    stored = json.loads((tmp_path / "config.json").read_text())["base"]
    assert stored["path"] == str(bases("smolvla"))
    assert len(stored["fingerprint"]) == 16
    loaded = VegaPolicy.from_pretrained(tmp_path)
    _, seen = base_policy(bases("smolvla"))
    noise = torch.zeros(2, *policy.noise_shape)
    assert torch.equal(*(p.predict_action_chunk(dict(seen), noise=noise) for p in (policy, loaded)))


@pytest.mark.parametrize("tune", ["expert", "lora"])
def test_twenty_steps_of_training_lower_the_loss(tune, bases):
    torch.manual_seed(0)
    policy = VegaPolicy(based_config("smolvla", bases("smolvla"), tune=tune)).train()
    _, seen = base_policy(bases("smolvla"))
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    losses, log = [], {}
    for _ in range(20):
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss, log = policy(dict(seen))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert policy.model.scale.item() != 0
    assert 0 < log["gate"] < 1


def test_actions_are_executed_one_by_one(bases):
    policy = VegaPolicy(based_config("smolvla", bases("smolvla"))).eval()
    _, seen = base_policy(bases("smolvla"))
    noise = torch.zeros(2, *policy.noise_shape)
    chunk = policy.predict_action_chunk(dict(seen), noise=noise)
    policy.reset()
    for step in range(2):
        assert torch.equal(policy.select_action(dict(seen), noise=noise), chunk[:, step])


def test_real_time_chunking_is_the_bases_own(bases):
    base, seen = base_policy(bases("smolvla"))
    policy = VegaPolicy(based_config("smolvla", bases("smolvla"))).eval()
    assert supports_rtc_inference(policy)
    noise = torch.zeros(2, *policy.noise_shape)
    left = torch.ones(2, 3, policy.model.noise_width)
    base.config.rtc_config = RTCConfig(enabled=True, execution_horizon=2)
    base.init_rtc_processor()
    policy.use_rtc(RTCConfig(enabled=True, execution_horizon=2))
    request = {"inference_delay": 1, "prev_chunk_left_over": left, "execution_horizon": 2}
    chunk = base.predict_action_chunk(dict(seen), noise=noise, **request)
    assert torch.equal(policy.predict_action_chunk(dict(seen), noise=noise, **request), chunk)
    policy.config.rtc_config = RTCConfig(enabled=True)
    policy.init_rtc_processor()  # for LeRobot's rollout, whose queue appends
    assert policy.predict_action_chunk(dict(seen), noise=noise, inference_delay=1).shape[1] == 0
    assert policy.base.config.rtc_config.enabled


def test_a_base_alone_is_had_without_a_prior(bases):
    policy = VegaPolicy(based_config("smolvla", bases("smolvla"), prior="none"))
    assert not hasattr(policy.model, "fusion")


def test_weights_that_did_not_arrive_are_refused(bases, tmp_path):
    for file in bases("pi05").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.action_in_proj.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights of the base were not loaded from .*action_in_proj"):
        VegaPolicy(based_config("pi05", tmp_path))


def refused(folder, message, **fields):
    config = based_config("smolvla", folder)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        VegaPolicy(config)


def test_what_a_base_cannot_do_is_refused(bases):
    folder = bases("smolvla")
    base = based_config("smolvla", folder).base
    refused(folder, r"predicts 4 actions at once; got policy\.chunk_size=8", chunk_size=8)
    refused(folder, "fusion=sequence_concat cannot work", fusion=FusionConfig(name="sequence_concat"))
    refused(folder, "fusion=instruction_gate cannot work", fusion=FusionConfig(name="instruction_gate"))
    refused(folder, r"prior\.clip=views", prior=PriorConfig(name="wan_tiny", clip="views"))
    refused(folder, "type 'smolvla'; base=pi0", base=dataclasses.replace(base, name="pi0"))
    refused(folder, "other weights of the base", base=dataclasses.replace(base, fingerprint="0" * 16))


def test_a_hub_out_of_reach_says_what_is_missing_and_how_to_give_a_folder(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("vega_policy.backbones.pretrained_vla.snapshot_download", unreachable)
    config = based_config("smolvla", "x")
    config.base = dataclasses.replace(config.base, path=None)
    expected = r"'lerobot/smolvla_base'.*Missing: config.json.*base\.path.*base=none"
    with pytest.raises(FileNotFoundError, match=expected):
        VegaPolicy(config)
