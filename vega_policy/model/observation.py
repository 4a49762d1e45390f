"""What a policy sees at one instant: shapes and ranges, checked once, at the boundary."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Observation:
    """One batch of observations.

    A frozen encoder's output may stand in for the frames it was computed from (`semantic`, `prior`), which
    is how training reads a cache; `frames` may then be None.

    Attributes:
        frames: Camera frames, float [b v t 3 h w] in [0, 1]; t = 1 unless clips are asked for.
        state: Proprioception only (end-effector pose, gripper, joints), normalised, [b s].
        instruction: One sentence a sample, b strings.
        semantic: Cached output of the backbone's image encoder, [b v c gh gw].
        prior: Cached output of the prior, [b v d gh gw].
    """

    frames: Tensor | None
    state: Tensor
    instruction: list[str]
    semantic: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes that disagree.

        Raises:
            ValueError: If the batch sizes of the fields differ or an axis is missing.
        """
        if self.state.ndim != 2:
            raise ValueError(f"state must be [b s]; got shape {tuple(self.state.shape)}.")
        sizes = {"state": len(self.state), "instruction": len(self.instruction)}
        for name, axes in (("frames", 6), ("semantic", 5), ("prior", 5)):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim != axes:
                raise ValueError(f"{name} must have {axes} axes; got shape {tuple(tensor.shape)}.")
            sizes[name] = len(tensor)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All fields of an observation need one batch size; got {sizes}.")


def check_frames(frames: Tensor, name: str) -> None:
    """Refuse frames whose values are not in [0, 1]; nothing is rescaled by guess.

    Args:
        frames: Frames of one camera, any shape.
        name: The camera's key, for the message.

    Raises:
        TypeError: If frames are not floating-point.
        ValueError: If a value lies outside [0, 1] or is not a number.
    """
    if not frames.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point frames in [0, 1], got {frames.dtype}. Divide uint8 frames by "
            "255."
        )
    low, high = (bound.item() for bound in torch.aminmax(frames.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"{name}: expected frames in [0, 1], got values from {low:.4g} to {high:.4g}. Frames in [0, "
            "255] must be divided by 255; frames must not be normalised beforehand, each encoder does "
            "that by itself."
        )


def stack_views(frames: dict[str, Tensor], size: int) -> Tensor:
    """Bring all cameras to one square size and stack them.

    A frame of another shape is stretched, never cropped or padded, so that "the same place" is the same
    normalised image coordinate in every stream.

    Args:
        frames: By camera key, [b 3 h w] or [b t 3 h w] in [0, 1]; the dictionary's order is the order of
            views.
        size: Side of the square in pixels.

    Returns:
        Frames [b v t 3 size size] in [0, 1].

    Raises:
        TypeError: If frames are not floating-point.
        ValueError: If values lie outside [0, 1] or a shape is not that of frames.
    """
    views = []
    for name, view in frames.items():
        check_frames(view, name)
        clip = view[:, None] if view.ndim == 4 else view
        if clip.ndim != 5 or clip.shape[2] != 3:
            raise ValueError(f"{name}: expected [b 3 h w] or [b t 3 h w], got shape {tuple(view.shape)}.")
        views.append(resize(clip, size, size))
    return torch.stack(views, dim=1)


def stored_frames(frames: Tensor | None) -> Tensor | None:
    """Frames of a cache, which lie within their range by their type, uint8 [b v 3 h w] -> [b v 1 3 h w].

    Raises:
        TypeError: If they are not uint8.
    """
    if frames is None:
        return None
    if frames.dtype != torch.uint8:
        raise TypeError(f"vega.frames: expected uint8 frames of a cache, got {frames.dtype}.")
    return frames[:, :, None].float().div_(255)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased resize, [... 3 h w] -> [... 3 height width], values kept within [0, 1]."""
    if frames.shape[-2:] == (height, width):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    resized = functional.interpolate(flat, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    return resized.reshape(*frames.shape[:-2], height, width)


def sentences(task: str | list[str] | None, batch: int) -> list[str]:
    """One sentence a sample; LeRobot gives a string, a list, or nothing for a dataset without tasks."""
    if task is None:
        return [""] * batch
    return [task] * batch if isinstance(task, str) else list(task)
