import pytest
import torch

from vega_policy.model.observation import Observation, resize, stack_views


def test_frames_of_0_to_255_are_refused_with_the_values_seen():
    frames = {"observation.images.image": torch.tensor([0.0, 255.0]).expand(1, 3, 1, 2)}
    with pytest.raises(ValueError, match=r"observation.images.image.*\[0, 1\], got values from 0 to 255"):
        stack_views(frames, 2)


def test_frames_below_zero_and_not_a_number_are_refused():
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="expected frames in"):
            stack_views({"camera": torch.full((1, 3, 2, 2), value)}, 2)


def test_integer_frames_are_refused():
    with pytest.raises(TypeError, match=r"torch.uint8. Divide uint8 frames by 255"):
        stack_views({"camera": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}, 2)


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
