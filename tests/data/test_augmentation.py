"""Random shifts: what moves, by how much, and that a run with them is as repeatable as one without."""

import pytest
import torch

from tests.training_runs import assert_bitwise_equal, saved_weights, tiny_run
from vega_policy.checkpoints import read_scores
from vega_policy.data.augmentation import FRAMES, RandomShift, shift_frames
from vega_policy.data.dataset import DatasetConfig
from vega_policy.training.train import train
from vega_policy.training.trainer import make_random_shift

CAMERAS = ["observation.images.image", "observation.images.image2"]
FRAMES_ONLY = {"cached": ["frames"], "cache": "ram"}


def test_a_picture_moves_down_and_to_the_right_and_its_edge_is_repeated():
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
    whole = RandomShift(4, CAMERAS, seed=5).draw(12, 3)
    parts = [RandomShift(4, CAMERAS, seed=5, rank=rank, world=3).draw(4, 3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_shift_of_more_than_a_quarter_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"at most a quarter of policy\.frame_size \(32\); got 9"):
        tiny_run(root, tmp_path / "run", dataset=FRAMES_ONLY | {"shift": 9})


@pytest.mark.parametrize("frames", [FRAMES_ONLY, {"cache": "none"}], ids=["cache", "video"])
def test_a_resumed_run_with_shifts_is_the_straight_one_and_another_than_without(root, tmp_path, frames):
    def run(name, shift=2, **fields):
        dataset = frames | {"shift": shift}
        return train(tiny_run(root, tmp_path / name, dataset=dataset, accumulate=2, **fields))

    straight = run("straight")
    run("parts", stop_after=2)
    assert_bitwise_equal(straight, run("parts", resume=True))
    still = run("still", shift=0)
    assert not all(torch.equal(a, b) for a, b in zip(*map(weights_of, (straight, still)), strict=True))


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


def test_each_process_has_its_own_part_of_the_shifts(root, tmp_path):
    run = tiny_run(root, tmp_path / "run", dataset=FRAMES_ONLY | {"shift": 3})
    shift = make_random_shift(run, CAMERAS, rank=1, world=3)
    whole = RandomShift(3, CAMERAS, seed=run.seed).draw(12, 5)
    assert shift is not None
    assert torch.equal(shift.draw(4, 5), whole[4:8])


def weights_of(checkpoint):
    return saved_weights(checkpoint).values()


@pytest.mark.parametrize("cached", [["semantic", "prior"], ["semantic", "frames"], ["prior"]])
def test_a_cache_of_features_is_refused(cached):
    with pytest.raises(
        ValueError, match=r"dataset\.shift=4 needs frames.*got dataset\.cached=.*Take \[frames\]"
    ):
        DatasetConfig(repo_id="tests/synthetic", cache="ram", cached=cached, shift=4)
    assert DatasetConfig(repo_id="tests/synthetic", cached=cached, shift=4).shift == 4  # decoded on the way
    with pytest.raises(ValueError, match=r"dataset\.shift must be at least 0"):
        DatasetConfig(repo_id="tests/synthetic", shift=-1)
