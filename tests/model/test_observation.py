import pytest
import torch

from vega_policy.model.observation import Observation, resize, stack_views, to_float


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (
            torch.tensor([0.0, 255.0]).expand(1, 3, 1, 2),
            ValueError,
            r"camera.*\[0, 1\], got values from 0 to 255",
        ),
        (torch.full((1, 3, 2, 2), -0.1), ValueError, "expected frames in"),
        (torch.full((1, 3, 2, 2), float("nan")), ValueError, "expected frames in"),
        (
            torch.zeros(1, 3, 2, 2, dtype=torch.int64),
            TypeError,
            r"expected uint8 or floating-point frames in \[0, 1\], got torch.int64",
        ),
    ],
    ids=["0 to 255", "below zero", "not a number", "integers other than uint8"],
)
def test_frames_out_of_range_are_refused_with_the_values_found(frame, error, message):
    with pytest.raises(error, match=message):
        stack_views({"camera": frame}, 2)


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


@pytest.mark.parametrize(
    ("frames", "rows", "message"),
    [
        ((2, 1, 1, 3, 4, 4), 3, "one batch size"),
        ((2, 3, 4, 4), 2, r"frames: expected \[b v t 3 h w\], got shape"),
    ],
)
def test_observations_of_other_shapes_are_refused(frames, rows, message):
    with pytest.raises(ValueError, match=message):
        Observation(frames=torch.rand(frames), state=torch.zeros(rows, 8), instruction=[""] * rows)


def test_a_wide_frame_can_be_padded_with_black_and_keeps_its_aspect_ratio():
    wide = torch.zeros(1, 3, 8, 32)
    wide[..., 16:] = 1
    square = stack_views({"camera": wide}, 16, "pad")[0, 0, 0, 0]
    assert square[:6].max() == square[10:].max() == 0  # 4 rows of 16 are the frame
    assert square[6:10, 9:].min() > 0.9
    square = {"camera": wide[..., 12:20]}
    assert torch.equal(stack_views(square, 4, "pad"), stack_views(square, 4))
