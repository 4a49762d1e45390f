"""Recorded episodes stay complete when the program is killed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from envs.demos.shards import CODECS
from vega_policy.deployment.recording import (
    EpisodeRecorder,
    RecordingFormat,
    finished_episodes,
    merge_episodes,
)

FEATURES = {
    "observation.images.front": {
        "dtype": "video",
        "shape": (64, 64, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a.pos", "b.pos"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["a.pos", "b.pos"]},
}
LAYOUT = RecordingFormat("vega/rollouts", 20, FEATURES, "test", CODECS["lossless"])


def frame(step, intervention=False):
    return {
        "observation.images.front": np.full((64, 64, 3), step % 256, np.uint8),
        "observation.state": np.array([step, -step], np.float32),
        "action": np.array([step, 0.5], np.float32),
        "policy_action": np.array([step, 7.0 if intervention else 0.5], np.float32),
        "intervention": np.array([intervention]),
        "task": "lift the red cube",
    }


def record(folder, episodes):
    with EpisodeRecorder(folder, LAYOUT) as recorder:
        for length in episodes:
            for step in range(length):
                recorder.add(frame(step, intervention=step == 2))
            recorder.end_episode()


@pytest.mark.slow
def test_episodes_are_merged_into_a_dataset_with_interventions(tmp_path):
    record(tmp_path / "episodes", (5, 4))
    record(tmp_path / "episodes", (3,))  # a second session continues the numbering
    names = [path.name for path in finished_episodes(tmp_path / "episodes")]
    assert names == ["episode_000000", "episode_000001", "episode_000002"]
    assert merge_episodes(tmp_path / "episodes", tmp_path / "merged", "vega/rollouts") == 3
    dataset = LeRobotDataset("vega/rollouts", root=tmp_path / "merged", video_backend="pyav")
    assert (dataset.num_episodes, len(dataset)) == (3, 12)
    assert len(list(dataset.root.glob("videos/**/*.mp4"))) == 3  # each episode's own: merging is copying
    assert [bool(dataset[index]["intervention"]) for index in range(5)] == [False, False, True, False, False]
    assert dataset[2]["policy_action"].tolist() == [2.0, 7.0]
    assert dataset[2]["action"].tolist() == [2.0, 0.5]
    with pytest.raises(FileExistsError, match="new folder"):
        merge_episodes(tmp_path / "episodes", tmp_path / "merged", "vega/rollouts")


PROGRAM = """
import sys, time
from pathlib import Path
from tests.deployment.test_recording import LAYOUT, frame
from vega_policy.deployment.recording import EpisodeRecorder
with EpisodeRecorder(Path(sys.argv[1]), LAYOUT) as recorder:
    for episode in range(100):
        for step in range(20):
            recorder.add(frame(step))
        recorder.end_episode()
        while len(recorder.saved) < min(episode + 1, 2):
            time.sleep(0.01)
        if episode >= 2:
            time.sleep(0.05)
            print("recording", flush=True)
"""


@pytest.mark.slow
def test_a_kill_loses_at_most_the_running_episode(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "recording\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    finished = finished_episodes(tmp_path)
    assert len(finished) >= 2
    for root in finished:
        assert len(LeRobotDataset("vega/rollouts", root=root, video_backend="pyav")) == 20
    record(tmp_path, (4,))
    assert not list(tmp_path.glob(".*.partial"))
    assert len(finished_episodes(tmp_path)) == len(finished) + 1


def test_a_frame_that_cannot_be_written_ends_the_recording(tmp_path):
    def keep_adding(recorder):
        recorder.add({"task": "no such frame"})
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.02)
            recorder.add(frame(0))

    with (
        EpisodeRecorder(tmp_path / "x", LAYOUT) as recorder,
        pytest.raises(RuntimeError, match="cannot continue"),
    ):
        keep_adding(recorder)
    assert isinstance(recorder.failure, ValueError | KeyError)


def test_a_recorder_that_cannot_keep_up_is_refused_instead_of_filling_the_memory(tmp_path):
    recorder = EpisodeRecorder(tmp_path / "x", dataclasses.replace(LAYOUT, longest_episode=3))
    for step in range(3):  # they are not written: its thread was not started
        recorder.add(frame(step))
    with pytest.raises(RuntimeError, match="cannot keep up: 3 steps wait"):
        recorder.add(frame(3))


def test_merging_no_episode_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished episode"):
        merge_episodes(tmp_path, tmp_path / "merged", "vega/rollouts")
