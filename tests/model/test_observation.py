import pytest
import torch

from vega_policy.model.observation import Observation, resize, stack_views, to_float


def test_frames_of_0_to_255_are_refused_with_the_values_seen():
    frames = {"observation.images.image": torch.tensor([0.0, 255.0]).expand(1, 3, 1, 2)}
    with pytest.raises(ValueError, match=r"observation.images.image.*\[0, 1\], got values from 0 to 255"):
        stack_views(frames, 2)


def test_frames_below_zero_and_not_a_number_are_refused():
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="expected frames in"):
            stack_views({"camera": torch.full((1, 3, 2, 2), value)}, 2)


def test_integers_other_than_uint8_are_refused():
    with pytest.raises(
        TypeError, match=r"expected uint8 or floating-point frames in \[0, 1\], got torch.int64"
    ):
        stack_views({"camera": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, 2)


def test_uint8_frames_of_the_policys_size_stay_uint8_and_mean_their_255th():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    stacked = stack_views({"camera": pixels}, 8)
    assert stacked.dtype == torch.uint8
    assert torch.equal(to_float(stacked), stack_views({"camera": pixels / 255}, 8))
    assert torch.equal(stack_views({"camera": pixels}, 4), stack_views({"camera": pixels / 255}, 4))


def test_a_wide_frame_is_stretched_not_cropped():
    wide = torch.zeros(1, 3, 8, 32)
    wide[..., :4] = 1  # the leftmost eighth
    square = stack_views({"camera": wide}, 16)
    assert square.shape == (1, 1, 1, 3, 16, 16)
    assert square[..., :2].min() > 0.8
    assert square[..., 3:].max() < 0.05


def test_resize_keeps_values_in_range_and_leading_axes():
    frames = torch.rand(2, 3, 4, 3, 20, 30)
    resized = resize(frames, 10, 12)
    assert resized.shape == (2, 3, 4, 3, 10, 12)
    assert resized.min() >= 0
    assert resized.max() <= 1


def test_fields_of_different_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="one batch size"):
        Observation(frames=torch.rand(2, 1, 1, 3, 4, 4), state=torch.zeros(3, 8), instruction=[""] * 3)
    with pytest.raises(ValueError, match="frames must have 6 axes"):
        Observation(frames=torch.rand(2, 3, 4, 4), state=torch.zeros(2, 8), instruction=[""] * 2)
