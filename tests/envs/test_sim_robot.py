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

from envs.config_sim_robot import VegaSimConfig
from envs.sim_robot import ACTION_NAMES, STATE_NAMES, VegaSim
from envs.sim_robot_process import WallClockRobot


class Table:
    """Replaces a simulator: counts steps, succeeds at command 1; a step takes `seconds`."""

    metadata = {"render_fps": 50}  # noqa: RUF012 gymnasium's own name
    action_space = type("Space", (), {"shape": (2,)})

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
        options = {"seed": 5, "auto_reset": True, "reset_seconds": 0.05} | options
        self.robot = WallClockRobot(lambda: table, log_file=self.file, **options)
        self.thread = threading.Thread(target=self.robot.run)

    def __enter__(self):
        self.thread.start()
        assert self.robot.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.robot.close()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def episodes(self):
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_episodes(self, number):
        end = time.monotonic() + 20
        while len(self.episodes()) < number:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self.episodes()


def test_time_goes_on_without_a_command_and_the_hand_holds_still(tmp_path):
    table = Table()
    with Running(table, tmp_path) as running:
        time.sleep(0.1)
        assert not table.actions  # the first episode begins with the first command
        start = time.monotonic()
        running.robot.act(np.array([0.5, 1.0]))
        first = running.wait_for_episodes(1)[0]
        assert 0.18 < time.monotonic() - start < 1.5  # 10 steps at 50 Hz
        assert (first["success"], first["steps"], first["held_steps"]) == (False, 10, 9)
        np.testing.assert_array_equal(table.actions[:3], [[0.5, 1.0], [0.0, 1.0], [0.0, 1.0]])
        assert [record["seed"] for record in running.wait_for_episodes(2)] == [5, 6]
    assert table.closed


def test_commands_faster_than_the_steps_are_dropped(tmp_path):
    table = Table()
    with Running(table, tmp_path) as running:
        for value in (0.1, 0.2, 0.3, 0.4):
            running.robot.act(np.array([value, 0.0]))
        running.wait_for_episodes(1)
    sent = [action[0] for action in table.actions[:10] if action[0]]
    assert sent[-2:] == [0.3, 0.4]
    assert len(sent) <= 3


def test_a_new_scene_is_shown_before_its_episode_begins_and_commands_for_the_old_one_are_dropped(tmp_path):
    table = Table()
    with Running(table, tmp_path, reset_seconds=0.3) as running:
        running.robot.act(np.array([1.0, 0.0]))
        running.wait_for_episodes(1)
        end = time.monotonic() + 20
        while running.robot.observe()[0][0] != 0:  # steps taken in the scene that is shown
            assert time.monotonic() < end
        running.robot.act(np.array([0.7, 0.0]))
        running.wait_for_episodes(2)
    assert table.seeds[:2] == [5, 6]
    assert not any(action[0] for action in table.actions[1:11])


def test_success_is_logged_by_the_simulator(tmp_path):
    with Running(Table(), tmp_path) as running:
        running.robot.act(np.array([1.0, 0.0]))
        record = running.wait_for_episodes(1)[0]
    assert (record["success"], record["steps"]) == (True, 1)


def test_without_automatic_reset_the_scene_stays_until_the_robot_is_sent_back(tmp_path):
    table = Table()
    with Running(table, tmp_path, auto_reset=False) as running:
        running.robot.act(np.array([1.0, 0.0]))
        time.sleep(0.5)
        assert table.seeds == [5]
        running.robot.new_scene()
        record = running.wait_for_episodes(1)[0]
        assert record["success"]
        assert record["steps"] > 10


def test_repeated_returns_draw_one_scene_that_waits_for_its_first_command(tmp_path):
    table = Table()
    with Running(table, tmp_path, auto_reset=False, first_episode=3) as running:
        running.robot.act(np.array([1.0, 0.0]))
        time.sleep(0.1)
        for _ in range(5):  # as LeRobot's rollout does, 50 times a second
            running.robot.new_scene()
        assert running.robot.observe()[0][0] == 0  # it is shown when the call returns
        time.sleep(0.2)
        assert table.seeds == [8, 9]
        assert table.steps == 0
        running.robot.act(np.array([0.5, 0.0]))
        time.sleep(0.1)
        running.robot.new_scene()
        assert [record["episode"] for record in running.wait_for_episodes(2)] == [3, 4]


def test_a_failure_that_was_sent_back_is_an_episode_too(tmp_path):
    with Running(Table(), tmp_path, auto_reset=False) as running:
        running.robot.act(np.array([0.5, 0.0]))
        time.sleep(0.1)
        running.robot.new_scene()
        record = running.wait_for_episodes(1)[0]
    assert (record["success"], record["cut_short"]) == (False, False)


def test_a_simulator_that_dies_reports_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it is printed on stderr, too
    table = Table()
    with Running(table, tmp_path) as running:
        table.step_blindly = None  # calling it is a TypeError, which no simulator raises
        running.robot.act(np.array([0.5, 0.0]))
        running.thread.join(10)
        assert "TypeError" in running.robot.failure


def test_a_simulator_that_is_too_slow_counts_late_steps(tmp_path):
    with Running(Table(horizon=4, seconds=0.1), tmp_path) as running:
        running.robot.act(np.array([0.0, 0.0]))
        assert running.wait_for_episodes(1)[0]["late_steps"] >= 1


def test_without_its_client_it_holds_still_and_logs_the_remaining_motion(tmp_path):
    with Running(Table(horizon=1000), tmp_path) as running:
        running.robot.act(np.array([0.5, 0.0]))
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
    time.sleep(0.5)
    assert abs(sim.get_observation()["x.pos"] - moved["x.pos"]) < 0.005


CLIENT = """
import sys, time
from pathlib import Path
from envs.config_sim_robot import VegaSimConfig
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
