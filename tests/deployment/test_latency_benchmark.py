"""Success against delay in virtual time, and the logs of the simulated robot on the wall clock."""

import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import envs
from vega_policy.deployment.latency_benchmark import (
    Cell,
    DelayedPlan,
    benchmark_latency,
    fitting_methods,
    summarize_log,
)
from vega_policy.evaluation.env_worker import EnvRunner, TaskEnv
from vega_policy.evaluation.episodes import plan_episodes
from vega_policy.evaluation.policies import PolicyDescription
from vega_policy.run_dir import OtherRunError


def episode(success, **changes):
    whole = {
        "success": success,
        "steps": 50,
        "held_steps": 5,
        "late_steps": 0,
        "lost_commands": 1,
        "under_way": {"0": 40, "1": 5},
        "seconds": 2.5,
        "won_at": 2.5 if success else None,
        "cut_short": False,
    }
    return json.dumps(whole | changes)


def test_complete_episodes_are_counted_with_an_interval(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        episode(True),
        episode(False),
        episode(False, cut_short=True),
        episode(True, cut_short=True),  # counted only if failures were, too
        '{"event": "client gone"}',
        episode(True),
    ]
    log.write_text("\n".join(lines))
    row = summarize_log("sync", log)
    expected = {"run": "sync", "success": 2, "episodes": 3, "held_fraction": 0.1, "seconds_to_success": 2.5}
    assert {key: row[key] for key in expected} == expected
    assert (row["lost_commands"], row["under_way"]) == (3, {"0": 120, "1": 15})
    assert 0.2 < row["low"] < 2 / 3 < row["high"] < 0.95
    assert summarize_log("first", log, episodes=2)["episodes"] == 2
    with pytest.raises(ValueError, match="3 complete episodes, expected 50"):
        summarize_log("sync", log, episodes=50)


class Numbers:
    """An environment that succeeds when numbered actions come in order, each once, and shows their number."""

    action_space, task_description = SimpleNamespace(shape=(2,)), "count"

    def reset(self, seed, options):
        self.done, self.steps, self.goal = 0, 0, 20 + seed % 5
        return self.observe(), {}

    def step_blindly(self, action):
        self.steps += 1
        if action[0] != 0 and self.done >= 0:
            self.done = self.done + 1 if action[0] == self.done + 1 else -1
        return self.done == self.goal, self.steps >= 100

    def holding_action(self, last):
        return np.array([0.0, -1.0 if last is None else last[-1]])

    def observe(self):
        return {"agent_pos": np.array([self.done], np.float32)}

    def simulator_state(self):
        return np.array([self.done, self.goal], float)

    def close(self):
        pass


class LocalPool:
    """One simulator in this process."""

    busy_seconds = 0.0

    def __len__(self):
        return 1

    def open(self, *, render, keep_states, history):
        self.runner = EnvRunner(TaskEnv(lambda *_: Numbers(), {}), keep_states=keep_states, history=history)
        self.reports = []

    def begin(self, worker, spec):
        self.reports.append((worker, self.runner.begin(spec)))

    def execute(self, worker, actions):
        self.reports.append((worker, self.runner.execute(actions)))

    def receive(self, *, all_of_them, block):
        reports, self.reports = self.reports, []
        return reports


class Counter:
    """Plans the numbers that come next."""

    description = PolicyDescription("counter", "none", (), 1, 2, action_steps=8)
    noise_shape, reads_frames, supports_rtc = (16, 2), False, True

    def __init__(self):
        self.contexts = []

    def reset(self, instructions=()):
        pass

    def chunk(self, batch, noise, rtc=None):
        if rtc is not None:
            self.contexts.append((int(batch.state[0, 0]), rtc))
        numbers = batch.state[:, :1] + 1 + np.arange(16)
        return np.stack([numbers, -np.ones_like(numbers)], axis=-1).astype(np.float32)


def run_cells(folder, cells, policy=None, episodes=2):
    tasks = [SimpleNamespace(suite="numbers", name="count", index=0, official_states=0)]
    planned = plan_episodes(tasks, episodes, 0, official_states=False)
    settings = {"episodes": episodes}
    run = benchmark_latency(
        policy or Counter(), LocalPool(), planned, cells, output=folder, settings=settings, batch_size=2
    )
    return list(run)


@pytest.mark.parametrize(
    ("method", "delay", "under_way"),
    [
        *(("aligned", *times) for times in ((0, 0), (4, 2), (8, 2))),
        *(("async", *times) for times in ((1, 1), (8, 0), (3, 9))),
        *(("rtc", *times) for times in ((0, 0), (1, 1), (8, 2), (3, 9))),
    ],
)
def test_aligned_chunks_execute_every_planned_action_once_and_in_order(tmp_path, method, delay, under_way):
    (row,) = run_cells(tmp_path / "run", [Cell(method, delay, under_way)])
    assert (row["success"], row["episodes"]) == (2, 2)


def test_commands_under_way_are_repeated_without_alignment_and_lost_by_the_clock(tmp_path):
    cells = [Cell("aligned", 2, 1), Cell("naive", 2, 0), Cell("naive", 2, 1), Cell("lerobot", 2, 0)]
    rows = run_cells(tmp_path / "run", cells)
    assert [row["success"] for row in rows] == [2, 2, 0, 0]
    assert [row["lost"] for row in rows] == [0, 0, 2, 2]
    held = rows[0]["steps"] - sum(20 + index for index in range(2)) / 2
    assert held > 5  # the robot waits for each chunk, and the last command takes a step more


