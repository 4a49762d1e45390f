"""A served checkpoint predicts what it predicts locally, with and without real-time chunking."""

import numpy as np
import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from tests.policies import batch, tiny_config, write_checkpoint
from tests.policy_servers import address, observations, running
from vega_policy.deployment.client import RemotePolicy
from vega_policy.deployment.latency_benchmark import Cell, DelayedPlan, benchmark_server
from vega_policy.deployment.protocol import RTCContext
from vega_policy.deployment.server import ServedCheckpoint, load_served_policy, warm_up
from vega_policy.evaluation.policies import load_lerobot_policy
from vega_policy.model.config import ActionHeadConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_checkpoint_predicts_the_same_through_the_server_bit_for_bit(checkpoint):
    local = load_served_policy(checkpoint, device="cpu")
    warm_up(local, 64)
    with running(load_served_policy(checkpoint, device="cpu")) as (_, port):
        remote = RemotePolicy(address(port))
        assert remote.description == local.description
        assert remote.served.fingerprint == local.fingerprint
        for seed in range(3):
            observed, noise = (
                observations(seed=seed, side=80),
                np.random.default_rng(seed).normal(size=(1, 4, 7)),
            )
            noise = noise.astype(np.float32)
            np.testing.assert_array_equal(remote.chunk(observed, noise), local.chunk(observed, noise))
            rtc = RTCContext(local.chunk(observed, noise)[0, 1:], 1, 3, 10.0)
            np.testing.assert_array_equal(
                remote.chunk(observed, noise, rtc), local.chunk(observed, noise, rtc)
            )
        (row,) = benchmark_server(address(port), clients=[2], seconds=0.5, side=64)
        assert (row["clients"], row["refused"]) == (2, 0)
        assert row["requests_per_second"] > 1
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]


def test_a_continued_chunk_begins_with_what_is_being_executed(checkpoint):
    policy = load_served_policy(checkpoint, device="cpu")
    observed, rng = observations(side=64), np.random.default_rng(1)
    noise = rng.normal(size=(1, 4, 7)).astype(np.float32)
    left = rng.uniform(-1, 1, (3, 7)).astype(np.float32)
    free = policy.chunk(observed, noise)[0]
    guided = policy.chunk(observed, noise, RTCContext(left, 2, 3, 10.0))[0]
    assert np.abs(guided[:2] - left[:2]).mean() < 0.1 * np.abs(free[:2] - left[:2]).mean()
    np.testing.assert_allclose(guided[3], free[3], atol=0.2)  # beyond the horizon nothing pulls


@pytest.mark.parametrize("name", ["flow", "l1"])
@pytest.mark.parametrize(("delay", "under_way"), [(1, 0), (1, 1), (2, 0)])
def test_the_prefix_is_what_is_executed_from_the_observation_on_in_the_policys_units(
    tmp_path, monkeypatch, name, delay, under_way
):
    config = ActionHeadConfig(name=name, width=32, depth=1, heads=2, steps=2, prefix_steps=3)
    chunks = load_lerobot_policy(write_checkpoint(tmp_path, config), device="cpu")
    policy, head, given = ServedCheckpoint(chunks, "tiny"), chunks.policy.model.head, []
    sample = head.sample
    monkeypatch.setattr(head, "sample", lambda *args: (given.append(args[4]), sample(*args))[1])
    plan = DelayedPlan(Cell("rtc", delay, under_way), action_steps=2, threshold=2, action_size=7)
    executed, predictions = [], []
    for call in range(12):
        observed = observations(seed=call, side=64)  # another chunk each time
        noise = np.random.default_rng(call).normal(size=(1, 4, 7)).astype(np.float32)
        context = plan.context()
        chunk = policy.chunk(observed, noise, context)[0]
        if context is not None:
            predictions.append((len(executed), chunks.postprocessor(given[-1])[0].numpy(), chunk))
        executed += [command for command in plan.advance(chunk) if command is not None]
    assert given[0] is None
    assert len(predictions) == 11
    for start, prefix, chunk in predictions[:-2]:
        known = len(prefix)  # fewer than the delay where the plan ends before the chunk arrives
        assert known == delay + under_way or (delay == 2 and known == 1)
        np.testing.assert_allclose(prefix, executed[start : start + known], atol=1e-5)
        np.testing.assert_array_equal(executed[start + known], chunk[known])
        assert not np.allclose(executed[start], executed[start + 1], atol=1e-2)  # a shift would be seen


def test_a_chunk_is_guided_only_where_something_of_the_last_one_is_left():
    policy = VegaPolicy(tiny_config()).eval()
    assert policy.supports_rtc()
    policy.use_rtc(RTCConfig(execution_horizon=4))
    observed, noise, left = batch(1), torch.randn(1, 4, 7), torch.rand(2, 7)
    kwargs = {"noise": noise, "inference_delay": 1}
    guided = policy.predict_action_chunk(observed, prev_chunk_left_over=left, **kwargs)
    assert torch.equal(
        guided, policy.predict_action_chunk(observed, prev_chunk_left_over=left[None], **kwargs)
    )
    free = policy.predict_action_chunk(observed, noise=noise)
    assert not torch.equal(guided, free)
    assert torch.equal(free, policy.predict_action_chunk(observed, prev_chunk_left_over=None, **kwargs))
    assert torch.equal(free, policy.predict_action_chunk(observed, prev_chunk_left_over=left[:0], **kwargs))
    assert not guided.requires_grad


def test_without_a_flow_the_chunk_is_blended_with_the_rest_of_the_last():
    config = tiny_config()
    config.head = ActionHeadConfig(name="l1", width=32, depth=1, heads=2)
    policy = VegaPolicy(config).eval()
    observed, left = batch(1), torch.rand(3, 7) + 5
    free = policy.predict_action_chunk(observed)
    assert torch.equal(
        free, policy.predict_action_chunk(observed, inference_delay=1, prev_chunk_left_over=left)
    )
    policy.use_rtc(RTCConfig(execution_horizon=3))
    chunk = policy.predict_action_chunk(observed, inference_delay=1, prev_chunk_left_over=left)
    share = ((chunk - free)[0, :3] / (left - free[0, :3])).mean(dim=-1)
    torch.testing.assert_close(share, torch.tensor([1.0, 2 / 3, 1 / 3]))
    assert torch.equal(chunk[:, 3], free[:, 3])


def test_a_policy_with_a_history_refuses_real_time_chunking():
    policy = VegaPolicy(tiny_config(PriorConfig(name="wan_tiny", clip="history")))
    assert not policy.supports_rtc()
    policy.config.rtc_config = RTCConfig()
    with pytest.raises(ValueError, match=r"clip=history"):
        policy.init_rtc_processor()


def test_names_of_a_dataset_are_kept_in_the_checkpoint(tmp_path):
    config = tiny_config()
    config.set_dataset_feature_metadata(
        {"action": {"names": list("abcdefg")}, "observation.state": {"names": None}}
    )
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.action_feature_names == list("abcdefg")
    assert loaded.state_feature_names is None
    assert loaded.rtc_config is None
