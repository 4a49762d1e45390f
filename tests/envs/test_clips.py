"""Clips are recorded shard by shard, from training seeds only, and a killed recording resumes."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from omegaconf import OmegaConf

from envs import clips
from envs.base import DEMONSTRATION_SEEDS
from envs.clips import ROLLOUT, STILL, Clip, ClipRecorder, ClipSpec
from tests.policies import CAMERAS, batch, tiny_config
from tests.prior_checkpoints import write_checkpoint
from tests.synthetic_dataset import REPO_ID, write_dataset
from vega_policy.config import from_config
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
from vega_policy.pretraining import PretrainSettings
from vega_policy.pretraining.clips import Clips, CutSpec

SPEC = {"suites": ["lift_wide", "stack"], "parts": 2, "rounds": 3, "frames": 5, "frame_size": 16}
CONFIGS = Path(__file__).parents[2] / "configs"


class ColourRecorder:
    """Replaces `ClipRecorder` without a simulator: its clips have one random colour."""

    recorded: list[str]
    dies_after = 10**6

    def __init__(self, suite, task, spec):
        self.suite, self.shape = suite, (spec.frames, spec.frame_size, spec.frame_size, 3)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record_round(self, rng):
        if len(self.recorded) >= self.dies_after:
            raise KeyboardInterrupt
        self.recorded.append(self.suite)
        frames = np.full(self.shape, rng.integers(256), np.uint8)
        yield from (Clip(frames, f"do {self.suite}", shot, 7) for shot in ("fixed", "wrist"))


@pytest.fixture
def recorder(monkeypatch):
    recorder = type("Recorder", (ColourRecorder,), {"recorded": []})
    monkeypatch.setattr(clips, "ClipRecorder", recorder)
    return recorder


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def test_a_killed_recording_resumes_to_the_same_files(tmp_path, recorder):
    assert clips.write_clips(tmp_path / "whole", processes=1, **SPEC)
    recorder.dies_after = len(recorder.recorded) + 8
    with pytest.raises(KeyboardInterrupt):
        clips.write_clips(tmp_path / "killed", processes=1, **SPEC)
    recorder.dies_after, before = 10**6, len(recorder.recorded)
    assert clips.write_clips(tmp_path / "killed", processes=1, **SPEC)
    assert len(recorder.recorded) - before == 2 * 3  # two of four shards were left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_half_of_the_clips_keep_their_instruction_and_training_reads_them(tmp_path, recorder):
    clips.write_clips(tmp_path, processes=1, **SPEC)
    learned, held_out = Clips.open(tmp_path, 0.1)
    kept = learned.instructions + held_out.instructions
    assert (len(learned), len(held_out)) == (18, 6)
    assert learned.shape == (5, 16, 16, 3)
    assert kept.count("") == 12
    assert set(kept) == {"", "do lift_wide", "do stack"}


def test_a_recording_that_is_out_of_time_leaves_no_partial_shard(tmp_path, recorder):
    assert not clips.write_clips(tmp_path, processes=1, deadline=time.time() - 1, **SPEC)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["settings.json"]


def test_a_folder_of_another_spec_is_refused_with_the_differences(tmp_path, recorder):
    clips.write_clips(tmp_path, processes=1, **SPEC)
    with pytest.raises(ValueError, match=r"frame_size \(stored: 16, received: 32\)"):
        clips.write_clips(tmp_path, processes=1, **(SPEC | {"frame_size": 32}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 8}, r"1 \+ 4 k frames .*; got 8"),
        ({"frame_size": 100}, "multiple of 16; got 100"),
        ({"shots": ["selfie"]}, "expected some of orbit"),
        ({"frame": 5}, "unknown frame; known"),
    ],
)
def test_an_impossible_spec_names_the_field(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        clips.write_clips(tmp_path, processes=1, **(SPEC | changed))


def test_cameras_of_every_shot_move_or_stand_as_their_name_says():
    rng = np.random.default_rng(0)
    for name, (_, path) in (STILL | ROLLOUT).items():
        views = path(9, rng)
        assert len(views) == 9
        assert (len(set(views)) == 9) == (name in ("orbit", "dolly", "pan", "orbit_motion")), name


def test_the_shipped_config_is_a_valid_spec():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("pretrain_prior")
    settings = from_config(PretrainSettings, OmegaConf.to_container(config, resolve=True))
    listed = clips.instructions(**settings.clips.order)
    assert len(listed) == len(set(listed))
    assert len(listed) > 30
    assert max(settings.vae.lengths) <= settings.clips.order["frames"]


def test_the_shipped_objective_continues_frames_of_rendered_demonstrations():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("pretrain_prior", ["objective=image_to_video"])
    settings = from_config(PretrainSettings, OmegaConf.to_container(config, resolve=True))
    assert settings.transformer.image_to_video > 0
    assert settings.clips.write.endswith("cut_clips")
    assert from_config(CutSpec, settings.clips.order).every == (4, 8)


@pytest.mark.slow
def test_clips_show_motion_and_start_from_no_official_state(tmp_path, monkeypatch):
    from envs.libero import LiberoEnv

    resets = []
    reset = LiberoEnv._reset_simulator

    def recorded(self, seed, options):
        resets.append((seed, options))
        return reset(self, seed, options)

    monkeypatch.setattr(LiberoEnv, "_reset_simulator", recorded)
    spec = ClipSpec(("libero_spatial",), frames=5, frame_size=32, rendering="fast")
    with ClipRecorder("libero_spatial", 0, spec) as recorder:
        taken = list(recorder.record_round(np.random.default_rng(0)))
    assert sorted(clip.shot for clip in taken) == sorted([*STILL, *ROLLOUT])
    assert all(seed in DEMONSTRATION_SEEDS and not options for seed, options in resets)
    for clip in taken:
        moved = np.abs(clip.frames[0].astype(int) - clip.frames[-1]).mean()
        assert moved > (0.1 if clip.shot in ("fixed", "agent") else 2), clip.shot


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
        report = runner.begin(start)
        runner.env.environment.reset()
        for row in range(0, 7, executed):
            batch = stack_observations([report["observation"]], [CAMERAS[0]])
            seen = to_lerobot(batch, chunked.description)[CAMERAS[0]]
            torch.testing.assert_close(seen[0], clips[row][CAMERAS[0]], rtol=0, atol=1e-6)
            if row + executed < 7:
                report = runner.execute(np.zeros((executed, 7)))


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
