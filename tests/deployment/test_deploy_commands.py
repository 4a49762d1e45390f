"""LeRobot's rollout and scripts/deploy_policy.py control the simulated robot, from their command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.policies import write_checkpoint
from tests.policy_servers import running
from vega_policy.deployment.server import load_served_policy

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(program, *arguments, folder, code=0):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "egl"}
    outcome = subprocess.run(
        [*program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == code, printed[-5000:]
    return printed


def rollout(checkpoint, folder, *arguments):
    return run(
        [Path(sys.executable).parent / "lerobot-rollout"],
        f"--policy.path={checkpoint}",
        "--robot.type=vega_sim",
        "--robot.frame_size=64",
        f"--robot.log_file={folder / 'sim.jsonl'}",
        "--task=lift the red cube",
        "--fps=20",
        "--device=cpu",
        "--play_sounds=false",
        *arguments,
        folder=folder,
    )


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "inference", [("sync",), ("rtc", "--inference.queue_threshold=0", "--inference.rtc.execution_horizon=3")]
)
def test_lerobot_rollout_controls_the_simulated_robot(checkpoint, tmp_path, inference):
    name, *more = inference
    rollout(checkpoint, tmp_path, "--strategy.type=base", "--duration=8", f"--inference.type={name}", *more)
    first = log_of(tmp_path / "sim.jsonl")[0]
    assert first["steps"] > 0
    assert first["held_steps"] < first["steps"]
    assert first["lost_commands"] == 0
    assert list(first["under_way"]) == ["0"]
    assert not first["cut_short"]


def test_lerobot_rollout_records_episodes_of_the_simulated_robot(checkpoint, tmp_path):
    rollout(
        checkpoint,
        tmp_path,
        "--strategy.type=episodic",
        "--dataset.repo_id=vega/rollout_test",
        f"--dataset.root={tmp_path / 'data'}",
        "--dataset.num_episodes=2",
        "--dataset.episode_time_s=2",
        "--dataset.reset_time_s=1",
        "--dataset.push_to_hub=false",
        "--dataset.single_task=lift the red cube",
        "--dataset.streaming_encoding=true",
        "--dataset.rgb_encoder.vcodec=h264",
    )
    (root,) = tmp_path.glob("data*")
    dataset = LeRobotDataset("vega/rollout_test", root=root, video_backend="pyav")
    assert dataset.num_episodes == 2
    assert log_of(tmp_path / "sim.jsonl")[0]["steps"] > 10


def deploy(folder, *arguments, code=0):
    printed = run(
        [sys.executable, REPOSITORY / "scripts" / "deploy_policy.py"],
        "robot=vega_sim",
        "robot.device.frame_size=64",
        "task=lift the red cube",
        "device=cpu",
        "preflight.calls=2",
        f"output_dir={folder}",
        *arguments,
        folder=folder,
        code=code,
    )
    assert "Traceback" not in printed, printed[-5000:]
    return printed


def test_a_dry_run_moves_nothing_and_records_its_commands(checkpoint, tmp_path):
    printed = deploy(
        tmp_path,
        f"checkpoint={checkpoint}",
        "dry_run=true",
        "dry_run_seconds=2",
        "preflight.ignore_failures=true",
    )
    assert "latency against the control rate" in printed
    assert (tmp_path / "dry_run.rrd").stat().st_size > 10_000
    assert not (tmp_path / "vega_sim.jsonl").exists()  # no command reached the robot: no episode began


def test_a_failed_preflight_ends_in_one_message_before_anything_moves(checkpoint, tmp_path):
    elsewhere = "rename_map={observation.images.image:observation.images.front}"
    printed = deploy(tmp_path, f"checkpoint={checkpoint}", elsewhere, code=1)
    assert "nothing moved" in printed
    assert "the policy reads ['observation.images.image']" in printed
    assert not (tmp_path / "vega_sim.jsonl").exists()


def test_a_deployment_records_every_step_and_stays_within_limits(checkpoint, tmp_path):
    printed = deploy(
        tmp_path,
        f"checkpoint={checkpoint}",
        "preflight.ignore_failures=true",
        "episodes=2",
        "episode_seconds=3",
        "recording.enabled=true",
        f"recording.merge_into={tmp_path / 'merged'}",
    )
    assert "interventions of the safety layer" in printed
    dataset = LeRobotDataset("vega/rollouts", root=tmp_path / "merged", video_backend="pyav")
    assert dataset.num_episodes == 2
    actions = torch.stack([dataset[index]["action"] for index in range(len(dataset))])
    assert actions.abs().max() <= 1.0
    assert log_of(tmp_path / "vega_sim.jsonl")


ASYNC = ("inference=async", "inference.queue_threshold=2")
RTC = ("inference=rtc", "inference.queue_threshold=2", "inference.rtc.execution_horizon=3")


@pytest.mark.parametrize("inference", [("inference=sync",), ASYNC, RTC])
def test_a_deployment_through_a_server(checkpoint, tmp_path, inference):
    with running(load_served_policy(checkpoint, device="cpu")) as (server, port):
        deploy(
            tmp_path,
            f"server.url=ws://127.0.0.1:{port}",
            "preflight.ignore_failures=true",
            "episode_seconds=3",
            *inference,
        )
        assert 'vega_requests_total{outcome="ok"}' in server.metrics.text()
        assert 'outcome="malformed"' not in server.metrics.text()
    assert (
        log_of(tmp_path / "vega_sim.jsonl")[-1]["held_steps"]
        < log_of(tmp_path / "vega_sim.jsonl")[-1]["steps"]
    )
