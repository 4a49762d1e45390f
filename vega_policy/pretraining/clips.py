"""Clips on disk, mapped into memory in the layout of `envs.clips`, and the randomness of a training step."""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor


class DamagedClipsError(ValueError):
    """A shard is not what was written; the message names it."""


@dataclass(frozen=True)
class StepRandomness:
    """Random generators of one step, which depend on seed and step only, so that no state has to be kept."""

    order: np.random.Generator  # which clips are taken, and how they are cropped
    noise: torch.Generator  # noise and times, on the device

    @classmethod
    def of_step(cls, seed: int, step: int, device: torch.device) -> Self:
        """Return the generators of a step."""
        order = np.random.default_rng((seed, step))
        return cls(order, torch.Generator(device).manual_seed(int(order.integers(2**62))))


Loss = Callable[[StepRandomness], tuple[Tensor, dict[str, Tensor]]]
"""A step's randomness -> loss and metrics, of a network that it holds."""


@dataclass(frozen=True)
class ClipShard:
    """One file of clips."""

    frames: np.ndarray  # uint8 [n t h w 3], mapped into memory
    instructions: list[str]  # of each clip; empty where the clip has none
    shots: list[str]  # camera motion of each clip
    mark: str  # name and size in bytes


def open_shard(description: Path) -> ClipShard:
    """Open a shard by its description.

    Raises:
        DamagedClipsError: If its frames are not those that were written.
    """
    note, path = json.loads(description.read_text()), description.with_suffix(".npy")
    size = path.stat().st_size
    if size != note["bytes"]:
        raise DamagedClipsError(
            f"{path} has {size} bytes, {note['bytes']} were written; delete {description.name} and it, and "
            "render it again: stages=[clips]"
        )
    frames, clips = np.load(path, mmap_mode="r"), note["clips"]
    if frames.dtype != np.uint8 or frames.ndim != 5 or len(frames) != len(clips):
        raise DamagedClipsError(
            f"{path}: expected uint8 [{len(clips)} t h w 3]; got {frames.dtype} {list(frames.shape)}"
        )
    instructions = [clip["instruction"] for clip in clips]
    return ClipShard(frames, instructions, [clip["shot"] for clip in clips], f"{path.stem} {size}")


class Clips:
    """Clips of several shards, whose frames have one shape, under one index.

    Attributes:
        instructions: Instruction of each clip.
        shots: Camera motion of each clip.
        mark: Identifies these clips in file names.
        shape: Shape [t h w 3] of a clip.
    """

    def __init__(self, shards: list[ClipShard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard.frames) for shard in shards)])
        self.instructions = [text for shard in shards for text in shard.instructions]
        self.shots = [shot for shard in shards for shot in shard.shots]
        self.mark = hashlib.sha256("\n".join(shard.mark for shard in shards).encode()).hexdigest()[:16]
        self.shape: tuple[int, ...] = shards[0].frames.shape[1:]

    @classmethod
    def open(cls, folder: Path, held_out: float) -> tuple[Self, Self]:
        """Return training clips and held-out ones: whole shards, chosen by a hash of their names.

        `held_out` is the fraction of all possible shards; at least one shard is held out, and one is not. A
        shard that is held out by its hash stays so when more are rendered. If no shard's hash is low enough,
        the lowest is held out, and another may take its place later.

        Raises:
            FileNotFoundError: If there are fewer than two whole shards.
            DamagedClipsError: If a shard was cut off or holds other clips than its description says.
        """
        paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".npy").is_file())
        if len(paths) < 2:
            raise FileNotFoundError(
                f"{folder}: expected at least two shards of clips, one of them held out; found {len(paths)}. "
                "Render some: stages=[clips]."
            )
        shards = [open_shard(path) for path in paths]
        shapes = {shard.frames.shape[1:] for shard in shards}
        if len(shapes) > 1:
            raise DamagedClipsError(f"{folder}: clips of several shapes {sorted(shapes)}; expected one")
        hashes = [zlib.crc32(path.stem.encode()) / 2**32 for path in paths]
        aside = {index for index, value in enumerate(hashes) if value < held_out} or {int(np.argmin(hashes))}
        if len(aside) == len(shards):
            aside.remove(int(np.argmax(hashes)))
        training = [shard for index, shard in enumerate(shards) if index not in aside]
        return cls(training), cls([shards[index] for index in sorted(aside)])

    def __len__(self) -> int:
        """Return the number of clips."""
        return int(self._starts[-1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return clips by index, uint8 [n t h w 3]."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack(
            [
                self._shards[shard].frames[index - self._starts[shard]]
                for shard, index in zip(shards, indices, strict=True)
            ]
        )

    def take_spread(self, most: int) -> np.ndarray:
        """Return at most `most` clips, evenly spaced, uint8 [n t h w 3]."""
        return self.take(self.spread(most))

    def spread(self, most: int) -> np.ndarray:
        """Return the indices of at most `most` clips, evenly spaced."""
        return np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)
