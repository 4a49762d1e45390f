"""LeRobot's rtc engine executes every planned action once and in order, however long predictions take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.policies.rtc import ActionQueue, RTCConfig
from lerobot.rollout.inference.rtc import _normalize_prev_actions_length

from tests.policies import batch, tiny_config
from vega_policy.configuration_vega import ActionHeadConfig
from vega_policy.model.rtc import RTCQueueAdapter
from vega_policy.modeling_vega import VegaPolicy

CHUNK, ACTION_STEPS, HORIZON = 16, 8, 10


class Rollout:
    """LeRobot's queue, its loop and a simulated robot in virtual time, in tenths of a control step.

    The policy plans the numbers that come next; the robot executes one command a step and its observation
    waits for the last one.
    """

    def __init__(self, latencies, *, threshold=2, adapted=True, dawdle=2):
        self.latencies, self.threshold, self.dawdle = iter(latencies), threshold, dawdle
        config = RTCConfig()
        self.adapter = RTCQueueAdapter(ACTION_STEPS, wait=lambda seconds: None) if adapted else None
        config.enabled = self.adapter is None
        self.queue, self.executed, self.requests = ActionQueue(config), [], []
        self.view = self.sent = self.answer = self.arrival = None
        self.now = 0

    def predict(self, *, inference_delay, prev_chunk_left_over):
        since = prev_chunk_left_over
        self.requests.append((self.view, inference_delay, None if since is None else since[0, :, 0].tolist()))
        return torch.arange(CHUNK, dtype=torch.float32)[None, :, None] + self.view + 1

    def request(self):
        left = self.queue.get_left_over()
        padded = None if left is None else _normalize_prev_actions_length(left, HORIZON)
        if self.adapter is None:
            answer = self.predict(inference_delay=0, prev_chunk_left_over=None)
        else:
            answer = self.adapter.answer(self.predict, inference_delay=3, prev_chunk_left_over=padded)
        self.answer, self.arrival = answer[0], self.now + next(self.latencies)
        self.requested = self.now

    def step(self):
        """Advance the inference thread, then the control loop, then the robot."""
        if self.answer is not None and self.now >= self.arrival:
            ceil = -(-(self.now - self.requested) // 10)
            self.queue.merge(self.answer, self.answer, ceil)
            self.answer = None
        phase = self.now % 10
        if phase == 0:
            self.view = len(self.executed)
        if phase == self.dawdle:  # the observation's processors take a while before the action is taken
            action = self.queue.get()
            if action is not None:
                self.executed.append(int(action))
        if self.answer is None and self.view is not None and self.queue.qsize() <= self.threshold:
            self.request()
        self.now += 1

    def run(self, steps):
        for _ in range(10 * steps):
            self.step()
        return self


@settings(max_examples=20, deadline=None)
@given(
    latencies=st.lists(st.integers(1, 70), min_size=60, max_size=60),
    threshold=st.integers(0, 6),
    dawdle=st.integers(0, 5),
)
def test_for_any_delays_every_planned_action_is_executed_once_and_in_order(latencies, threshold, dawdle):
    rollout = Rollout(latencies, threshold=threshold, dawdle=dawdle).run(50)
    assert rollout.executed == list(range(1, len(rollout.executed) + 1))
    assert len(rollout.executed) >= 24  # where each prediction takes 7 steps: 8 actions in 15 or 16 steps
    for view, delay, since in rollout.requests[1:]:
        if since is not None:  # what the policy is given begins with the action of its observation
            assert since == list(range(view + 1, view + 1 + delay))


def test_by_the_clock_first_actions_are_lost():
    assert Rollout([33] * 40, adapted=False).run(20).executed[0] == 5


def test_an_episode_begins_with_its_own_plan_after_lerobot_has_reset_the_policy():
    rollout = Rollout([15] * 200).run(31)
    rollout.adapter.reset()  # as LeRobot's engine does: first the policy, then the queue
    rollout.queue.clear()
    rollout.answer, rollout.executed = None, []
    rollout.view = 500  # the last observation of the episode before
    rollout.request()
    assert len(rollout.answer) == 0
    rollout.run(30)
    assert rollout.executed == list(range(1, len(rollout.executed) + 1))
    assert len(rollout.executed) > 15


def test_a_scene_that_changes_while_a_policy_runs_begins_in_the_middle_of_the_old_plan():
    rollout = Rollout([15] * 200).run(31)
    old = rollout.executed[-1]
    rollout.executed = []  # a new scene, of which nothing in LeRobot's loop informs the policy
    rollout.run(3)
    assert rollout.executed == [old + 1, old + 2, old + 3]


def test_a_prediction_that_was_running_at_a_reset_gives_no_action():
    adapter = RTCQueueAdapter(ACTION_STEPS, wait=lambda seconds: None)
    chunk = torch.ones(1, CHUNK, 7)
    adapter.answer(lambda **rtc: chunk)

    def predict(**rtc):
        adapter.reset()
        return chunk

    assert adapter.answer(predict).shape == (1, 0, 7)


def test_commands_under_way_are_skipped_but_for_the_first_chunk():
    adapter = RTCQueueAdapter(ACTION_STEPS, latency_steps=2, wait=lambda seconds: None)
    seen = []

    def predict(inference_delay, prev_chunk_left_over):
        seen.append((inference_delay, prev_chunk_left_over))
        return torch.arange(CHUNK, dtype=torch.float32)[None, :, None] + 100 * len(seen)

    adapter.answer(predict)
    first = adapter.answer(predict)
    assert first[0, :, 0].tolist() == list(range(200, 208))
    second = adapter.answer(predict, prev_chunk_left_over=first[0, 7:])
    assert seen[-1][0] == 4  # two under way, the observation's own, and one left
    assert seen[-1][1][0, :, 0].tolist() == [204, 205, 206, 207]
    assert second[0, :, 0].tolist() == list(range(304, 312))


def test_a_threshold_that_leaves_no_new_actions_and_a_foreign_queue_are_refused():
    adapter, chunk = RTCQueueAdapter(ACTION_STEPS, wait=lambda seconds: None), torch.rand(1, CHUNK, 7)
    adapter.answer(lambda **rtc: chunk)
    first = adapter.answer(lambda **rtc: chunk)
    with pytest.raises(ValueError, match=r"inference\.queue_threshold: .* 8 actions left, and adds 8"):
        adapter.answer(lambda **rtc: chunk, prev_chunk_left_over=first[0])
    with pytest.raises(RuntimeError, match="reset the policy"):
        adapter.answer(lambda **rtc: chunk, prev_chunk_left_over=torch.rand(3, 7))


def test_the_policy_adapts_to_lerobots_rollout_and_only_to_that():
    config = tiny_config()
    config.head = ActionHeadConfig(name="l1", width=32, depth=1, heads=2)
    policy, seen = VegaPolicy(config).eval(), batch(1)
    policy.config.rtc_config = shared = RTCConfig()
    policy.init_rtc_processor()
    assert not shared.enabled  # LeRobot's queue appends
    chunk = policy.predict_action_chunk(seen)
    request = {"inference_delay": 0, "prev_chunk_left_over": None}
    assert policy.predict_action_chunk(seen, **request).shape == (1, 0, 7)
    assert torch.equal(policy.predict_action_chunk(seen, **request), chunk[:, : config.n_action_steps])
    policy.use_rtc(RTCConfig())  # deploy_policy.py joins chunks itself
    assert torch.equal(policy.predict_action_chunk(seen, **request), chunk)


def test_each_chunk_but_the_first_of_an_episode_begins_after_the_commands_under_way(monkeypatch):
    config = tiny_config()
    config.latency_steps = 1
    policy, seen = VegaPolicy(config).eval(), batch(1)
    chunk = torch.arange(4.0)[None, :, None].expand(1, 4, 7)
    monkeypatch.setattr(policy, "predict_action_chunk", lambda *_, **__: chunk)
    for _ in range(2):
        policy.reset()
        assert [float(policy.select_action(seen)[0, 0]) for _ in range(5)] == [0, 1, 1, 2, 1]


@pytest.mark.parametrize("name", ["flow", "l1"])
def test_a_policy_that_was_trained_for_delay_continues_the_actions_under_way(name):
    config = tiny_config()
    config.head = ActionHeadConfig(name=name, width=32, depth=1, heads=2, steps=2, prefix_steps=2)
    policy, seen, noise = VegaPolicy(config).eval(), batch(1), torch.randn(1, 4, 7)
    left = torch.rand(3, 7)
    for weight in policy.model.head.parameters():  # away from adaLN-zero's identity
        weight.data += 0.1 * torch.randn_like(weight)
    free = policy.predict_action_chunk(seen, noise=noise)
    chunk = policy.predict_action_chunk(seen, noise=noise, inference_delay=3, prev_chunk_left_over=left)
    assert torch.equal(chunk[0, :2], left[:2])  # at most prefix_steps of them
    assert not torch.equal(chunk[:, 2:], free[:, 2:])
    for rtc in (None, RTCConfig()):  # with it, as vega-deploy and the server predict
        policy.use_rtc(rtc)
        for delay, rest in ((0, left), (1, left[:0])):
            request = {"inference_delay": delay, "prev_chunk_left_over": rest}
            assert torch.equal(policy.predict_action_chunk(seen, noise=noise, **request), free)
