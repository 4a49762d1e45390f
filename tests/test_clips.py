"""A history is the same clip in training, where LeRobot's dataset makes it, and in a rollout."""

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.policies import CAMERAS, batch, tiny_config
from tests.prior_checkpoints import write_checkpoint
from tests.synthetic_dataset import REPO_ID, write_dataset
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.parts import PriorConfig


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
    with pytest.raises(ValueError, match="clip=history reads 5 frames of each camera; got 1"):
        policy.predict_action_chunk(batch())


def test_without_a_history_there_is_no_time_axis():
    config = tiny_config()
    assert config.observation_delta_indices is None
    seen = batch()
    assert VegaPolicy(config).remember(seen) is seen
