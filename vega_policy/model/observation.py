"""Observation: the input of a policy at one instant. Shapes and ranges are checked here, once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EncodedText = tuple[Tensor, Tensor]
"""Features of the instruction's tokens [b l c] and their mask [b l] (True: a token)."""


@dataclass(frozen=True)
class Observation:
    """A batch of observations.

    Outputs of frozen encoders may replace the input that they were computed from: `semantic` and `prior`
    replace the frames, `words` the instruction.

    Raises:
        ValueError: If the batch sizes of the fields differ or an axis is missing.
    """

    frames: Tensor | None  # [b v t 3 h w], uint8 or float in [0, 1]; t = 1 unless the prior reads clips
    state: Tensor  # [b s], normalised proprioception: end-effector pose, gripper, joints
    instruction: list[str]  # b sentences
    semantic: Tensor | None = None  # [b v c gh gw], cached features of the backbone's image encoder
    prior: Tensor | None = None  # [b v d gh gw], cached features of the prior
    words: EncodedText | None = None  # the instruction as the backbone's text encoder returns it

    def __post_init__(self) -> None:
        if self.state.ndim != 2:
            raise ValueError(f"state must be [b s]; got shape {tuple(self.state.shape)}.")
        sizes = {"state": len(self.state), "instruction": len(self.instruction)}
        for name, axes in (("frames", "b v t 3 h w"), ("semantic", "b v c gh gw"), ("prior", "b v d gh gw")):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim != len(axes.split()):
                raise ValueError(f"{name}: expected [{axes}], got shape {tuple(tensor.shape)}.")
            sizes[name] = len(tensor)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All fields of an observation must have one batch size; got {sizes}.")

    @property
    def text(self) -> list[str] | EncodedText:
        """The instruction: encoded if it is, else its sentences."""
        return self.instruction if self.words is None else self.words

    def require_frames(self, stream: str) -> Tensor:
        """Return the frames.

        Raises:
            ValueError: If there are none; names the stream whose features are missing too.
        """
        if self.frames is None:
            raise ValueError(f"The observation must hold frames or cached {stream} features; got neither.")
        return self.frames


def to_float(frames: Tensor) -> Tensor:
    """Return frames in [0, 1] from uint8 frames; others are returned as they are."""
    return frames.float().div_(255) if frames.dtype == torch.uint8 else frames


def stack_views(cameras: dict[str, Tensor], size: int, how: str = "stretch") -> Tensor:
    """Bring the frames of all cameras to one square size and stack them in the order of the dictionary.

    Frames [b 3 h w] or [b t 3 h w] by camera, uint8 or float in [0, 1] -> [b v t 3 size size]; uint8 if all
    cameras are and have that size. They are never cropped: `how` is `stretch`, or `pad`, which keeps the
    aspect ratio and adds black at both sides. Both streams read the result: a place is the same normalised
    image coordinate in each.

    Raises:
        TypeError: If frames are neither uint8 nor floating-point.
        ValueError: If values lie outside [0, 1] or a shape is not that of frames.
    """
    views = []
    for name, view in cameras.items():
        check_frames(view, name)
        clip = view[:, None] if view.ndim == 4 else view
        if clip.ndim != 5 or clip.shape[2] != 3:
            raise ValueError(f"{name}: expected [b 3 h w] or [b t 3 h w], got shape {tuple(view.shape)}.")
        if clip.shape[-2:] != (size, size):
            clip = pad_square(to_float(clip), size) if how == "pad" else resize(to_float(clip), size, size)
        views.append(clip)
    if any(view.is_floating_point() for view in views):
        views = [to_float(view) for view in views]
    return torch.stack(views, dim=1)


def check_frames(frames: Tensor, name: str) -> None:
    """Check that the frames of a camera are uint8 or in [0, 1]; nothing is rescaled by guess.

    Raises:
        TypeError: If frames are neither uint8 nor floating-point.
        ValueError: If a value lies outside [0, 1] or is not a number.
    """
    if frames.dtype == torch.uint8:
        return
    if not frames.is_floating_point():
        raise TypeError(f"{name}: expected uint8 or floating-point frames in [0, 1], got {frames.dtype}.")
    low, high = (bound.item() for bound in torch.aminmax(frames.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"{name}: expected frames in [0, 1], got values from {low:.4g} to {high:.4g}. Divide frames in "
            "[0, 255] by 255 and do not normalise them: each encoder does that itself."
        )


def pad_square(frames: Tensor, size: int) -> Tensor:
    """Resize [... 3 h w] to fit a square, keeping the aspect ratio, and add black at both sides."""
    scale = size / max(frames.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in frames.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    margins = (left, size - width - left, top, size - height - top)
    return functional.pad(resize(frames, height, width), margins)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly with antialiasing, [... 3 h w] -> [... 3 height width], values kept in [0, 1]."""
    if frames.shape[-2:] == (height, width):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    resized = functional.interpolate(flat, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    return resized.reshape(*frames.shape[:-2], height, width)
