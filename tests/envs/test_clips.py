"""Clips are recorded shard by shard, from training seeds only, and a killed recording resumes."""

import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from envs import clips
from envs.base import DEMONSTRATION_SEEDS
from envs.clips import ROLLOUT, STILL, Clip, ClipRecorder, ClipSpec
from vega_policy.config import from_config
from vega_policy.pretraining import PretrainSettings
from vega_policy.pretraining.clips import Clips

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
