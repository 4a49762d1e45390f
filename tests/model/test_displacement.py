"""The displacement head: where the target is from the gripper, predicted and read by the action head."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.policies import SIZE, batch, tiny_config
from tests.synthetic_dataset import REPO_ID, write_dataset
from tests.training.test_cuda_graph import UncapturedWithoutPrior, two_steps
from tests.training_runs import assert_bitwise_equal, tiny_policy, tiny_run
from vega_policy.data.augmentation import FRAMES, DisplacementNoise
from vega_policy.data.dataset import DatasetError, MixtureEntry, read_table
from vega_policy.data.loader import join_tables
from vega_policy.model.action_head import DisplacementHead
from vega_policy.model.config import ActionHeadConfig, BaseConfig, DisplacementConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training import cuda_graph
from vega_policy.training import train as setup
from vega_policy.training.train import train

HEADS = pytest.mark.parametrize("head", ["flow", "l1"])
TARGET, NOISE = "vega.displacement", "vega.displacement_noise"


def policy_of(head="flow", weight=0.0, *, is_read=False, **fields):
    """A policy; `is_read` gives the condition of the action head weights that are not zero."""
    torch.manual_seed(0)
    config = tiny_config(PriorConfig(name="none"), freeze_text_encoder=True)  # its dropout would draw too
    config.head = ActionHeadConfig(name=head, width=32, depth=2, heads=2, steps=2, prefix_steps=2, **fields)
    config = dataclasses.replace(config, displacement=DisplacementConfig(weight, width=16, heads=2))
    policy = VegaPolicy(config)
    for name, value in policy.named_parameters():
        if is_read and (name.startswith("model.displacement.embed.2") or "modulation" in name):
            torch.nn.init.normal_(value, std=0.3)
    return policy


def loss_of(policy, given):
    torch.manual_seed(1)
    return policy(given)


def with_target(x: float = 0.3, **more):
    return batch() | {TARGET: torch.tensor([[x, 0.0, 0.1], [-x, 0.2, 0.0]]), **more}


@HEADS
def test_a_policy_starts_exactly_where_one_without_the_head_starts(head):
    off, on = policy_of(head), policy_of(head, weight=0.5)
    assert off.model.displacement is None
    assert not any("displacement" in name for name in off.state_dict())
    held = on.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in off.state_dict().items())
    noise, observation = torch.randn(2, 4, 7), on.observe(batch())
    for more in ({}, {"prefix": torch.zeros(2, 2, 7)}):
        first, second = (one.eval().model.sample_actions(observation, noise, **more) for one in (off, on))
        assert torch.equal(first, second)
    plain, _ = loss_of(off.train(), batch())
    total, metrics = loss_of(on.train(), with_target(**{NOISE: torch.ones(2, 3)}))
    assert total.item() == pytest.approx(plain.item() + 0.5 * metrics["displacement"], rel=1e-6)
    held_out, metrics = loss_of(on.eval(), with_target())
    assert torch.equal(held_out, loss_of(off.eval(), batch())[0])  # stays that of the actions
    assert "displacement" not in metrics


@HEADS
def test_the_prediction_modulates_each_chunk_and_its_noise_changes_the_loss(head):
    policy, plain = policy_of(head, 0.5, is_read=True).eval(), policy_of(head).eval()
    plain.load_state_dict(policy.state_dict(), strict=False)  # the same, but for the condition
    noise = torch.randn(6, 4, 7)
    observation = policy.observe(batch())
    for more in ({}, {"prefix": torch.zeros(6, 2, 7)}):
        found, other = (one.model.sample_actions(observation, noise, **more) for one in (policy, plain))
        assert not torch.allclose(found, other, atol=1e-4)
        alone = policy.model.sample_actions(
            policy.observe({name: value[1:] for name, value in batch().items()}),
            noise[3:],
            **{name: value[3:] for name, value in more.items()},
        )
        torch.testing.assert_close(found[3:], alone)  # each row has its own condition
    policy.train()
    without, noisy = (loss_of(policy, with_target(**more))[0] for more in ({}, {NOISE: torch.ones(2, 3)}))
    assert not torch.allclose(without, noisy)


@HEADS
def test_its_gradient_reaches_the_trunk_and_the_gradient_of_the_actions_does_not_reach_it(head):
    policy = policy_of(head, 0.5, is_read=True).train()
    gradients = {}
    for name, given in {
        "one": with_target(),
        "other target": with_target(-0.3),
        "other actions": with_target(action=torch.zeros(2, 4, 7)),
    }.items():
        policy.zero_grad()
        loss_of(policy, given)[0].backward()
        trunk = policy.model.backbone.blocks[0].attention.kv_proj.weight.grad.clone()
        gradients[name] = trunk, policy.model.displacement.output[1][2].weight.grad.clone()
    assert not torch.allclose(gradients["one"][0], gradients["other target"][0], atol=1e-6)
    assert torch.equal(gradients["one"][1], gradients["other actions"][1])
    assert policy.model.displacement.embed[0].weight.grad.abs().sum() > 0


class HostReads(TorchDispatchMode):
    """Records operations that wait for the device, which a CUDA graph cannot."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(part in str(operation) for part in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(str(operation))
        return operation(*args, **(kwargs or {}))


