"""Both engines execute every planned action once and in order, whatever the delays."""

import threading
import time
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_policy.deployment.rtc import (
    LAST_COMMAND,
    MAX_FAILURES,
    ChunkQueue,
    CommandsUnderWay,
    RealTimeEngine,
    SyncEngine,
    catch_up,
    check_displacements,
)
from vega_policy.deployment.safety import JointLimits, SafetyFilter

CHUNK, PERIOD = 16, 0.05


class World:
    """A task of numbered steps and a robot; the policy plans the next numbers, which takes some ticks.

    A command is executed `pipeline` ticks after it was sent, and reported if the robot reports.
    """

    def __init__(self, thinking, threshold=10, chunk=CHUNK, pipeline=0, reports=True, sync=False):
        self.done, self.requests, self.chunk = [], [], chunk
        self.thinking = iter(thinking) if isinstance(thinking, list) else iter([thinking] * 1000)
        self.reports, self.pipeline, self.sent = reports, deque([None] * pipeline), 0
        self.ticks = self.executed = 0
        self.safety = SafetyFilter([JointLimits("x.pos", -1.0, 1.0)], period=PERIOD, max_observation_age=1e9)
        self.shutdown = threading.Event()
        under_way = CommandsUnderWay(PERIOD, pipeline)
        predict = lambda *arguments: self.predict(*arguments)  # noqa: E731 tests replace it
        if sync:
            self.engine = SyncEngine(predict, lambda: None, self.safety, under_way, action_steps=8)
        else:
            self.engine = RealTimeEngine(
                predict,
                lambda: None,
                self.safety,
                under_way,
                threshold=threshold,
                shutdown=self.shutdown,
                retry_seconds=0.0,
            )
        self.under_way = under_way

    @property
    def now(self):
        return time.monotonic() if self.reports else self.ticks * PERIOD

    def advance(self, command):
        """The robot takes a command, or none, and executes the one that is due."""
        self.pipeline.append(command)
        due = self.pipeline.popleft()
        if due is not None:
            self.executed = due[0]
            if due[1] is not None:  # when the hand holds still, no step of the task is done
                self.done.append(due[1])
        self.ticks += 1

    def hold(self):
        """A command that is not the policy's, as the watchdog sends; it does no step of the task."""
        self.sent += 1
        self.advance((self.sent, None))

    def tick(self):
        self.safety.set_observation_time(self.now)
        report = {LAST_COMMAND: self.executed} if self.reports else {}
        self.engine.notify_observation({"next step": len(self.done), **report})
        action = self.engine.get_action(None)
        if action is None:
            self.advance(None)
            return
        self.sent += 1
        command = self.sent, int(action)
        if self.reports:
            self.engine.command_sent(self.sent)
        else:
            self.under_way.add(None, self.now)
        self.advance(command)

    def predict(self, observation, delay, since):
        self.requests.append((observation["next step"], delay, since))
        for _ in range(next(self.thinking)):
            if isinstance(self.engine, SyncEngine):
                self.advance(None)
            else:
                self.tick()
        chunk = torch.arange(self.chunk)[:, None] + observation["next step"]
        return chunk, chunk

    def run(self, ticks):
        for _ in range(ticks):
            self.tick()
            if isinstance(self.engine, RealTimeEngine):
                self.engine.predict_if_due()
        return self


@settings(max_examples=40, deadline=None)
@given(
    thinking=st.lists(st.integers(0, 20), min_size=61, max_size=61),
    pipeline=st.integers(0, 3),
    reports=st.booleans(),
    sync=st.booleans(),
    holds=st.sets(st.integers(0, 60), max_size=5),
)
def test_for_any_delays_every_planned_action_is_executed_once_and_in_order(
    thinking, pipeline, reports, sync, holds
):
    world = World(thinking, pipeline=pipeline, reports=reports, sync=sync)
    for tick in range(60):
        if reports and tick in holds:
            world.hold()
        world.run(1)
    assert world.done == list(range(len(world.done)))
    assert len(world.done) > 10
    for step, _, since in world.requests:
        assert since is None or int(since[0]) == step  # it begins at the observation


def test_the_rest_of_the_chunk_and_the_longest_delay_reach_the_policy():
    world = World(thinking=3).run(40)
    assert world.requests[0][1:] == (0, None)
    assert [delay for _, delay, _ in world.requests[2:]] == [4] * len(world.requests[2:])
    assert all(len(since) <= 11 for *_, since in world.requests[1:])  # ten left, and that of the observation


