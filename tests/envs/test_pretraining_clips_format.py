"""A history is the same clip in training, where LeRobot's dataset makes it, and in a rollout."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.policies import CAMERAS, batch, tiny_config
from tests.prior_checkpoints import write_checkpoint
from tests.synthetic_dataset import REPO_ID, write_dataset
from vega_policy.evaluation.ablations import BlindPolicy
from vega_policy.evaluation.env_worker import EnvRunner, TaskEnv
from vega_policy.evaluation.policies import (
    LeRobotChunkPolicy,
    ObservationBatch,
    stack_observations,
    to_lerobot,
)
from vega_policy.model.config import PriorConfig
from vega_policy.modeling_vega import VegaPolicy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = write_checkpoint("wan_vae", tmp_path_factory.mktemp("wan_vae"))
    torch.manual_seed(0)
    prior = PriorConfig(name="wan_vae", path=str(folder), dtype="float32", clip="history", clip_frames=5)
    return VegaPolicy(tiny_config(prior)).eval()


def test_a_rollout_builds_the_clips_that_lerobots_dataset_gives_in_training(policy, tmp_path):
    write_dataset(tmp_path / "data", lengths=(7,), use_videos=False)
    root = tmp_path / "data"
    single = LeRobotDataset(REPO_ID, root=root, video_backend="pyav")
    camera, fps = single.meta.camera_keys[0], single.meta.fps
    steps = policy.config.observation_delta_indices
    assert steps == [-4, -3, -2, -1, 0]
    clips = LeRobotDataset(
        REPO_ID,
        root=root,
        video_backend="pyav",
        delta_timestamps={camera: [step / fps for step in steps]},
    )
    policy.reset()
    for row in range(7):
        seen = policy.remember({CAMERAS[0]: single[row][camera][None]})
        torch.testing.assert_close(seen[CAMERAS[0]][0], clips[row][camera])


class Recorded:
    """A simulator that shows the recorded frames of an episode, one a control step."""

    task_description = "look"
    action_space = SimpleNamespace(shape=(7,))

    def __init__(self, frames):
        self.frames, self.step = frames, 0

    def reset(self, *, seed=None, options=None):
        self.step = 0
        return self.observe(), {}

    def step_blindly(self, action):
        self.step += 1
        return False, False

    def observe(self):
        return {"pixels": {"image": self.frames[self.step]}, "agent_pos": np.zeros(8)}

    def simulator_state(self):
        return np.zeros(1)

    def close(self):
        self.frames = None


@pytest.mark.parametrize("executed", [1, 2, 3, 6])
def test_the_evaluation_builds_the_clips_that_lerobots_dataset_gives_in_training(executed, policy, tmp_path):
    root = write_dataset(tmp_path / "data", lengths=(7,), use_videos=False)
    steps = [step / 10 for step in policy.config.observation_delta_indices]
    clips = LeRobotDataset(REPO_ID, root=root, video_backend="pyav", delta_timestamps={CAMERAS[0]: steps})
    recorded = [clips[row][CAMERAS[0]][-1].permute(1, 2, 0) for row in range(7)]
    recorded = [(frame * 255).round().to(torch.uint8).numpy() for frame in recorded]
    chunked = LeRobotChunkPolicy(policy, lambda inputs: inputs, lambda actions: actions)
    runner = EnvRunner(
        TaskEnv(lambda *_, **__: Recorded(recorded), {}),
        keep_states=False,
        history=chunked.description.history,
    )
    start = {"suite": "recorded", "task_index": 0, "seed": 0, "initial_state": None}
    for _ in range(2):  # the second episode must not remember the first
        report = runner.advance({"actions": None, "episode": start})
        runner.env.environment.reset()
        for row in range(0, 7, executed):
            batch = stack_observations([report["observation"]], [CAMERAS[0]])
            seen = to_lerobot(batch, chunked.description)[CAMERAS[0]]
            torch.testing.assert_close(seen[0], clips[row][CAMERAS[0]], rtol=0, atol=1e-6)
            if row + executed < 7:
                report = runner.advance({"actions": np.zeros((executed, 7)), "episode": None})


def test_a_policy_of_histories_is_evaluated_on_clips_and_blinded_on_as_many(policy):
    chunked = LeRobotChunkPolicy(policy, lambda inputs: inputs, lambda actions: actions)
    frames = {key: np.zeros((2, 5, 64, 64, 3), np.uint8) for key in CAMERAS}
    seen = ObservationBatch(frames, np.zeros((2, 8), np.float32), ["lift"] * 2)
    noise = np.zeros((2, 4, 7), np.float32)
    assert chunked.chunk(seen, noise).shape == (2, 4, 7)
    mean = {key: np.full((64, 64, 3), 9, np.uint8) for key in CAMERAS}
    assert BlindPolicy(chunked, mean).chunk(seen, noise).shape == (2, 4, 7)


def test_a_policy_of_histories_trains_on_clips_and_acts_on_frames(policy):
    clips = batch()
    for camera in CAMERAS:
        clips[camera] = torch.rand(2, 5, *clips[camera].shape[1:])
    clips["observation.state"] = clips["observation.state"][:, None].expand(-1, 5, -1)
    loss, _ = policy(clips)
    assert loss.isfinite()
    policy.reset()
    assert policy.select_action(batch()).shape == (2, 7)


def test_the_past_is_forgotten_between_episodes(policy):
    policy.reset()
    first = policy.remember(batch(seed=1))[CAMERAS[0]]
    policy.remember(batch(seed=2))
    policy.reset()
    assert torch.equal(policy.remember(batch(seed=1))[CAMERAS[0]], first)


def test_single_frames_are_refused_where_a_history_is_read(policy):
    with pytest.raises(ValueError, match="clip=history expects 5 frames a camera; got 1"):
        policy.predict_action_chunk(batch())


def test_without_a_history_there_is_no_time_axis():
    config = tiny_config()
    assert config.observation_delta_indices is None
    seen = batch()
    assert VegaPolicy(config).remember(seen) is seen
