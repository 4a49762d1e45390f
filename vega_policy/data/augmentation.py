"""Random shifts of training frames, drawn for whole batches and so for cached frames as well.

LeRobot's image transforms work frame by frame where videos are decoded; a cache never gets there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FRAMES = "vega.frames"


class RandomShift:
    """Moves each view of each sample by whole pixels, up to so many each way, repeating the picture's edge.

    A policy that learns from few demonstrations then cannot rely on single pixels (Kostrikov, Yarats and
    Fergus, "Image Augmentation Is All You Need", 2021, section 3.1: four pixels of 84). The draws are a pure
    function of seed and batch number, as the order of samples is: a resumed run needs no state, and several
    processes draw what one would for all their samples.
    """

    def __init__(
        self, most: int, cameras: Sequence[str], *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        """Remembers what to shift.

        Args:
            most: Largest shift in pixels of the frames as they come, at least 1.
            cameras: Camera keys, in the order of a cache's views.
            seed: Seed of the run.
            rank: This process, 0 <= rank < world.
            world: Number of processes.
        """
        self._most, self._cameras, self._seed, self._rank, self._world = most, cameras, seed, rank, world

    def __call__(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a pre-processed batch with other frames.

        Args:
            batch: Frames under camera keys, [b ... 3 h w], or those of a cache, uint8 [b v 3 h w].
            number: Which batch of the run it is, from 0.
        """
        if FRAMES in batch:
            frames = batch[FRAMES]
            shifts = self.draw(len(frames), number).to(frames.device)
            return batch | {FRAMES: shifted(frames.flatten(0, 1), shifts.flatten(0, 1)).view_as(frames)}
        moved = dict(batch)
        for view, camera in enumerate(self._cameras):
            shifts = self.draw(len(batch[camera]), number)[:, view]
            moved[camera] = shifted(batch[camera], shifts.to(batch[camera].device))
        return moved

    def draw(self, samples: int, number: int) -> Tensor:
        """Shifts down and to the right of this process's samples in a batch, integers [b v 2]."""
        generator = torch.Generator().manual_seed(((self._seed + 1) * 2_654_435_761 + number) % 2**63)
        shape = (self._world * samples, len(self._cameras), 2)
        drawn = torch.randint(-self._most, self._most + 1, shape, generator=generator)
        return drawn[self._rank * samples :][:samples]


def shifted(frames: Tensor, shifts: Tensor) -> Tensor:
    """Move pictures, repeating their edges.

    Args:
        frames: Pictures of any type [b ... h w]; those of one sample move alike.
        shifts: Pixels down and to the right, integers [b 2].
    """
    height, width = frames.shape[-2:]
    rows, columns = (
        (torch.arange(size, device=frames.device) - shifts[:, axis, None]).clamp(0, size - 1)
        for axis, size in enumerate((height, width))
    )  # [b h], [b w]
    planes = frames.flatten(1, -3)  # [b m h w]
    samples = torch.arange(len(frames), device=frames.device)[:, None, None]
    moved = planes[samples, :, rows[:, :, None], columns[:, None, :]]  # [b h w m]
    return moved.movedim(-1, 1).reshape(frames.shape)