def test_a_sync_chunk_begins_after_the_commands_under_way_and_the_first_at_its_first_action():
    world = World(0, pipeline=2, sync=True).run(20)
    assert [(step, delay) for step, delay, _ in world.requests] == [(0, 0), (6, 2), (14, 2)]
    assert world.requests[1][2][:, 0].tolist() == [6, 7]


def test_what_was_executed_stays_what_it_was_when_a_chunk_differs():
    world = World(thinking=3)
    unchanged = world.predict
    world.predict = lambda *arguments: tuple(
        100 * len(world.requests) + part for part in unchanged(*arguments)
    )
    world.run(40)
    for step, delay, since in world.requests[2:]:
        assert len(world.done) >= step + delay
        assert since[:delay, 0].tolist() == world.done[step : step + delay]


def test_a_chunk_of_the_last_episode_is_not_executed():
    world = World(thinking=0).run(3)
    world.thinking = iter([2] * 9)
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
    world.safety = SafetyFilter([JointLimits("x.pos", -1.0, 1.0)], period=PERIOD)
    world.engine = RealTimeEngine(
        world.predict, lambda: None, world.safety, world.under_way, threshold=10, shutdown=world.shutdown
    )
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


@given(missed=st.integers(0, 6), left=st.integers(0, 6))
def test_a_late_chunk_arrives_where_it_planned_to_be(missed, left):
    """Displacements of what was executed and of the mended rest add up to those that the chunk planned."""
    generator = torch.Generator().manual_seed(7 * missed + left)
    planned, executed = torch.randn(2, missed, 3, generator=generator)
    rest = torch.randn(left, 3, generator=generator)
    mended = catch_up(planned, executed, rest, [0, 2])
    if missed and left:
        arrived = executed.sum(0) + mended.sum(0)
        torch.testing.assert_close(arrived[[0, 2]], (planned.sum(0) + rest.sum(0))[[0, 2]])
        steps = min(missed, left)
        added = (mended - rest)[:, [0, 2]]
        torch.testing.assert_close(added[:steps], added[:1].expand(steps, 2))  # evenly
        assert not added[steps:].any()
    else:
        assert torch.equal(mended, rest)
    assert torch.equal(mended[:, 1], rest[:, 1])  # a position, such as the gripper's
    assert torch.equal(catch_up(planned, executed, rest, []), rest)


def test_the_queue_makes_up_in_the_policys_units_and_in_the_robots():
    queue = ChunkQueue(displacements=[0])
    first = torch.tensor([[1.0, 9.0]]).repeat(4, 1)
    queue.join(first, 10 * first, 0)
    for _ in range(2):
        queue.pop()
    second = torch.tensor([[3.0, 7.0]]).repeat(4, 1)
    assert queue.join(second, 10 * second, 0) == 2  # both moved by 1, where the second chunk planned 3
    torch.testing.assert_close(queue.since(2), torch.tensor([[5.0, 7.0], [5.0, 7.0]]))
    torch.testing.assert_close(queue.pop(), torch.tensor([50.0, 70.0]))


@pytest.mark.parametrize("sync", [True, False])
def test_an_engine_makes_up_for_displacements(sync):
    """The first chunk moves by 1 a step, the second by 3; two actions of the first are taken in its place."""
    chunks, taken = iter([torch.full((8, 1), 1.0), torch.full((8, 1), 3.0)]), []

    def predict(*_):
        chunk = next(chunks)
        if not sync and taken:  # meanwhile the robot goes on
            take(2)
        return chunk, chunk

    def take(steps):
        for _ in range(steps):
            taken.append(int(engine.get_action(None)))
            engine.command_sent(len(taken))

    def observe(reflected):
        safety.set_observation_time(time.monotonic())
        engine.notify_observation({LAST_COMMAND: reflected})
        if not sync:
            engine.predict_if_due()

    safety = SafetyFilter([JointLimits("x.pos", -1.0, 1.0)], period=PERIOD, max_observation_age=1e9)
    shared = (predict, lambda: None, safety, CommandsUnderWay(PERIOD))
    if sync:
        engine = SyncEngine(*shared, [0], action_steps=2)
    else:
        engine = RealTimeEngine(*shared, [0], threshold=8, shutdown=threading.Event())
    observe(0)
    take(2 if sync else 1)
    observe(0 if sync else 1)  # both are under way, or none is
    take(2)
    assert taken == ([1, 1, 5, 5] if sync else [1, 1, 1, 5, 5])


def test_indices_that_are_not_of_an_action_are_refused():
    check_displacements("catch_up", [0, 6], 7)
    for wrong in ([7], [-1], [0.5], [True], None, 3):
        with pytest.raises(
            ValueError, match="catch_up: expected a list of indices of actions, from 0 to 6; got"
        ):
            check_displacements("catch_up", wrong, 7)
