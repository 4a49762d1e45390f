"""Augmentation changes what it should, by the configured amount, and keeps runs repeatable."""

from dataclasses import replace

import pytest
import torch

from tests.training_runs import assert_bitwise_equal, saved_weights, tiny_backbone, tiny_policy, tiny_run
from vega_policy.backbones.compact import CompactBackbone
from vega_policy.checkpoints import read_scores
from vega_policy.data.augmentation import (
    FRAMES,
    ColorJitter,
    DisplacementNoise,
    RandomShift,
    StateDropout,
    jitter_frames,
    make_augmentations,
    shift_frames,
)
from vega_policy.data.dataset import STATE, DatasetConfig
from vega_policy.model.action_head import make_action_head
from vega_policy.model.config import ActionHeadConfig
from vega_policy.priors.baselines import RandomProjection
from vega_policy.training.train import train

CAMERAS = ["observation.images.image", "observation.images.image2"]
FRAMES_ONLY = {"cached": ["frames"], "cache": "ram"}


def test_a_frame_moves_down_and_to_the_right_and_its_edge_is_repeated():
    image = torch.arange(12).reshape(1, 1, 3, 4)
    moved = shift_frames(image, torch.tensor([[1, -2]]))
    assert moved[0, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]
    assert torch.equal(shift_frames(image, torch.zeros(1, 2, dtype=torch.int64)), image)


def test_a_samples_clip_and_channels_move_alike_and_samples_apart():
    frames = torch.rand(2, 4, 3, 8, 8)
    moved = shift_frames(frames, torch.tensor([[2, 0], [0, 3]]))
    assert torch.equal(moved[0, :, :, 2:], frames[0, :, :, :-2])
    assert torch.equal(moved[1, :, :, :, 3:], frames[1, :, :, :, :-3])


def test_cached_frames_and_cameras_move_alike():
    views = torch.randint(0, 256, (5, 2, 3, 16, 16), dtype=torch.uint8)
    shift = RandomShift(3, CAMERAS, seed=1)
    cached = shift({FRAMES: views, "task": ["lift"]}, 7)
    apart = shift({camera: views[:, view] for view, camera in enumerate(CAMERAS)}, 7)
    assert cached["task"] == ["lift"]
    for view, camera in enumerate(CAMERAS):
        assert torch.equal(cached[FRAMES][:, view], apart[camera])
    assert not torch.equal(cached[FRAMES], views)


def test_all_shifts_up_to_the_largest_come_and_none_beyond_and_another_batch_has_others():
    shift = RandomShift(2, CAMERAS, seed=0)
    drawn = shift.draw(200, 0)
    assert drawn.shape == (200, 2, 2)
    assert drawn.unique().tolist() == [-2, -1, 0, 1, 2]
    assert not torch.equal(drawn, shift.draw(200, 1))
    assert not torch.equal(drawn, RandomShift(2, CAMERAS, seed=1).draw(200, 0))


def test_several_processes_draw_what_one_draws():
    config = DatasetConfig(repo_id="tests/synthetic", shift=4, brightness=0.1, state_dropout=0.5)
    draws = {"seed": 5, "displacement_noise": 0.02}
    whole = make_augmentations(config, CAMERAS, **draws)
    parts = [make_augmentations(config, CAMERAS, **draws, rank=rank, world=3) for rank in range(3)]
    assert [type(one) for one in whole] == [RandomShift, ColorJitter, StateDropout, DisplacementNoise]
    for one, *several in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([part.draw(4, 3) for part in several]), one.draw(12, 3))


