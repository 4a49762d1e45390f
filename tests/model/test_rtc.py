"""LeRobot's rtc engine executes every planned step once, though it drops by the clock (a virtual one)."""

import math

import pytest
import torch
from lerobot.policies.rtc import ActionQueue, RTCConfig
from lerobot.rollout.inference.rtc import _normalize_prev_actions_length

from tests.policies import batch, tiny_config
from vega_policy.configuration_vega import ActionHeadConfig
from vega_policy.model.rtc import RTCQueueAdapter
from vega_policy.modeling_vega import VegaPolicy

CHUNK = 16


class Engine:
    """LeRobot's queue and loop in virtual time, in which its processors take some, too.

    The policy plans the numbers that come next; a view is of the moment before its action is taken.
    """

    def __init__(self, latencies, helped=True, period=1 / 20, threshold=10):
        self.clock, self.tick, self.period, self.threshold = 0.0, 0, period, threshold
        self.queue, self.done, self.asked = ActionQueue(RTCConfig()), [], []
        self.latencies, self.longest, self.helped = iter(latencies), 0.0, helped
        self.helper = RTCQueueAdapter(now=lambda: self.clock, wait=self.think)

    def think(self, seconds):
        """Time goes on, and with it what is executed."""
        self.clock += seconds
        while (self.tick + 1) * self.period <= self.clock:
            self.tick += 1
            self.seen = len(self.done)
            if (action := self.queue.get()) is not None:
                self.done.append(int(action))

    def policy(self, *, inference_delay, prev_chunk_left_over):
        left = prev_chunk_left_over
        self.asked.append((self.view, inference_delay, None if left is None else left[0, :, 0].tolist()))
        self.think(next(self.latencies) * self.period)
        return torch.arange(CHUNK, dtype=torch.float32)[None, :, None] + self.view

    def ask(self):
        start, left = self.clock, self.queue.get_left_over()
        self.view = self.seen
        told = {
            "inference_delay": math.ceil(self.longest / self.period),
            "prev_chunk_left_over": None if left is None else _normalize_prev_actions_length(left, 10),
        }
        self.think(0.05 * self.period)
        if self.helped:
            chunk = self.helper.answer(self.policy, **told)[0]
        else:
            chunk = self.policy(**{**told, "prev_chunk_left_over": None})[0]
        self.think(0.02 * self.period)
        latency = self.clock - start
        self.longest = max(self.longest, latency)
        self.queue.merge(chunk, chunk, math.ceil(latency / self.period))

    def play(self, steps):
        self.think(self.period)
        while self.tick < steps:
            if self.queue.qsize() <= self.threshold:
                self.ask()
            else:
                self.think(0.1 * self.period)
        return self


def slow_at_first(latency):
    yield 3.3 * latency
    while True:
        yield latency


@pytest.mark.parametrize("period", [1 / 20, 1 / 30])
@pytest.mark.parametrize("latency", [0.3, 1.2, 1.8, 2.4, 3.6])
def test_no_planned_step_is_lost_or_done_twice(latency, period):
    engine = Engine(slow_at_first(latency), period=period).play(150)
    assert engine.done == list(range(len(engine.done)))
    assert len(engine.done) > 70
    for view, _, left in engine.asked[2:]:
        assert left is None or left[0] == view  # what is left begins where the plan does


def test_without_help_the_first_steps_are_lost():
    assert Engine(slow_at_first(1.8), helped=False).play(150).done[0] == 7


@pytest.mark.parametrize("latency", [1.2, 1.8])
def test_an_episode_begins_whole_after_the_queue_was_cleared(latency):
    engine = Engine(slow_at_first(latency)).play(40)
    engine.queue.clear()
    engine.done.clear()
    engine.seen = 0
    engine.play(80)
    assert engine.done == list(range(len(engine.done)))
    assert len(engine.done) > 30


def test_nothing_is_lost_when_the_queue_runs_dry_while_the_policy_thinks():
    def latencies():
        yield from (1.2, 1.2, 1.2, 14.0)  # one answer takes very long
        while True:
            yield 1.2

    engine = Engine(latencies()).play(100)
    assert engine.done == list(range(len(engine.done)))


def test_the_policy_helps_lerobots_rollout_and_only_that():
    config = tiny_config()
    config.head = ActionHeadConfig(name="l1", width=32, depth=1, heads=2)
    policy, seen = VegaPolicy(config).eval(), batch(1)
    policy.config.rtc_config = RTCConfig()
    policy.init_rtc_processor()
    chunk = policy.predict_action_chunk(seen)
    first = policy.predict_action_chunk(seen, inference_delay=0, prev_chunk_left_over=None)
    assert torch.equal(first, chunk[:, :1])
    second = policy.predict_action_chunk(seen, inference_delay=20, prev_chunk_left_over=None)
    assert torch.equal(second[:, -config.chunk_size :], chunk)
    assert second.shape[1] > config.chunk_size
    policy.use_rtc(policy.config.rtc_config)  # deploy_policy.py joins by what was executed
    assert torch.equal(policy.predict_action_chunk(seen, inference_delay=0, prev_chunk_left_over=None), chunk)
