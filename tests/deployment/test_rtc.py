"""Real-time chunking executes every step of what the policy plans once, however long the policy thinks."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from vega_policy.deployment.latency_benchmark import WAYS, Clockless
from vega_policy.deployment.rtc import FAILURES_IN_A_ROW, RealTimeEngine
from vega_policy.deployment.safety import JointLimits, SafetyFilter

CHUNK = 16


class World:
    """A task of numbered steps; its policy plans the next ones, and thinking takes some ticks."""

    def __init__(self, thinking, threshold=10, chunk=CHUNK):
        self.done, self.asked, self.thinking, self.chunk = [], [], thinking, chunk
        self.safety = SafetyFilter([JointLimits("x.pos", -1.0, 1.0)], period=0.05)
        self.engine = RealTimeEngine(
            self.predict, lambda: None, self.safety, threshold=threshold, shutdown=threading.Event()
        )

    def tick(self):
        self.safety.observed(time.monotonic())
        self.engine.notify_observation({"next step": len(self.done)})
        action = self.engine.get_action(None)
        if action is not None:  # without one, the hand holds still, and no step of the task is done
            self.done.append(int(action))

    def predict(self, observation, delay, left):
        self.asked.append((observation["next step"], delay, left))
        for _ in range(self.thinking):
            self.tick()
        chunk = torch.arange(self.chunk)[:, None] + observation["next step"]
        return chunk, chunk

    def play(self, ticks):
        for _ in range(ticks):
            self.tick()
            self.engine.think()
        return self


@pytest.mark.parametrize("thinking", [0, 1, 2, 5, 8, 11, 20])
def test_no_step_is_lost_or_done_twice_however_long_the_policy_thinks(thinking):
    world = World(thinking).play(60)
    assert world.done == list(range(len(world.done)))
    assert len(world.done) > 40
    for step, delay, left in world.asked:
        assert delay <= thinking + 1  # the action of the very tick that is looked at, too
        assert left is None or int(left[0]) == step  # what is left begins where the view was taken


def test_what_is_left_and_the_longest_delay_reach_the_policy():
    world = World(thinking=3).play(40)
    assert world.asked[0][1:] == (0, None)
    assert [delay for _, delay, _ in world.asked[2:]] == [4] * len(world.asked[2:])
    assert all(len(left) <= 10 for *_, left in world.asked[1:])


def test_nothing_is_executed_of_a_plan_that_an_episode_before_asked_for():
    world = World(thinking=0).play(3)
    world.thinking = 2
    forget = world.predict

    def predict(*arguments):
        answer = forget(*arguments)
        world.engine.reset()
        return answer

    world.engine._predict = predict
    world.play(5)  # the last plan runs low
    world.done.clear()
    for _ in range(3):
        world.engine.think()
        assert world.engine.get_action(None) is None


def test_a_plan_from_an_old_view_is_refused():
    world = World(thinking=0)
    world.safety.observed(time.monotonic() - 2.0)
    world.engine.notify_observation({"next step": 0})
    world.engine.think()
    assert world.engine.get_action(None) is None
    assert world.safety.counts == {"stale plan": 1}


def test_a_policy_that_fails_again_and_again_ends_the_rollout(monkeypatch):
    monkeypatch.setattr("vega_policy.deployment.rtc.SECONDS_AFTER_FAILURE", 0.0)
    world, calls = World(thinking=0), []

    def fail(*arguments):
        calls.append(arguments)
        raise ConnectionError("gone")

    world.engine._predict = fail
    world.engine.start()
    end = time.monotonic() + 10
    while not world.engine.failed and time.monotonic() < end:
        world.tick()
        time.sleep(0.001)
    world.engine.stop()
    assert world.engine.failed
    assert world.engine._shutdown.is_set()
    assert len(calls) == FAILURES_IN_A_ROW


def test_the_thread_predicts_while_actions_are_taken():
    world = World(thinking=0)
    world.engine.start()
    end = time.monotonic() + 10
    while len(world.done) < 40 and time.monotonic() < end:
        world.tick()
        time.sleep(0.002)
    world.engine.stop()
    assert world.done[:40] == list(range(40))
    assert not world.engine.failed


class Sequence:
    """An environment that succeeds when 30 numbered actions come in order; any other is of no use."""

    action_space = SimpleNamespace(shape=(2,))
    task = SimpleNamespace(horizon=100)

    def __init__(self):
        self.done = 0

    def observe(self):
        return {"next step": self.done}

    def step_blindly(self, action):
        self.done += action[0] == self.done + 1
        return self.done == 30, False


@pytest.mark.parametrize(("way", "succeeds"), [("sync", True), ("rtc", True), ("rtc by the clock", False)])
def test_only_what_is_joined_by_the_clock_falls_out_of_step(way, succeeds):
    def predict(seen, delay, left):
        numbers = torch.arange(16)[:, None] + seen["next step"] + 1
        chunk = torch.cat([numbers, torch.full_like(numbers, -1)], dim=1).float()
        return chunk, chunk

    world = Clockless(Sequence(), predict, thinking=8)
    WAYS[way](world, action_steps=8, threshold=10)
    assert world.success == succeeds
