"""Clips on disk, mapped into memory; the layout is that of `envs.clips`."""

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np


class DamagedClipsError(ValueError):
    """A shard is not what was written; the message names it."""


@dataclass(frozen=True)
class Shard:
    """One file of clips.

    Attributes:
        frames: uint8 [n t h w 3], mapped into memory.
        instructions: What the robot was told, clip by clip; empty where it is not said.
        shots: How each was filmed.
        mark: Its name and bytes.
    """

    frames: np.ndarray
    instructions: list[str]
    shots: list[str]
    mark: str


class Clips:
    """Clips of several shards under one index.

    Args:
        shards: The shards; their frames have one shape.

    Attributes:
        mark: Tells these clips from others, for names of files.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard.frames) for shard in shards)])
        self.instructions = [text for shard in shards for text in shard.instructions]
        self.shots = [shot for shard in shards for shot in shard.shots]
        self.mark = hashlib.sha256("\n".join(shard.mark for shard in shards).encode()).hexdigest()[:16]
        self.shape: tuple[int, ...] = shards[0].frames.shape[1:]

    @classmethod
    def open(cls, folder: Path, held_out: float) -> tuple[Self, Self]:
        """Clips to learn from, and held-out ones: whole shards, chosen by a hash of their names.

        What is held out by its hash stays so when more is filmed. Where no shard's hash is low enough, the
        lowest is held out, and another may take its place later.

        Args:
            folder: Where they lie.
            held_out: Share of all possible shards that is held out; at least one shard is, and one is not.

        Raises:
            FileNotFoundError: If there are fewer than two whole shards.
            DamagedClipsError: If a shard was cut off or holds other clips than its description says.
        """
        paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".npy").is_file())
        if len(paths) < 2:
            raise FileNotFoundError(
                f"{folder} holds {len(paths)} shards of clips; two are needed, one of which is held out. "
                "Film some: stages=[clips]."
            )
        shards = [open_shard(path) for path in paths]
        shapes = {shard.frames.shape[1:] for shard in shards}
        if len(shapes) > 1:
            raise DamagedClipsError(f"{folder}: clips of several shapes {sorted(shapes)}; expected one")
        places = [zlib.crc32(path.stem.encode()) / 2**32 for path in paths]
        aside = {index for index, place in enumerate(places) if place < held_out} or {int(np.argmin(places))}
        if len(aside) == len(shards):
            aside.remove(int(np.argmax(places)))
        return (
            cls([shard for index, shard in enumerate(shards) if index not in aside]),
            cls([shards[index] for index in sorted(aside)]),
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Clips by index, uint8 [n t h w 3]."""
        places = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack(
            [
                self._shards[shard].frames[index - self._starts[shard]]
                for shard, index in zip(places, indices, strict=True)
            ]
        )


def open_shard(description: Path) -> Shard:
    """Open a shard by its description.

    Raises:
        DamagedClipsError: If its frames are not those that were written.
    """
    note, path = json.loads(description.read_text()), description.with_suffix(".npy")
    size = path.stat().st_size
    if size != note["bytes"]:
        raise DamagedClipsError(
            f"{path} has {size} bytes, {note['bytes']} were written; delete {description.name} and it, and "
            "film again: stages=[clips]"
        )
    frames, clips = np.load(path, mmap_mode="r"), note["clips"]
    if frames.dtype != np.uint8 or frames.ndim != 5 or len(frames) != len(clips):
        raise DamagedClipsError(
            f"{path}: expected uint8 [{len(clips)} t h w 3]; got {frames.dtype} {list(frames.shape)}"
        )
    return Shard(
        frames,
        [clip["instruction"] for clip in clips],
        [clip["shot"] for clip in clips],
        f"{path.stem} {size}",
    )
