"""Augmentation of training batches on the device: random shifts, colour jitter and state dropout.

Draws are made for whole batches, so that cached frames are augmented as well; LeRobot's image transforms act
on single frames where videos are decoded, which a cache skips. They are a pure function of seed and batch
number, as the order of samples is: a resumed run needs no state, and several processes draw what one would
draw for all their samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vega_policy.data.dataset import DISPLACEMENT, STATE, DatasetConfig

FRAMES, FUTURE = "vega.frames", "vega.future_frames"
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
YIQ = (GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
"""Rows of the transform from red, green and blue to grey and two colour differences."""


def make_augmentations(
    config: DatasetConfig,
    cameras: Sequence[str],
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    displacement_noise: float = 0.0,
) -> "list[Augmentation]":
    """Return the augmentations that are on, in the order in which they apply, for one of `world` processes.

    `cameras` are in the order of a cache's views. An augmentation maps a pre-processed batch and its number
    in the run, from 0, to a batch. Frames lie under camera keys, [b ... 3 h w], or are those of a cache,
    uint8 [b v 3 h w].
    """
    draws = {"seed": seed, "rank": rank, "world": world, "repeats": 2 if config.pairs else 1}
    augmentations: list[Augmentation] = []
    if config.shift:
        augmentations.append(RandomShift(config.shift, cameras, **draws))
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    if any(jitter):
        augmentations.append(ColorJitter(*jitter, cameras, **draws))
    if config.state_dropout:
        augmentations.append(StateDropout(config.state_dropout, **draws))
    if displacement_noise:
        augmentations.append(DisplacementNoise(displacement_noise, **draws))
    return augmentations


@dataclass(frozen=True)
class Share:
    """One process's share of the draws for a batch, which are those of one process for all of it."""

    seed: int
    rank: int = 0
    world: int = 1
    repeats: int = 1  # samples in a row with the same draw: 2 where they are pairs

    def take(self, samples: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Return the draws of this process's samples [b ...], of `draw` for a number of samples [n ...]."""
        distinct = samples // self.repeats
        own = draw(self.world * distinct)[self.rank * distinct :][:distinct]
        return own.repeat_interleave(self.repeats, dim=0)


class RandomShift:
    """Shift each view of each sample by whole pixels, up to `most` each way, repeating the frame's edge.

    A policy that learns from few demonstrations then cannot rely on single pixels (Kostrikov, Yarats and
    Fergus, "Image Augmentation Is All You Need", 2021, section 3.1: four pixels of 84).
    """

    def __init__(self, most: int, cameras: Sequence[str], **share: int) -> None:
        self._most, self._cameras, self._share = most, cameras, Share(**share)

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a batch with shifted frames."""
        if FRAMES in batch:
            frames = batch[FRAMES]
            shifts = self.draw(len(frames), number).to(frames.device).flatten(0, 1)
            batch = batch | {FRAMES: shift_frames(frames.flatten(0, 1), shifts).view_as(frames)}
            if FUTURE in batch:  # later frames of a forecast move alike: its tokens cover the same places
                later = rearrange(batch[FUTURE], "b k v c h w -> (b v) k c h w")
                moved = shift_frames(later, shifts)
                batch[FUTURE] = rearrange(moved, "(b v) k c h w -> b k v c h w", b=len(frames))
            return batch
        shifted = dict(batch)
        for view, camera in enumerate(self._cameras):
            shifts = self.draw(len(batch[camera]), number)[:, view]
            shifted[camera] = shift_frames(batch[camera], shifts.to(batch[camera].device))
        return shifted

    def draw(self, samples: int, number: int) -> Tensor:
        """Return the shifts down and to the right of this process's samples in a batch, integers [b v 2]."""
        generator = torch.Generator().manual_seed(((self._share.seed + 1) * 2_654_435_761 + number) % 2**63)

        def draw(total: int) -> Tensor:
            shape = (total, len(self._cameras), 2)
            return torch.randint(-self._most, self._most + 1, shape, generator=generator)

        return self._share.take(samples, draw)


class ColorJitter:
    """Change brightness, contrast, saturation and hue of each sample, all its views alike.

    Factors are uniform in [1 - x, 1 + x], the turn of the hue in [-x, x], with x the argument of that name.
    """

    def __init__(
        self,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        cameras: Sequence[str],
        **share: int,
    ) -> None:
        self._most = torch.tensor([brightness, contrast, saturation, hue])
        self._cameras, self._share = cameras, Share(**share)

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a batch with frames of other colours."""
        keys = [FRAMES] if FRAMES in batch else self._cameras
        return batch | {key: jitter_frames(batch[key], self.draw(len(batch[key]), number)) for key in keys}

    def draw(self, samples: int, number: int) -> Tensor:
        """Return factors of brightness, contrast and saturation and turns of hue of each sample, [b 4]."""
        generator = _generator(self._share.seed, number, salt=1)
        uniform = self._share.take(samples, lambda total: torch.rand(total, 4, generator=generator))
        return (2 * uniform - 1) * self._most + torch.tensor([1.0, 1.0, 1.0, 0.0])


class StateDropout:
    """Set the whole normalised proprioceptive state of a sample to zero with some probability."""

    def __init__(self, probability: float, **share: int) -> None:
        self._probability, self._share = probability, Share(**share)

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a batch in which some states [b ... s] are zero."""
        state = batch[STATE]
        dropped = self.draw(len(state), number).to(state.device)
        return batch | {STATE: state.masked_fill(dropped.view(-1, *[1] * (state.ndim - 1)), 0.0)}

    def draw(self, samples: int, number: int) -> Tensor:
        """Return which samples have their state dropped, bool [b]."""
        generator = _generator(self._share.seed, number, salt=2)
        uniform = self._share.take(samples, lambda total: torch.rand(total, generator=generator))
        return uniform < self._probability


class DisplacementNoise:
    """Draw the noise on the displacement that enters the action head, normal with a deviation in metres."""

    def __init__(self, deviation: float, **share: int) -> None:
        self._deviation, self._share = deviation, Share(**share)

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a batch with noise beside its displacements."""
        known = batch[f"vega.{DISPLACEMENT}"]
        return batch | {f"vega.{DISPLACEMENT}_noise": self.draw(len(known), number).to(known)}

    def draw(self, samples: int, number: int) -> Tensor:
        """Return the noise of each sample, [b 3]."""
        generator = _generator(self._share.seed, number, salt=3)
        normal = self._share.take(samples, lambda total: torch.randn(total, 3, generator=generator))
        return self._deviation * normal


Augmentation = RandomShift | ColorJitter | StateDropout | DisplacementNoise


def shift_frames(frames: Tensor, shifts: Tensor) -> Tensor:
    """Shift frames [b ... h w] of any type by pixels [b 2], down and right, repeating their edges."""
    height, width = frames.shape[-2:]
    rows, columns = (
        (torch.arange(size, device=frames.device) - shifts[:, axis, None]).clamp(0, size - 1)
        for axis, size in enumerate((height, width))
    )  # [b h], [b w]
    planes = frames.flatten(1, -3)  # [b m h w]
    samples = torch.arange(len(frames), device=frames.device)[:, None, None]
    shifted = planes[samples, :, rows[:, :, None], columns[:, None, :]]  # [b h w m]
    return shifted.movedim(-1, 1).reshape(frames.shape)


def jitter_frames(frames: Tensor, factors: Tensor) -> Tensor:
    """Change the colours of frames [b ... 3 h w], uint8 or floating-point in [0, 1]; the type is kept.

    The change is one affine map of colours, scaling about black (brightness), each pixel's grey (saturation)
    and a view's mean grey (contrast), and a rotation of the colour differences (hue). `factors` [b 4] are
    those of brightness, contrast and saturation, and turns of hue, on the CPU.
    """
    is_uint8 = frames.dtype == torch.uint8
    views = frames.reshape(len(frames), -1, 3, frames.shape[-2] * frames.shape[-1])  # [b m 3 n]
    pixels = views.float() / 255 if is_uint8 else views
    matrix = color_matrices(factors)[:, None].to(pixels)  # [b 1 3 3]
    mean = (matrix @ pixels.mean(dim=3, keepdim=True)).flatten(2)  # [b m 3]
    grey = mean @ torch.tensor(GREY).to(pixels)  # [b m]
    contrast = factors[:, 1].to(pixels)
    offset = (1 - contrast[:, None]) * grey  # [b m]
    jittered = torch.addcmul(offset[:, :, None, None], contrast[:, None, None, None], matrix @ pixels)
    jittered = jittered.clamp_(0, 1)
    jittered = jittered.mul_(255).round_().to(torch.uint8) if is_uint8 else jittered
    return jittered.reshape(frames.shape)


def color_matrices(factors: Tensor) -> Tensor:
    """Return the matrices of brightness, saturation and hue over red, green and blue, [b 4] -> [b 3 3]."""
    brightness, _, saturation, hue = factors.double().unbind(dim=1)
    to_yiq = torch.tensor(YIQ, dtype=torch.float64)
    cosine, sine = saturation * (2 * math.pi * hue).cos(), saturation * (2 * math.pi * hue).sin()
    rotation = torch.zeros(len(factors), 3, 3, dtype=torch.float64)
    rotation[:, 0, 0] = 1.0
    rotation[:, 1, 1], rotation[:, 1, 2] = cosine, -sine
    rotation[:, 2, 1], rotation[:, 2, 2] = sine, cosine
    return (brightness[:, None, None] * (torch.linalg.inv(to_yiq) @ rotation @ to_yiq)).to(factors)


def _generator(seed: int, number: int, *, salt: int) -> torch.Generator:
    """Return the generator of one kind of draw, which follows from seed, batch number and salt."""
    mixed = ((seed + 1) * 2_654_435_761 + number) * 4 + salt
    return torch.Generator().manual_seed(mixed % 2**63)
