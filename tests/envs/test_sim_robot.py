"""The simulated robot runs on the wall clock, and LeRobot's rollout drives it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from lerobot.robots import RobotConfig, make_robot_from_config
from lerobot.utils.errors import DeviceNotConnectedError

from envs.lerobot_configs import VegaSimConfig
from envs.sim_robot import ACTION_NAMES, STATE_NAMES, VegaSim
from envs.sim_robot_process import WallClockRobot
from vega_policy.deployment.rtc import LAST_COMMAND


class Table:
    """Replaces a simulator: counts steps, succeeds at command 1; a step takes `seconds`."""

    metadata = {"render_fps": 50}  # noqa: RUF012 gymnasium's own name
    position_unit = "metres"

    def __init__(self, horizon=10, seconds=0.0):
        self.horizon, self.seconds = horizon, seconds
        self.seeds, self.actions, self.closed = [], [], False

    def reset_blindly(self, seed):
        self.seeds.append(seed)
        self.steps = 0

    def step_blindly(self, action):
        time.sleep(self.seconds)
        self.actions.append(np.array(action))
        self.steps += 1
        return action[0] == 1.0, self.steps >= self.horizon

    def holding_action(self, last):
        return np.array([0.0, -1.0 if last is None else last[-1]])

    def observe(self):
        return {
            "agent_pos": np.full(3, self.steps, np.float32),
            "pixels": {"image": np.zeros((2, 2, 3), np.uint8)},
        }

    def close(self):
        self.closed = True


class Running:
    """A wall-clock robot around a table, in a thread."""

    def __init__(self, table, tmp_path, **options):
        self.file = tmp_path / "log.jsonl"
        self.robot = WallClockRobot(lambda: table, log_file=self.file, **{"seed": 5} | options)
        self.thread = threading.Thread(target=self.robot.run)

    def __enter__(self):
        self.thread.start()
        assert self.robot.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.robot.close()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def act(self, value):
        self.robot.act(np.array([value, 1.0]))

    def episodes(self):
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    def end_episode(self):
        self.robot.new_scene()
        return self.episodes()[-1]


def test_the_first_step_is_made_at_once_and_time_goes_on_without_commands(tmp_path):
    table = Table()
    with Running(table, tmp_path) as running:
        start = time.monotonic()
        assert running.robot.observe()[2] == 0
        assert not table.actions  # the episode begins with its first command
        running.act(0.5)
        assert running.robot.observe()[2] == 1
        assert time.monotonic() - start < 0.5
        while len(table.actions) < 5:
            time.sleep(0.01)
        record = running.end_episode()
        assert record["held_steps"] == record["steps"] - 1
        assert (record["success"], record["cut_short"]) == (False, False)
        np.testing.assert_array_equal(table.actions[:3], [[0.5, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert table.closed


def test_an_observation_waits_for_all_commands_and_names_the_last_one(tmp_path):
    with Running(table := Table(), tmp_path) as running:
        for number in range(1, 6):
            running.act(0.1 * number)
            state, _, last_command = running.robot.observe()
            assert last_command == number
            assert state[0] == table.steps >= number
        record = running.end_episode()
    assert record["under_way"] == {"0": 5}
    assert record["lost_commands"] == 0
    assert [action[0] for action in table.actions if action[0]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_late_observation_does_not_reflect_the_last_commands(tmp_path):
    with Running(Table(), tmp_path, latency_steps=1) as running:
        assert running.robot.observe()[2] == 0
        for number in range(1, 4):
            running.act(0.1)
            assert running.robot.observe()[2] in (
                number - 1,
                number,
            )  # it waits, so the command before is in it
        assert set(running.end_episode()["under_way"]) <= {"0", "1"}


def test_commands_faster_than_the_steps_are_counted_as_lost(tmp_path):
    table = Table(seconds=0.02)
    with Running(table, tmp_path) as running:
        for value in (0.1, 0.2, 0.3, 0.4, 0.5):
            running.act(value)
        assert running.robot.observe()[2] == 5
        assert running.end_episode()["lost_commands"] == 5 - sum(action[0] > 0 for action in table.actions)
    assert [action[0] for action in table.actions if action[0]][-2:] == [0.4, 0.5]


def test_success_is_logged_by_the_simulator_and_the_scene_stays_until_the_robot_is_sent_back(tmp_path):
    table = Table()
    with Running(table, tmp_path, first_episode=3) as running:
        running.act(1.0)
        while len(table.actions) < 15:  # beyond success and horizon
            time.sleep(0.01)
        running.robot.new_scene()
        for _ in range(5):  # as LeRobot's rollout does, 50 times a second
            running.robot.new_scene()
        assert running.robot.observe()[0][0] == 0  # the new scene is shown when the call returns
        assert table.seeds == [8, 9]
        running.act(0.5)
        running.robot.observe()
        records = [running.end_episode(), *running.episodes()][1:]
    assert [(record["episode"], record["success"]) for record in records] == [(3, True), (4, False)]
    assert records[0]["won_at"] < 0.1


def test_an_episode_that_the_client_leaves_is_cut_short(tmp_path):
    with Running(Table(), tmp_path) as running:
        running.act(0.5)
        running.robot.observe()
    assert running.episodes()[-1]["cut_short"]


def test_a_simulator_that_dies_reports_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it is printed on stderr, too
    table = Table()
    with Running(table, tmp_path) as running:
        table.step_blindly = None  # calling it is a TypeError, which no simulator raises
        running.act(0.5)
        running.robot.observe()  # it does not wait for a simulator that has failed
        running.thread.join(10)
        assert "TypeError" in running.robot.failure


def test_a_simulator_that_is_too_slow_counts_late_steps_and_keeps_its_deadlines(tmp_path):
    with Running(table := Table(seconds=0.05), tmp_path) as running:
        running.act(0.0)
        while len(table.actions) < 5:
            time.sleep(0.01)
        record = running.end_episode()
    assert record["late_steps"] >= 4
    assert record["steps"] + record["late_steps"] == pytest.approx(50 * record["seconds"], abs=2)


def test_without_its_client_it_holds_still_and_logs_the_remaining_motion(tmp_path):
    with Running(Table(horizon=1000), tmp_path) as running:
        running.act(0.5)
        running.robot.hold_alone()
        event = running.episodes()[0]
    assert event["event"] == "client gone"
    assert event["then_moved_metres"] > 0  # this table's "hand" is its step count


def test_lerobot_finds_the_robot_and_its_features():
    robot = make_robot_from_config(VegaSimConfig(frame_size=64))
    assert type(robot) is VegaSim
    assert "vega_sim" in RobotConfig.get_known_choices()
    assert list(robot.action_features) == list(ACTION_NAMES)
    assert robot.observation_features["image2"] == (64, 64, 3)
    assert all(name.endswith((".pos", ".vel")) for name in (*STATE_NAMES, *ACTION_NAMES))
    with pytest.raises(DeviceNotConnectedError, match="connect"):
        robot.get_observation()
    with pytest.raises(ValueError, match="expected the entries"):
        robot.send_action({"x.vel": 0.0})
    with pytest.raises(ValueError, match="finite"):
        robot.send_action(dict.fromkeys(ACTION_NAMES, float("nan")))


@pytest.fixture
def sim(tmp_path):
    robot = VegaSim(VegaSimConfig(frame_size=64, log_file=tmp_path / "log.jsonl"))
    robot.connect()
    yield robot
    robot.disconnect()


@pytest.mark.slow
def test_the_hand_follows_commands_and_holds_without_them(sim):
    start = sim.get_observation()
    assert start["image"].shape == (64, 64, 3)
    for _ in range(20):
        sim.send_action({**dict.fromkeys(ACTION_NAMES, 0.0), "x.vel": 0.5, "gripper.pos": -1.0})
        time.sleep(0.05)
    time.sleep(0.5)
    moved = sim.get_observation()
    assert moved["x.pos"] - start["x.pos"] > 0.1
    assert moved[LAST_COMMAND] == sim.commands_sent == 20
    time.sleep(0.5)
    assert abs(sim.get_observation()["x.pos"] - moved["x.pos"]) < 0.005


CLIENT = """
import sys, time
from pathlib import Path
from envs.lerobot_configs import VegaSimConfig
from envs.sim_robot import ACTION_NAMES, VegaSim
robot = VegaSim(VegaSimConfig(frame_size=64, log_file=Path(sys.argv[1])))
robot.connect()
while True:
    robot.send_action({**dict.fromkeys(ACTION_NAMES, 0.0), "x.vel": 0.5})
    print("moving", flush=True)
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_when_the_program_that_drives_it_is_killed_the_robot_holds_still_and_ends(tmp_path):
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CLIENT, str(log)], stdout=subprocess.PIPE, text=True)
    for _ in range(10):
        assert process.stdout.readline() == "moving\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    while not (log.exists() and "client gone" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    gone = next(event for event in events if event.get("event") == "client gone")
    assert gone["then_moved_metres"] < 0.005