def test_the_default_is_no_augmentation():
    assert make_augmentations(DatasetConfig(repo_id="tests/synthetic"), CAMERAS, seed=0) == []


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_changes_uint8_and_float_pixels_alike_with_a_draw_for_each_sample(kind):
    frame = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    views = frame.expand(6, -1, -1, -1, -1).contiguous()
    most = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {kind: 0.2}
    jitter = ColorJitter(**most, cameras=CAMERAS, seed=1)
    cached = jitter({FRAMES: views}, 0)[FRAMES]
    assert cached.dtype == torch.uint8
    changed = (cached != views).flatten(1).float().mean(dim=1)
    assert (changed > 0.5).sum() >= 4  # LeRobot's transforms of uint8 frames change nothing
    assert all(not torch.equal(cached[0], other) for other in cached[1:])
    apart = jitter({camera: views[:, view].float() / 255 for view, camera in enumerate(CAMERAS)}, 0)
    for view, camera in enumerate(CAMERAS):
        torch.testing.assert_close(apart[camera], cached[:, view].float() / 255, atol=0.003, rtol=0)
    assert not torch.equal(jitter({FRAMES: views}, 1)[FRAMES], cached)


def test_neutral_factors_change_nothing_and_grey_stays_grey():
    frames = torch.randint(0, 256, (1, 2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(jitter_frames(frames, torch.tensor([[1.0, 1.0, 1.0, 0.0]])), frames)
    grey = torch.full((1, 1, 3, 4, 4), 0.5)
    jittered = jitter_frames(grey, torch.tensor([[1.0, 1.3, 0.5, 0.25]]))
    torch.testing.assert_close(jittered, grey, atol=1e-3, rtol=0)


def test_brightness_scales_contrast_spreads_and_no_saturation_is_grey():
    ramp = torch.linspace(0.2, 0.4, 3).view(1, 1, 1, 1, 3).expand(1, 1, 3, 1, 3)
    brighter = jitter_frames(ramp, torch.tensor([[1.2, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(brighter, 1.2 * ramp, atol=1e-3, rtol=0)
    spread = jitter_frames(ramp, torch.tensor([[1.0, 2.0, 1.0, 0.0]]))
    torch.testing.assert_close(spread, 2 * ramp - 0.3, atol=1e-3, rtol=0)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    pale = jitter_frames(red, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(pale, torch.full_like(pale, 0.299), atol=1e-3, rtol=0)


def test_state_dropout_zeroes_whole_states_at_the_given_rate():
    drop = StateDropout(0.2, seed=0)
    state = torch.rand(2000, 8) + 1
    kept = drop({STATE: state}, 3)[STATE]
    is_zero = (kept == 0).all(dim=1)
    assert torch.equal(kept[~is_zero], state[~is_zero])
    assert 0.17 < is_zero.float().mean() < 0.23
    assert not torch.equal(is_zero, (drop({STATE: state}, 4)[STATE] == 0).all(dim=1))


def test_both_streams_encode_the_same_augmented_frames(root, tmp_path, monkeypatch):
    semantic, prior = [], []
    encode, forward = CompactBackbone.encode, RandomProjection.forward

    def noted_encode(self, frames):
        semantic.append(frames)
        return encode(self, frames)

    def noted_forward(self, frames, *rest):
        prior.append(frames[:, :, -1])
        return forward(self, frames, *rest)

    monkeypatch.setattr(CompactBackbone, "encode", noted_encode)
    monkeypatch.setattr(RandomProjection, "forward", noted_forward)
    for name, augmentation in (("off", {}), ("on", {"shift": 4, "brightness": 0.3})):
        train(tiny_run(root, tmp_path / name, dataset=FRAMES_ONLY | augmentation, steps=1))
        assert torch.equal(semantic[-1], prior[-1])
    assert not torch.equal(semantic[0], semantic[-1])


@pytest.mark.parametrize("name", ["l1", "flow"])
def test_head_dropout_acts_in_training_only(name):
    head = make_action_head(ActionHeadConfig(name=name, width=16, depth=2, heads=2, dropout=0.5), 8, 4, 3)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # a flow head's gates start at zero
    context, mask, actions = torch.rand(2, 5, 8), torch.ones(2, 5, dtype=torch.bool), torch.rand(2, 4, 3)
    noise, time = head.sample_noise_and_time(actions, torch.Generator().manual_seed(0))

    def loss():
        return head.loss(context, mask, actions, noise=noise, time=time)

    assert not torch.equal(loss(), loss())
    head.eval()
    assert torch.equal(loss(), loss())


def test_a_shift_of_more_than_a_quarter_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"at most a quarter of policy\.frame_size \(32\); got 9"):
        tiny_run(root, tmp_path / "run", dataset=FRAMES_ONLY | {"shift": 9})


def test_a_resumed_run_with_shifts_of_decoded_videos_is_the_straight_one_and_another_than_without(
    root, tmp_path
):
    def run(name, shift=2, **fields):
        dataset = {"cache": "none", "shift": shift}
        return train(tiny_run(root, tmp_path / name, dataset=dataset, accumulate=2, **fields))

    straight = run("straight")
    run("parts", stop_after=2)
    assert_bitwise_equal(straight, run("parts", resume=True))
    still = run("still", shift=0)
    assert not all(torch.equal(a, b) for a, b in zip(*map(weights_of, (straight, still)), strict=True))


def test_a_resumed_run_with_all_augmentations_of_cached_frames_is_the_straight_one(root, tmp_path):
    dataset = {"shift": 2, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
    dataset |= FRAMES_ONLY | {"state_dropout": 0.2}

    def run(name, **fields):
        head = replace(tiny_policy().head, name="l1", dropout=0.1)
        policy = tiny_policy(backbone=tiny_backbone(dropout=0.1), head=head)
        return train(tiny_run(root, tmp_path / name, policy=policy, dataset=dataset, **fields))

    straight = run("straight")
    run("parts", stop_after=2)
    assert_bitwise_equal(straight, run("parts", resume=True))


def test_training_batches_are_shifted_and_held_out_ones_are_not(root, tmp_path, monkeypatch):
    numbers, shift = [], RandomShift.__call__

    def noted(self, batch, number):
        numbers.append(number)
        return shift(self, batch, number)

    monkeypatch.setattr(RandomShift, "__call__", noted)
    dataset = FRAMES_ONLY | {"shift": 2, "held_out": 0.5}
    checkpoint = train(tiny_run(root, tmp_path / "run", dataset=dataset, accumulate=2))
    assert numbers == list(range(8))  # four steps of two batches
    assert "held_out_loss" in read_scores(checkpoint.parents[1])[4]


def weights_of(checkpoint):
    return saved_weights(checkpoint).values()


@pytest.mark.parametrize("cached", [["semantic", "prior"], ["semantic", "frames"], ["prior"]])
def test_a_cache_of_features_is_refused(cached):
    with pytest.raises(
        ValueError, match=r"dataset\.shift=4 needs frames.*got dataset\.cached=.*Take \[frames\]"
    ):
        DatasetConfig(repo_id="tests/synthetic", cache="ram", cached=cached, shift=4)
    assert DatasetConfig(repo_id="tests/synthetic", cached=cached, shift=4).shift == 4  # decoded on the way
    with pytest.raises(ValueError, match=r"dataset\.shift: expected at least 0"):
        DatasetConfig(repo_id="tests/synthetic", shift=-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "ram", "hue": 0.1}, r"dataset\.hue=0\.1 needs frames.*Take \[frames\]"),
        ({"brightness": 1.0}, r"dataset\.brightness: expected a number in \[0, 1\); got 1\.0"),
        ({"state_dropout": -0.1}, r"dataset\.state_dropout: expected a number in \[0, 1\)"),
        ({"hue": 0.6}, r"dataset\.hue: expected a number in \[0, 0\.5\]; got 0\.6"),
    ],
)
def test_impossible_augmentation_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(repo_id="tests/synthetic", **fields)


def test_a_head_dropout_of_one_is_refused():
    with pytest.raises(ValueError, match=r"head\.dropout: expected a number in \[0, 1\)"):
        ActionHeadConfig(dropout=1.0)