@HEADS
def test_its_loss_reads_no_value_on_the_host(head):
    policy = policy_of(head, 0.5, is_read=True).train()
    frames = torch.zeros(2, 2, 3, SIZE, SIZE, dtype=torch.uint8)
    words = policy.model.backbone.text_encoder(["lift"] * 2)
    given = with_target(**{NOISE: torch.ones(2, 3), FRAMES: frames, "vega.words": words})
    noise, time = policy.sample_noise_and_time(given["action"])
    with HostReads() as reads:
        policy(given, noise=noise, time=time, metrics_as_tensors=True)[0].backward()
    assert reads.found == []
    with HostReads() as reads:
        frames.sum().item()
    assert len(reads.found) == 1


def test_it_learns_a_displacement_that_the_context_tells():
    torch.manual_seed(0)
    head = DisplacementHead(DisplacementConfig(1.0, width=16, heads=2), 8, 4)
    context, mask, target = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool), 0.3 * torch.randn(3, 3)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (head(context, mask)[0] - target).abs().mean().backward()
        optimizer.step()
    assert (head(context, mask)[0] - target).abs().max() < 0.03


def test_noise_has_its_deviation_and_follows_from_seed_and_batch():
    noise = DisplacementNoise(0.02, seed=1)
    drawn = noise({TARGET: torch.zeros(4000, 3)}, 7)[NOISE]
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(drawn, noise.draw(4000, 7))
    assert not torch.equal(drawn, noise.draw(4000, 8))


@pytest.fixture(scope="module")
def located(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "located", displacement=True)


def run(root, output, **fields):
    policy = tiny_policy(displacement=DisplacementConfig(0.5, width=16, heads=2))
    return tiny_run(root, output, policy=policy, **fields)


def test_a_table_holds_the_displacement_where_it_is_read(located):
    table = read_table(located, displacement=True)
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.01, 0.0], [0.01, 0.0, 0.0]])
    torch.testing.assert_close(table.displacement[[0, 1, 9]], expected)
    assert read_table(located).displacement is None
    assert torch.equal(join_tables([table, table]).displacement[27:], table.displacement)


@pytest.mark.slow
def test_a_run_resumes_bitwise(located, tmp_path):
    whole = train(run(located, tmp_path / "whole"))
    parts = [
        train(run(located, tmp_path / "parts", **more)) for more in ({"stop_after": 2}, {"resume": True})
    ]
    assert_bitwise_equal(whole, parts[1])


def test_captured_steps_learn_it_as_uncaptured_ones_do(located, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CapturedGradient", UncapturedWithoutPrior)
    monkeypatch.setattr(setup, "check_capturable", lambda *_: None)
    fields = {"dataset": {"held_out": 0.3}}
    runs = [two_steps(run(located, tmp_path / f"{on}", capture=on, **fields)) for on in (False, True)]
    assert runs[0][0][0]["displacement"] > 0
    torch.testing.assert_close(runs[1][:2], runs[0][:2], atol=1e-5, rtol=1e-4)


def test_videos_are_decoded_beside_it_and_a_loaded_policy_keeps_its_head(located, tmp_path):
    dataset = {"cache": "none", "mixture": [MixtureEntry(REPO_ID, str(located))] * 2, "root": None}
    checkpoint = train(run(located, tmp_path / "run", steps=1, dataset=dataset))
    assert VegaPolicy.from_pretrained(checkpoint / "pretrained_model").model.displacement is not None


def test_what_cannot_be_learned_is_refused(root, tmp_path):
    with pytest.raises(DatasetError, match=r"needs the feature displacement \[3\] .*got none\. Render it"):
        train(run(root, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"needs vega\.displacement \[b 3\] in a batch"):
        policy_of(weight=0.5).train()(batch())
    with pytest.raises(ValueError, match="not for a base"):
        tiny_policy(base=BaseConfig(name="smolvla"), displacement=DisplacementConfig(1.0))
    with pytest.raises(ValueError, match=r"displacement\.noise: .* got -1"):
        DisplacementConfig(noise=-1)
    with pytest.raises(ValueError, match=r"multiple of displacement\.heads; got width 18, heads 4"):
        DisplacementConfig(width=18)
