"""Clips are filmed shard by shard, of training scenes only, and a killed filming goes on."""

import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from envs import clips
from envs.base import DEMONSTRATION_SEEDS
from envs.clips import PLAYED, STILL, Clip, Film
from vega_policy.pretraining.clips import Clips
from vega_policy.pretraining.config import decode

ORDER = {"suites": ["lift_wide", "stack"], "parts": 2, "rounds": 3, "frames": 5, "frame_size": 16}
CONFIGS = Path(__file__).parents[2] / "configs"


class ColouredPaper:
    """Stands for `Film` where no simulator is wanted: its clips show what was drawn."""

    filmed: list[str]
    dies_after = 10**6

    def __init__(self, suite, task, *, frames, frame_size, **_):
        self.suite, self.shape = suite, (frames, frame_size, frame_size, 3)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def round(self, rng):
        if len(self.filmed) >= self.dies_after:
            raise KeyboardInterrupt
        self.filmed.append(self.suite)
        frames = np.full(self.shape, rng.integers(256), np.uint8)
        yield from (Clip(frames, f"play {self.suite}", shot, 7) for shot in ("fixed", "wrist"))


@pytest.fixture
def paper(monkeypatch):
    film = type("Paper", (ColouredPaper,), {"filmed": []})
    monkeypatch.setattr(clips, "Film", film)
    return film


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_filming_goes_on_to_the_same_files(tmp_path, paper):
    assert clips.write_clips(tmp_path / "whole", processes=1, **ORDER)
    paper.dies_after = len(paper.filmed) + 8
    with pytest.raises(KeyboardInterrupt):
        clips.write_clips(tmp_path / "killed", processes=1, **ORDER)
    paper.dies_after, before = 10**6, len(paper.filmed)
    assert clips.write_clips(tmp_path / "killed", processes=1, **ORDER)
    assert len(paper.filmed) - before == 2 * 3  # two of four shards were left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_half_of_the_clips_keep_their_instruction_and_training_reads_them(tmp_path, paper):
    clips.write_clips(tmp_path, processes=1, **ORDER)
    learned, held_out = Clips.open(tmp_path, 0.1)
    told = learned.instructions + held_out.instructions
    assert (len(learned), len(held_out)) == (18, 6)
    assert learned.shape == (5, 16, 16, 3)
    assert told.count("") == 12
    assert set(told) == {"", "play lift_wide", "play stack"}


def test_filming_that_is_out_of_time_leaves_no_half_shard(tmp_path, paper):
    assert not clips.write_clips(tmp_path, processes=1, deadline=time.time() - 1, **ORDER)
    assert [path.name for path in tmp_path.iterdir()] == ["order.json"]


def test_a_folder_of_another_order_is_refused_with_what_differs(tmp_path, paper):
    clips.write_clips(tmp_path, processes=1, **ORDER)
    with pytest.raises(ValueError, match="frame_size was 16, is 32"):
        clips.write_clips(tmp_path, processes=1, **(ORDER | {"frame_size": 32}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 8}, r"1 \+ 4 k frames; got 8"),
        ({"frame_size": 100}, "multiple of 16; got 100"),
        ({"shots": ["selfie"]}, "expected some of orbit"),
        ({"frame": 5}, "unknown frame; known"),
    ],
)
def test_orders_that_cannot_be_filmed_name_the_field(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        clips.write_clips(tmp_path, processes=1, **(ORDER | changed))


def test_cameras_of_every_shot_move_or_stand_as_their_name_says():
    rng = np.random.default_rng(0)
    for name, (_, path) in (STILL | PLAYED).items():
        views = path(9, rng)
        assert len(views) == 9
        assert (len(set(views)) == 9) == (name in ("orbit", "dolly", "pan", "orbit_motion")), name


def test_the_shipped_config_is_an_order_that_can_be_filmed():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("pretrain_prior")
    settings = decode(OmegaConf.to_container(config, resolve=True))
    told = clips.instructions(**settings.clips.order)
    assert len(told) == len(set(told))
    assert len(told) > 30
    assert max(settings.vae.lengths) <= settings.clips.order["frames"]


@pytest.mark.slow
def test_filmed_clips_move_and_start_from_no_official_state(tmp_path, monkeypatch):
    from envs.libero import LiberoEnv

    asked = []
    reset = LiberoEnv._reset_simulator

    def watched(self, seed, options):
        asked.append((seed, options))
        return reset(self, seed, options)

    monkeypatch.setattr(LiberoEnv, "_reset_simulator", watched)
    shots = [*STILL, *PLAYED]
    with Film("libero_spatial", 0, frames=5, frame_size=32, every=3, shots=shots, rendering="fast") as film:
        taken = list(film.round(np.random.default_rng(0)))
    assert sorted(clip.shot for clip in taken) == sorted(shots)
    assert all(seed in DEMONSTRATION_SEEDS and not options for seed, options in asked)
    for clip in taken:
        moved = np.abs(clip.frames[0].astype(int) - clip.frames[-1]).mean()
        assert moved > (0.1 if clip.shot in ("fixed", "agent") else 2), clip.shot
