"""Training for delay: which actions the prefix of a training chunk holds."""

import dataclasses

import pytest
import torch

from tests.policies import batch, tiny_config
from tests.synthetic_dataset import REPO_ID, write_dataset
from tests.training.test_cuda_graph import UncapturedWithoutPrior, two_steps
from tests.training_runs import assert_bitwise_equal, tiny_policy, tiny_run
from vega_policy.data.dataset import DatasetError, MixtureEntry, fingerprint_dataset, read_table
from vega_policy.data.loader import join_tables
from vega_policy.model.config import ActionHeadConfig, BaseConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training import cuda_graph
from vega_policy.training import train as setup
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.train import make_trainer, train

HEADS = pytest.mark.parametrize("head", ["flow", "l1"])
EXECUTED = "vega.executed_action"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Executed actions are the clean ones and 0.1 + 0.01 t."""
    lengths = (5, 4, 7, 6)
    return write_dataset(tmp_path_factory.mktemp("data") / "noisy", lengths=lengths, executed=True)


def head_config(name="flow", prefix_actions="executed"):
    sizes = {"width": 16, "depth": 1, "heads": 2, "steps": 2}
    return ActionHeadConfig(name=name, **sizes, prefix_steps=2, prefix_actions=prefix_actions)


def run(root, output, head="flow", prefix_actions="executed", policy=None, **fields):
    policy = tiny_policy(head=head_config(head, prefix_actions), **policy or {})
    return tiny_run(root, output, policy=policy, **{"batch_size": 4} | fields)


def losses_of(config, monkeypatch):
    """Train, and return the processors and what the head's loss was given in each step."""
    trainer = make_trainer(config, make_accelerator(cpu=True, precision="no"), None)
    given, head = [], trainer.state.policy.model.head
    loss = head.loss
    monkeypatch.setattr(head, "loss", lambda *args: (given.append(args[2:]), loss(*args))[1])
    trainer.fit()
    weights = {name: weight.detach() for name, weight in trainer.weights.items()}
    return trainer.state.processors, given, weights


@HEADS
@pytest.mark.parametrize(
    "dataset", [{}, {"cache": "none"}, {"pairs": True}], ids=["cached", "videos", "pairs"]
)
def test_the_head_is_given_executed_actions_in_the_prefix_and_nothing_else_changes(
    noisy, tmp_path, monkeypatch, head, dataset
):
    results = {}
    for kind in ("clean", "executed"):
        config = run(noisy, tmp_path / kind, head, kind, dataset=dataset)
        results[kind] = losses_of(config, monkeypatch)
    (_, clean, plain), (processors, executed, weights) = results.values()
    assert len(clean) == len(executed) == 4
    for before, after in zip(clean, executed, strict=True):
        for one, other in zip(before[:-1], after[:-1], strict=True):  # actions, padding, noise, time
            assert one is other is None or torch.equal(one, other)
        assert before[-1] is None
        added = processors[1](after[-1]) - processors[1](after[0])  # in the robot's units
        offset = added[..., :1].expand_as(added)
        torch.testing.assert_close(added, offset, atol=1e-5, rtol=0)
        steps = (offset[..., 0] - 0.1) / 0.01  # of each action in its episode
        assert (steps[:, 0] > -0.01).all()
        stays = after[1][:, 1:]  # behind the end the last action is repeated
        torch.testing.assert_close(steps.diff(dim=1), (~stays).float(), atol=1e-2, rtol=0)
    assert any((after[3] == 0).any() for after in executed)
    assert not all(torch.equal(weight, plain[name]) for name, weight in weights.items())


def test_relative_actions_are_relative_in_the_prefix_too(noisy, tmp_path, monkeypatch):
    policy = {"use_relative_actions": True}
    processors, given, _ = losses_of(run(noisy, tmp_path / "run", policy=policy), monkeypatch)
    for actions, _, _, _, _, prefix in given:
        restored = [processors[1](values) for values in (actions, prefix)]  # both by the same state
        added = restored[1] - restored[0]
        torch.testing.assert_close(added, added[..., :1].expand_as(added), atol=1e-5, rtol=0)
        assert ((added > 0.09) & (added < 0.18)).all()


