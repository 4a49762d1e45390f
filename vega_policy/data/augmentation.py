"""Random shifts of training frames, drawn for whole batches, so that cached frames are shifted as well.

LeRobot's image transforms act on single frames where videos are decoded, which a cache skips.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FRAMES = "vega.frames"


class RandomShift:
    """Shift each view of each sample by whole pixels, up to `most` each way, repeating the frame's edge.

    A policy that learns from few demonstrations then cannot rely on single pixels (Kostrikov, Yarats and
    Fergus, "Image Augmentation Is All You Need", 2021, section 3.1: four pixels of 84). The shifts are a pure
    function of seed and batch number, as the order of samples is: a resumed run needs no state, and several
    processes draw what one would draw for all their samples. `cameras` are in the order of a cache's views.
    """

    def __init__(
        self, most: int, cameras: Sequence[str], *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._most, self._cameras, self._seed, self._rank, self._world = most, cameras, seed, rank, world

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a pre-processed batch with shifted frames.

        Args:
            batch: Frames under camera keys, [b ... 3 h w], or those of a cache, uint8 [b v 3 h w].
            number: Number of the batch in the run, from 0.
        """
        if FRAMES in batch:
            frames = batch[FRAMES]
            shifts = self.draw(len(frames), number).to(frames.device)
            return batch | {FRAMES: shift_frames(frames.flatten(0, 1), shifts.flatten(0, 1)).view_as(frames)}
        shifted = dict(batch)
        for view, camera in enumerate(self._cameras):
            shifts = self.draw(len(batch[camera]), number)[:, view]
            shifted[camera] = shift_frames(batch[camera], shifts.to(batch[camera].device))
        return shifted

    def draw(self, samples: int, number: int) -> Tensor:
        """Return the shifts down and to the right of this process's samples in a batch, integers [b v 2]."""
        generator = torch.Generator().manual_seed(((self._seed + 1) * 2_654_435_761 + number) % 2**63)
        shape = (self._world * samples, len(self._cameras), 2)
        shifts = torch.randint(-self._most, self._most + 1, shape, generator=generator)
        return shifts[self._rank * samples :][:samples]


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