def run_commands(runner, suite, chunks, hold):
    """Return the outcome of chunks [n t a] that arrive late; `hold` yields the commands of `advance`."""
    runner.begin({"suite": suite, "task_index": 0, "seed": 3, "initial_state": None})
    plan = DelayedPlan(Cell("aligned", 3, 2), action_steps=4, threshold=0, action_size=7)
    for chunk in chunks:
        outcome = runner.execute(hold(plan.advance(chunk)))["outcome"]
    return outcome


@pytest.mark.parametrize(("family", "suite"), [("robosuite", "lift_wide"), ("libero", "libero_spatial")])
def test_without_a_command_displacements_are_zero_and_the_gripper_keeps_its_last_command(family, suite):
    last = -1.0

    def zeros(commands):
        nonlocal last
        for number, command in enumerate(commands):
            commands[number] = np.float32([0, 0, 0, 0, 0, 0, last]) if command is None else command
            last = commands[number][-1]
        return np.stack(commands)

    horizon = 35  # five chunks; three steps of each have no command
    task = replace(envs.tasks(suite)[0], horizon=horizon)
    make = importlib.import_module(f"envs.{family}").make
    env = TaskEnv(lambda *_: make(task, frame_size=32, rendering="fast", render=False), {})
    runner = EnvRunner(env, keep_states=True)
    chunks = np.random.default_rng(0).uniform(-1, 1, (math.ceil(horizon / 7), 8, 7)).astype(np.float32)
    expected, found = (run_commands(runner, suite, chunks, hold) for hold in (zeros, list))
    runner.env.close()
    assert expected["length"] == horizon
    assert np.array_equal(found["states"], expected["states"])


def test_the_policy_continues_the_actions_since_its_observation(tmp_path):
    policy = Counter()
    run_cells(tmp_path / "run", [Cell("rtc", 3, 2)], policy)
    assert policy.contexts
    for done, context in policy.contexts:
        assert context.delay == 5  # two under way, and three until the chunk arrives
        assert context.actions[:, 0].tolist() == list(range(done + 1, done + 1 + len(context.actions)))


def test_a_benchmark_resumes_with_raw_episodes_and_a_plot(tmp_path, capsys):
    folder, cells = tmp_path / "run", [Cell("aligned", 0, 0), Cell("naive", 0, 1)]
    first = run_cells(folder, cells[:1])
    assert "aligned, delay 0, under way 0: 100%" in (shown := capsys.readouterr().err)
    assert "2/2 " in shown
    assert run_cells(folder, cells, episodes=2)[0] == first[0]
    assert "naive, delay 0, under way 1:  50%" in (shown := capsys.readouterr().err)  # those of the first run
    assert "4/4 " in shown
    raw = pq.read_table(folder / "episodes.parquet").to_pylist()
    assert [(row["method"], row["index"]) for row in raw] == [(c.method, i) for c in cells for i in range(2)]
    assert (folder / "latency.png").stat().st_size > 1000
    with pytest.raises(OtherRunError, match=r"episodes \(stored: 2, received: 3\).*\(folder=FOLDER\)"):
        run_cells(folder, cells, episodes=3)


def test_unknown_methods_and_policies_without_real_time_chunking_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"methods: expected one of naive, .*; got 'fast'"):
        Cell("fast", 0, 0)
    with pytest.raises(ValueError, match="at least 0"):
        Cell("naive", -1, 0)
    policy = Counter()
    policy.supports_rtc = False
    with pytest.raises(ValueError, match="supports only naive, aligned, async, catch_up"):
        run_cells(tmp_path / "run", [Cell("rtc", 0, 0)], policy)


def test_without_named_methods_those_that_fit_the_policy_and_its_actions_are_measured(tmp_path):
    policy = Counter()
    assert fitting_methods(policy, [0]) == ["aligned", "naive", "lerobot", "async", "catch_up", "rtc"]
    assert fitting_methods(policy, []) == ["aligned", "naive", "lerobot", "async", "rtc"]  # as of SO-101
    policy.supports_rtc = False
    assert fitting_methods(policy, []) == ["aligned", "naive", "async"]
    cells = [Cell(method, 0, 0) for method in fitting_methods(policy, [])]
    assert [row["method"] for row in run_cells(tmp_path / "run", cells, policy)] == [c.method for c in cells]


def test_catch_up_is_refused_where_no_action_is_a_displacement(tmp_path):
    with pytest.raises(ValueError, match="catch_up needs actions that are displacements"):
        list(
            benchmark_latency(
                Counter(), LocalPool(), [], [Cell("catch_up", 4, 0)], output=tmp_path, settings={}
            )
        )


def test_a_log_of_an_older_version_is_refused(tmp_path):
    log = tmp_path / "old.jsonl"
    line = {"episode": 0, "success": True, "steps": 3, "held_steps": 0, "late_steps": 0, "cut_short": False}
    log.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="older version"):
        summarize_log("sync", log)


@pytest.mark.parametrize(("delay", "under_way"), [(4, 0), (2, 2)])
@pytest.mark.parametrize(("method", "position"), [("async", 0.0), ("catch_up", 1.0)])
def test_a_late_chunk_of_displacements_arrives_only_if_it_makes_up_for_them(
    method, position, delay, under_way
):
    """Each chunk moves to 1 in its first four actions, all of which come too late."""
    cell, sizes = Cell(method, delay, under_way), {"action_steps": 8, "threshold": 8, "action_size": 2}
    plan, here = DelayedPlan(cell, displacements=[0], **sizes), 0.0
    plan.advance(np.zeros((16, 2), np.float32))  # the hand rests
    for _ in range(3):
        chunk = np.zeros((16, 2), np.float32)
        chunk[:4, 0] = (1.0 - here) / 4
        here += sum(command[0] for command in plan.advance(chunk) if command is not None)
    assert here == pytest.approx(position)