def test_the_table_and_its_fingerprint_hold_executed_actions_where_they_are_read(noisy):
    table, without = read_table(noisy, executed=True), read_table(noisy)
    assert without.executed is None
    torch.testing.assert_close(
        table.executed[:2] - table.action[:2], torch.tensor([[0.1], [0.11]]).expand(2, 7)
    )
    assert torch.equal(join_tables([table, table]).executed[len(table) :], table.executed)
    assert join_tables([table, without]).executed is None
    added = fingerprint_dataset(noisy, table).keys() - fingerprint_dataset(noisy, without).keys()
    assert added == {"executed actions"}


@HEADS
def test_a_run_resumes_bitwise(noisy, tmp_path, head):
    whole = train(run(noisy, tmp_path / "whole", head))
    parts = [
        train(run(noisy, tmp_path / "parts", head, **more)) for more in ({"stop_after": 2}, {"resume": True})
    ]
    assert_bitwise_equal(whole, parts[1])


@HEADS
def test_captured_steps_learn_it_as_uncaptured_ones_do(noisy, tmp_path, monkeypatch, head):
    monkeypatch.setattr(cuda_graph, "CapturedGradient", UncapturedWithoutPrior)
    monkeypatch.setattr(setup, "check_capturable", lambda *_: None)
    fields = {"dataset": {"held_out": 0.3}}
    runs = [two_steps(run(noisy, tmp_path / f"{on}", head, capture=on, **fields)) for on in (False, True)]
    torch.testing.assert_close(runs[1][:2], runs[0][:2], atol=1e-5, rtol=1e-4)


def test_what_has_no_executed_actions_is_refused(root, noisy, tmp_path):
    refusal = r"needs the feature executed_action \[7\] in .*; got none\. Render it again"
    with pytest.raises(DatasetError, match=refusal):
        train(run(root, tmp_path / "run"))
    mixture = [MixtureEntry(REPO_ID, str(noisy)), MixtureEntry(REPO_ID, str(root))]
    with pytest.raises(DatasetError, match=refusal):
        train(run(noisy, tmp_path / "run", dataset={"mixture": mixture, "root": None}))
    with pytest.raises(
        ValueError, match=r"executed needs a prefix: expected head\.prefix_steps of at least 1"
    ):
        ActionHeadConfig(prefix_actions="executed")
    with pytest.raises(
        ValueError, match=r"head\.prefix_actions: expected one of clean, executed; got 'noisy'"
    ):
        ActionHeadConfig(prefix_steps=2, prefix_actions="noisy")
    with pytest.raises(ValueError, match="not for a base"):
        tiny_policy(base=BaseConfig(name="smolvla"), head=head_config())
    policy = VegaPolicy(dataclasses.replace(tiny_config(), head=head_config()))
    with pytest.raises(ValueError, match=r"needs vega\.executed_action \[b t a\] in a batch"):
        policy(batch())
    policy(batch() | {EXECUTED: batch()["action"]})


def test_a_policy_that_was_trained_without_a_prefix_goes_on_with_executed_actions(noisy, tmp_path):
    plain = tiny_policy(head=dataclasses.replace(head_config("l1"), prefix_steps=0, prefix_actions="clean"))
    saved = train(tiny_run(noisy, tmp_path / "plain", policy=plain, steps=1)) / "pretrained_model"
    later = train(run(noisy, tmp_path / "later", "l1", policy={"pretrained_path": saved}, steps=1))
    head = VegaPolicy.from_pretrained(later / "pretrained_model").config.head
    assert (head.prefix_steps, head.prefix_actions) == (2, "executed")
