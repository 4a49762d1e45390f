"""Real-time chunking executes every planned step once, however long a prediction takes."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from vega_policy.deployment.latency_benchmark import MODES, DiscreteTimeEpisode
from vega_policy.deployment.rtc import MAX_FAILURES, RealTimeEngine
from vega_policy.deployment.safety import JointLimits, SafetyFilter

CHUNK = 16


class World:
    """A task of numbered steps; its policy predicts the next ones, which takes some ticks."""

    def __init__(self, thinking, threshold=10, chunk=CHUNK):
        self.done, self.requests, self.thinking, self.chunk = [], [], thinking, chunk
        self.safety = SafetyFilter([JointLimits("x.pos", -1.0, 1.0)], period=0.05)
        self.shutdown = threading.Event()
        self.engine = RealTimeEngine(
            lambda *arguments: self.predict(*arguments),
            lambda: None,
            self.safety,
            threshold=threshold,
            shutdown=self.shutdown,
            retry_seconds=0.0,
        )

    def tick(self):
        self.safety.set_observation_time(time.monotonic())
        self.engine.notify_observation({"next step": len(self.done)})
        action = self.engine.get_action(None)
        if action is not None:  # without one, the hand holds still, and no step of the task is done
            self.done.append(int(action))

    def predict(self, observation, delay, left):
        self.requests.append((observation["next step"], delay, left))
        for _ in range(self.thinking):
            self.tick()
        chunk = torch.arange(self.chunk)[:, None] + observation["next step"]
        return chunk, chunk

    def run(self, ticks):
        for _ in range(ticks):
            self.tick()
            self.engine.predict_if_due()
        return self


@pytest.mark.parametrize("thinking", [0, 1, 2, 5, 8, 11, 20])
def test_no_step_is_lost_or_executed_twice_however_long_a_prediction_takes(thinking):
    world = World(thinking).run(60)
    assert world.done == list(range(len(world.done)))
    assert len(world.done) > 40
    for step, delay, left in world.requests:
        assert delay <= thinking + 1  # with the action of the observed tick
        assert left is None or int(left[0]) == step  # the rest begins at the observation


def test_the_rest_of_the_chunk_and_the_longest_delay_reach_the_policy():
    world = World(thinking=3).run(40)
    assert world.requests[0][1:] == (0, None)
    assert [delay for _, delay, _ in world.requests[2:]] == [4] * len(world.requests[2:])
    assert all(len(left) <= 10 for *_, left in world.requests[1:])


def test_a_chunk_of_the_last_episode_is_not_executed():
    world = World(thinking=0).run(3)
    world.thinking = 2
    unchanged = world.predict

    def predict(*arguments):
        answer = unchanged(*arguments)
        world.engine.reset()
        return answer

    world.predict = predict
    world.run(5)  # few actions are left
    world.done.clear()
    for _ in range(3):
        world.engine.predict_if_due()
        assert world.engine.get_action(None) is None


def test_a_chunk_from_an_old_observation_is_refused():
    world = World(thinking=0)
    world.safety.set_observation_time(time.monotonic() - 2.0)
    world.engine.notify_observation({"next step": 0})
    world.engine.predict_if_due()
    assert world.engine.get_action(None) is None
    assert world.safety.counts == {"stale chunk": 1}


def test_a_policy_that_fails_repeatedly_ends_the_rollout():
    world, calls = World(thinking=0), []

    def fail(*arguments):
        calls.append(arguments)
        raise ConnectionError("gone")

    world.predict = fail
    world.engine.start()
    end = time.monotonic() + 10
    while not world.engine.failed and time.monotonic() < end:
        world.tick()
        time.sleep(0.001)
    world.engine.stop()
    assert world.engine.failed
    assert world.shutdown.is_set()
    assert len(calls) == MAX_FAILURES


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
    """An environment that succeeds when 30 numbered actions come in order."""

    action_space = SimpleNamespace(shape=(2,))
    task = SimpleNamespace(horizon=100)

    def __init__(self):
        self.done = 0

    def observe(self):
        return {"next step": self.done}

    def step_blindly(self, action):
        self.done += action[0] == self.done + 1
        return self.done == 30, False


@pytest.mark.parametrize(("mode", "succeeds"), [("sync", True), ("rtc", True), ("rtc by the clock", False)])
def test_only_chunks_joined_by_the_clock_lose_steps(mode, succeeds):
    def predict(observation, delay, left):
        numbers = torch.arange(16)[:, None] + observation["next step"] + 1
        chunk = torch.cat([numbers, torch.full_like(numbers, -1)], dim=1).float()
        return chunk, chunk

    world = DiscreteTimeEpisode(Sequence(), predict, thinking_steps=8)
    MODES[mode](world, action_steps=8, threshold=10)
    assert world.success == succeeds
