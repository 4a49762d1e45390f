"""Clips on disk, mapped into memory in the layout of `envs.clips`, and the randomness of a training step.

`cut_clips` cuts such clips from demonstrations that `vega-render` has rendered; `envs.clips` records others.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.config import from_config
from vega_policy.data.dataset import FrameTable, read_table
from vega_policy.data.dataset_files import fingerprint_frames, read_info
from vega_policy.data.feature_cache import frames_stream, open_stream
from vega_policy.run_dir import atomic_file, open_run, read_json, write_text


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
    """Open a shard by its description; DamagedClipsError if its frames are not those that were written."""
    note, path = read_json(description, "bytes"), description.with_suffix(".npy")
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
    """Clips of several shards, whose frames have one shape [t h w 3], under one index.

    `shots` are the clips' camera motions; `mark` identifies the clips in file names.
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


@dataclass(frozen=True)
class CutSpec:
    """Clips cut from rendered demonstrations."""

    roots: list[str]  # datasets that `vega-render` made of states
    suites: list[str]  # their suites, for the card
    cache_root: str = "outputs/cache"  # folder of the cache that holds their frames
    frames: int = 9  # frames of a clip, 1 + 4k as Wan's autoencoder takes them
    frame_size: int = 128  # side in pixels of the rendered frames
    # Fewest and most control steps between two frames of a clip; each clip draws its own number.
    every: tuple[int, int] = (4, 8)
    clips_per_episode: int = 6  # clips of each camera of an episode
    parts: int = 20  # shards of a dataset; each holds every n-th episode, so that it has all tasks
    # Fraction of the clips that keep their instruction; the others' is empty.
    instruction_fraction: float = 0.5
    seed: int = 0  # seed of starts, distances and instructions

    def __post_init__(self) -> None:
        if self.frames % 4 != 1 or self.frames < 5:
            raise ValueError(f"clips.frames: expected 1 + 4 k frames, at least 5; got {self.frames}")
        if not 1 <= self.every[0] <= self.every[1]:
            raise ValueError(f"clips.every: expected fewest and most control steps; got {list(self.every)}")
        if not self.roots or min(self.clips_per_episode, self.parts) < 1:
            raise ValueError("clips: expected a root, and clips_per_episode and parts of at least 1")


def cut_instructions(**values: Any) -> list[str]:
    """Return the instructions of the datasets of a `CutSpec`, each once."""
    spec = from_config(CutSpec, values)
    return list(dict.fromkeys(text for root in spec.roots for text in read_table(Path(root)).tasks))


def cut_clips(folder: Path, *, processes: int, deadline: float | None = None, **values: Any) -> bool:
    """Cut the missing shards of `CutSpec(**values)` into a folder; return whether all are complete.

    Unfinished shards are left to the next call at `deadline` (`time.time()`). `processes` is not used: frames
    are only copied.

    Raises:
        FileNotFoundError: If a dataset has no rendered frames of this size; says how to render them.
        ValueError: If the folder holds clips of another spec.
    """
    spec = from_config(CutSpec, values)
    with open_run(folder, asdict(spec), option="clips.folder"):
        for root in tqdm(spec.roots, desc="Clips", unit="dataset"):
            source = RenderedSource(Path(root), spec)
            for part in range(spec.parts):
                path = folder / f"{Path(root).name}-{part:03d}.npy"
                if path.with_suffix(".json").is_file():
                    continue
                if deadline is not None and time.time() >= deadline:
                    return False
                source.write_shard(path, part)
    return True


class RenderedSource:
    """Frames of one rendered dataset, from which clips are cut."""

    def __init__(self, root: Path, spec: CutSpec) -> None:
        self._spec, self._name = spec, root.name
        origin = read_json(root / "meta" / "vega.json", "settings")["settings"]
        self._stride: int = origin.get("frame_stride", 1)
        if self._stride > spec.every[1]:
            raise ValueError(
                f"{root}: every {self._stride}-th state is rendered; clips.every allows {list(spec.every)} "
                "control steps between two frames. Render more states, or give longer distances."
            )
        features = read_info(root)["features"]
        self._cameras = [name for name in features if name.startswith("observation.images.")]
        key = {"repo_id": origin["repo_id"], **fingerprint_frames(root)}
        stream = frames_stream(key, self._cameras, spec.frame_size, stride=self._stride)
        cache = Path(spec.cache_root)
        if not (cache / stream.folder).is_dir():
            raise FileNotFoundError(
                f"{cache} holds no frames of {spec.frame_size} pixels of {root}. Render them: vega-render "
                f"FILE.safetensors root={root} repo_id={origin['repo_id']} frame_size={spec.frame_size} "
                f"cache_root={cache}"
            )
        self._table: FrameTable = read_table(root)
        self._stored = self._table.every(self._stride).nonzero()[:, 0]
        self._frames = open_stream(cache, stream, len(self._stored), None)

    def write_shard(self, path: Path, part: int) -> None:
        """Write the clips of every n-th episode, n the number of parts, and their description last."""
        rng = np.random.default_rng((self._spec.seed, zlib.crc32(self._name.encode()), part))
        episodes = self._table.episode[self._stored]
        clips, described = [], []
        for episode in episodes.unique().tolist()[part :: self._spec.parts]:
            rows = (episodes == episode).nonzero()[:, 0]
            text = self._table.instructions(self._stored[rows[:1]])[0]
            for view, camera in enumerate(self._cameras):
                for _ in range(self._spec.clips_per_episode):
                    clips.append(self._frames[self._draw_rows(rows, rng), view].permute(0, 2, 3, 1).numpy())
                    kept = text if rng.random() < self._spec.instruction_fraction else ""
                    described.append(
                        {"shot": camera.rpartition(".")[-1], "instruction": kept, "seed": episode}
                    )
        if not clips:
            raise ValueError(f"clips.parts={self._spec.parts} are more than {self._name} has episodes")
        with atomic_file(path) as draft, draft.open("wb") as file:
            np.save(file, np.stack(clips))
        description = {"bytes": path.stat().st_size, "clips": described}
        write_text(path.with_suffix(".json"), json.dumps(description))

    def _draw_rows(self, rows: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the rows of a clip of an episode [t]; one that is too short ends with its last frame."""
        fewest, most = (-(-steps // self._stride) for steps in (self._spec.every[0], self._spec.every[1]))
        fitting = (len(rows) - 1) // (self._spec.frames - 1)
        every = int(rng.integers(fewest, max(fewest, min(most, fitting)) + 1))
        last = max(0, len(rows) - 1 - every * (self._spec.frames - 1))
        places = int(rng.integers(last + 1)) + every * torch.arange(self._spec.frames)
        return rows[places.clamp(max=len(rows) - 1)]
