"""On-disk cache of what training never changes: frames at the policy's size and features of frozen encoders.

One folder a stream, named by a hash over all that determines its values; it is complete or absent:

    <cache_root>/<stream>-<hash>/manifest.json   the key in full, shape and type
                                 values.bin      one row a dataset frame, memory-mapped
                                 mean_frames.safetensors

A stream is built in `<stream>-<hash>.building`, whose values.bin has its full size from the start: processes
and machines that share the folder each write the rows of other episodes, and an interrupted build continues
after the last episode on the disk. A batch never spans two episodes, so the bytes depend neither on
interruptions nor on the number of processes.

This module imports no LeRobot.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.data.dataset_files import hash_bytes
from vega_policy.data.video import MeanFrames, in_parallel
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.model.observation import stack_views
from vega_policy.model.vega import VegaModel
from vega_policy.priors import resolve
from vega_policy.priors.base import fingerprint_weights
from vega_policy.run_dir import (
    check_space,
    complete_folder,
    free_space,
    lock_folder,
    open_run,
    read_json,
    read_tensors,
    remove_partial,
    write_tensors,
    write_text,
)

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, VALUES, MEAN_FRAMES = "manifest.json", "values.bin", "mean_frames.safetensors"
BATCH = {"cpu": 8, "accelerator": 64}
"""Time steps encoded at once. On a CPU, 32 took 1.6 times as long for each (measured at 128 pixels)."""
TYPES = {"frames": torch.uint8, "semantic": torch.bfloat16, "prior": torch.bfloat16}

RECORD_EVERY = 10.0
"""Seconds between two records of finished episodes: about what a kill loses besides the running episode."""

Clips = Iterable[dict[str, Tensor]]
"""Frames in order, some consecutive ones of an episode at a time: by camera, uint8 [t 3 h w]."""
ClipReader = Callable[[Sequence[int]], Clips]
"""Reads the cached frames of episodes, given by their positions in the dataset, one after the other.

The call refuses a dataset whose frames cannot be read; of no episodes it yields nothing.
"""


class CacheError(ValueError):
    """A cache is truncated, or was built from other inputs."""


@dataclass(frozen=True)
class Stream:
    """One kind of cached value and all that determines it."""

    name: str  # `frames` [v 3 h w] uint8, `semantic` [v c gh gw] or `prior` [v d gh gw], both bfloat16
    key: dict[str, Any]  # plain values; another key is another cache

    @property
    def folder(self) -> str:
        """Return the folder name below the cache's root."""
        return f"{self.name}-{hash_bytes(json.dumps(self.key, sort_keys=True).encode())}"


def check_cacheable(backbone: BackboneConfig, prior: PriorConfig, cached: Sequence[str]) -> list[str]:
    """Return the streams of `dataset.cached` that the cache holds: the prior's only where there is one.

    Raises:
        ValueError: If a stream changes during training (names the field that makes it so), or if features
            have to be computed in each step and the cache holds no frames.
    """
    streams = [name for name in cached if name != "prior" or prior.name != "none"]
    if "semantic" in streams and not backbone.frozen_features:
        trained = "freeze_connector" if backbone.freeze_image_encoder else "freeze_image_encoder"
        raise ValueError(
            f"dataset.cached holds 'semantic', but backbone.{trained}=false lets these features "
            "change in training. Set it to true, or cache the frames instead: "
            "dataset.cached=[frames,prior]."
        )
    if "prior" in streams and prior.noise != "fixed":
        raise ValueError(
            f"dataset.cached holds 'prior', but prior.noise={prior.noise} gives other features in each step. "
            "Set prior.noise=fixed, or dataset.cached=[frames] or [frames,semantic]."
        )
    if prior.clip == "history" and {"prior", "frames"} & set(streams):
        raise ValueError(
            "prior.clip=history reads several instants at once; a cache holds single ones. Set "
            "dataset.cache=none, or prior.clip=frame or views."
        )
    live = [name for name in ("semantic", "prior") if name not in streams]
    live = [name for name in live if name != "prior" or prior.name != "none"]
    if live and "frames" not in streams:
        raise ValueError(
            f"dataset.cached={list(cached)} leaves {' and '.join(live)} to be computed in each step, from "
            "frames that the cache does not hold. Add 'frames' to dataset.cached."
        )
    return streams


def streams_of(
    model: VegaModel,
    dataset: dict[str, str],
    cameras: Sequence[str],
    names: Sequence[str],
    stride: int = 1,
    instructions: Sequence[str] | None = None,
) -> list[Stream]:
    """Return the streams, accepted by `check_cacheable`, of one policy on one dataset.

    The key holds a hash of the model's frozen weights, `dataset` (its name and the fingerprint of its frames)
    and the cameras in the order of views. They hold every `stride`-th frame of each episode. `instructions`
    [n] are those of these frames, where the prior reads them (`reads_instructions`).
    """
    common = frames_stream(dataset, cameras, model.config.frame_size, model.config.resize, stride).key
    own = {name: _own_key(model, name) for name in names}
    if instructions is not None and "prior" in own:
        own["prior"]["instructions"] = hash_bytes(json.dumps(list(instructions)).encode())
    return [Stream(name, common | own[name]) for name in names]


def reads_instructions(prior: PriorConfig, names: Sequence[str]) -> bool:
    """Return whether features of these streams depend on the frames' instructions."""
    return "prior" in names and prior.name != "none" and prior.prompt == "instruction"


def frames_stream(
    dataset: dict[str, str], cameras: Sequence[str], frame_size: int, resize: str = "stretch", stride: int = 1
) -> Stream:
    """Return the stream of frames, which depends on no model; see `streams_of`."""
    key = {"format": FORMAT, "dataset": dataset, "cameras": list(cameras), "frame_size": frame_size}
    key |= {"resize": resize} if resize != "stretch" else {}
    return Stream("frames", key | ({"frame_stride": stride} if stride > 1 else {}))


def _own_key(model: VegaModel, name: str) -> dict[str, Any]:
    if name == "semantic":
        weights = fingerprint_weights(model.backbone.image_encoder.state_dict())
        return {"encoder": model.backbone.encoder_name, "weights": weights}
    if name == "prior":
        prior = resolve(model.config.prior)
        config = asdict(prior) | {"fingerprint": model.prior.fingerprint}
        config["layer"] = list(prior.layer) if isinstance(prior.layer, tuple) else prior.layer
        # the fingerprint says what was loaded, engines agree, and features are shuffled behind the cache
        left_out = ["path", "revision", "engine", "shuffle"]
        if prior.clip != "future":
            left_out += ["future_slots", "slot_pool", "prompt"]
        elif prior.slot_pool != "mean":
            left_out += ["slot_pool"]  # an attention reads what `concat` joins
        kept = {field: value for field, value in config.items() if field not in left_out}
        return {"prior": kept, "grid": list(model.backbone.grid)}
    return {}


def open_stream(root: Path, stream: Stream, rows: int, place: torch.device | None) -> Tensor:
    """Return the read-only values [n ...] of a built stream for n = `rows` frames.

    They are read to the device `place` now; None maps them into memory. CacheError if the folder is truncated
    or was built from other inputs.
    """
    folder = root / stream.folder
    advice = f"Delete {folder} to have it built again."
    manifest = read_json(folder / MANIFEST, "key", "shape")
    if manifest["key"] != stream.key:
        differing = [name for name in stream.key if manifest["key"].get(name) != stream.key[name]]
        raise CacheError(f"{folder} was built from other inputs: {', '.join(differing)} differ. {advice}")
    shape, dtype = [rows, *manifest["shape"]], TYPES[stream.name]
    count = int(torch.tensor(shape).prod())
    expected, found = count * dtype.itemsize, (folder / VALUES).stat().st_size
    if expected != found:
        raise CacheError(
            f"{folder / VALUES} is truncated or of another dataset: expected {expected} bytes for {rows} "
            f"frames, found {found}. {advice}"
        )
    values = torch.from_file(str(folder / VALUES), shared=False, size=count, dtype=dtype).reshape(shape)
    return values if place is None else values.to(place, copy=True)


def open_mean_frames(root: Path, stream: Stream) -> dict[str, Tensor]:
    """Return each camera's mean frame over the dataset of a stream, float32 [3 h w] in [0, 1]."""
    return read_tensors(root / stream.folder / MEAN_FRAMES)


def build_streams(
    root: Path,
    streams: Sequence[Stream],
    model: VegaModel,
    read: ClipReader,
    lengths: Sequence[int],
    *,
    shard: int = 0,
    shards: int = 1,
    instructions: Sequence[str] | None = None,
) -> None:
    """Build the missing streams, or the part `shard` of `shards`, after what an earlier call finished.

    `lengths` are the cached frames of each episode. Part k has the episodes k, k + `shards`, ...; the part
    that ends last completes the streams. A whole build waits for running parts and builds what they left. The
    model computes on its own device and is left in evaluation mode. `instructions` are as in `streams_of`.

    Raises:
        FolderInUseError: If another process builds this part, or a part of another division.
        DiskFullError: If the streams do not fit on the disk.
        OSError: If `root` is a file or cannot be written to; see `lock_folder`.
    """
    if not _missing(root, streams):
        return  # without a lock: a finished cache may be on a disk that cannot be written to
    model.eval()
    episodes, part = range(shard, len(lengths), shards), f"{shard}_of_{shards}"
    with ExitStack() as claims:
        with lock_folder(root, wait=True):
            read(())  # refuses a dataset without frames before anything is written
            drafts = _open_drafts(root, _missing(root, streams), model, lengths, instructions is not None)
            if shards == 1:
                for draft in drafts:
                    draft.wait_for_parts()
                _build_episodes(drafts, model, read, episodes, part, instructions)
                _complete(drafts)
                return
            for draft in drafts:
                claims.enter_context(draft.claim(part))
        _build_episodes(drafts, model, read, episodes, part, instructions)
    # The part's lock is free here: a whole build holds the root's lock while it waits for parts.
    with lock_folder(root, wait=True):
        _complete(drafts)


def _missing(root: Path, streams: Sequence[Stream]) -> list[Stream]:
    return [stream for stream in streams if not (root / stream.folder).exists()]


def _open_drafts(
    root: Path, streams: Sequence[Stream], model: VegaModel, lengths: Sequence[int], instructed: bool
) -> "list[_StreamDraft]":
    """Create or reopen the drafts of streams that fit on the disk."""
    if not streams:
        return []
    remove_partial(root)
    side, cameras = model.config.frame_size, streams[0].key["cameras"]
    black = {camera: torch.zeros(1, 3, side, side, dtype=torch.uint8) for camera in cameras}
    names, words = [stream.name for stream in streams], [""] if instructed else None
    row = _encode(model, black, names, words)  # of which only the shapes count
    drafts = [_StreamDraft(root, stream, row[stream.name][0], lengths) for stream in streams]
    needed = sum(draft.size - draft.allocated() for draft in drafts)
    check_space(root, needed, f"the cache of {sum(lengths)} frames")
    for draft in drafts:
        draft.create()
    return drafts


def _build_episodes(
    drafts: "Sequence[_StreamDraft]",
    model: VegaModel,
    read: ClipReader,
    episodes: Sequence[int],
    part: str,
    instructions: Sequence[str] | None,
) -> None:
    """Encode the episodes that are not finished, and record them."""
    if not drafts:
        return
    root, lengths = drafts[0].root, drafts[0].lengths
    finished = set.intersection(*(draft.reload() for draft in drafts))
    left = [episode for episode in episodes if episode not in finished]
    total, frames = (sum(lengths[episode] for episode in some) for some in (episodes, left))
    sizes = {draft.stream.name: draft.row.numel() * draft.row.element_size() for draft in drafts}
    logger.info(
        "Caching %d frames in %s (part %s; %d frames are done): %s; %.3g GB free.",
        *(frames, root, part.replace("_", " "), total - frames),
        ", ".join(f"{name} {frames * size / 1e9:.3g} GB" for name, size in sizes.items()),
        free_space(root) / 1e9,
    )
    batch = BATCH["cpu" if next(model.parameters()).device.type == "cpu" else "accelerator"]
    with ExitStack() as stack:
        for draft in drafts:
            stack.enter_context(draft.recording(part))
        bar = tqdm(total=total, initial=total - frames, desc="Caching " + ", ".join(sizes), unit="frame")
        stack.enter_context(bar)
        chosen = _batches(read, left, drafts[0], batch, instructions)
        for one, values in _encode_each(model, list(sizes), chosen):
            for draft in drafts:
                draft.write(one.row, values[draft.stream.name])
            bar.update(len(next(iter(values.values()))))
            if one.mean is not None:
                for draft in drafts:
                    draft.finish(one.episode, one.mean)


@dataclass(frozen=True)
class _Batch:
    """Consecutive instants of one episode that are encoded at once."""

    episode: int
    row: int  # of the first one in the cache
    instants: dict[str, Tensor]  # by camera, uint8 [b 3 h w]
    words: Sequence[str] | None  # instruction of each, where the prior reads them
    mean: MeanFrames | None  # of the whole episode, in its last batch


def _batches(
    read: ClipReader,
    episodes: Sequence[int],
    draft: "_StreamDraft",
    size: int,
    instructions: Sequence[str] | None,
) -> Iterator[_Batch]:
    """Yield the instants of episodes, at most `size` at once; CacheError if frames are missing."""
    clips = iter(read(episodes) if episodes else ())
    for episode in episodes:
        row, end = draft.starts[episode], draft.starts[episode] + draft.lengths[episode]
        mean = MeanFrames()
        while row < end and (clip := next(clips, None)) is not None:
            mean.add(clip)
            for start in range(0, len(next(iter(clip.values()))), size):
                instants = {camera: stretch[start : start + size] for camera, stretch in clip.items()}
                count = len(next(iter(instants.values())))
                words = None if instructions is None else instructions[row : row + count]
                yield _Batch(episode, row, instants, words, mean if row + count == end else None)
                row += count
        if row != end:
            raise CacheError(
                f"episode {episode}: expected {draft.lengths[episode]} frames, {end - row} missing."
            )


def _encode_each(
    model: VegaModel, names: Sequence[str], batches: Iterator[_Batch]
) -> Iterator[tuple[_Batch, dict[str, Tensor]]]:
    """Yield each batch with its values by stream, in order.

    On a CPU each core encodes a batch of its own: the layers are too small to be divided among cores.
    """

    def encode(one: _Batch) -> tuple[_Batch, dict[str, Tensor]]:
        return one, _encode(model, one.instants, names, one.words)

    cores = torch.get_num_threads() if next(model.parameters()).device.type == "cpu" else 1
    if cores == 1:
        yield from map(encode, batches)
        return
    try:
        jobs = (partial(encode, one) for one in batches)
        yield from in_parallel(jobs, cores, 2 * cores, partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(cores)


def _complete(drafts: "Sequence[_StreamDraft]") -> None:
    for draft in drafts:
        draft.complete()


class _StreamDraft:
    """An unfinished stream, which several processes fill.

    `notes/<part>/` holds the lock of a running part, and of its finished episodes the numbers and the sum of
    the frames by camera.
    """

    def __init__(self, root: Path, stream: Stream, row: Tensor, lengths: Sequence[int]) -> None:
        self.root, self.stream, self.row, self.lengths = root, stream, row, lengths
        self.starts = list(accumulate(lengths, initial=0))
        self.size = self.starts[-1] * row.numel() * row.element_size()
        self._folder = root / f"{stream.folder}.building"
        self._values, self._notes = self._folder / VALUES, self._folder / "notes"
        self._recorded: set[int] = set()  # by any part
        self._mine: dict[str, Tensor] = {}  # record of this part
        self._last = time.monotonic()

    def allocated(self) -> int:
        """Return the bytes on the disk; the file is sparse."""
        return min(self.size, self._values.stat().st_blocks * 512) if self._values.exists() else 0

    def create(self) -> None:
        """Make the folder and the file of all rows, unless they are there."""
        self._notes.mkdir(parents=True, exist_ok=True)
        with self._values.open("ab") as file:
            file.truncate(self.size)

    def wait_for_parts(self) -> None:
        """Wait until no other process builds a part."""
        for note in self._notes.iterdir():
            with lock_folder(note, wait=True):
                pass

    @contextmanager
    def claim(self, part: str) -> Iterator[None]:
        """Hold the lock of a part; FolderInUseError if another process builds it, or of another division."""
        division = part.partition("_of_")[2]
        for note in self._notes.iterdir():
            if note.name.partition("_of_")[2] != division:
                with lock_folder(note):
                    pass
        with lock_folder(self._notes / part):
            yield

    def reload(self) -> set[int]:
        """Return the episodes that all parts together have finished."""
        done = [record["episodes"].tolist() for record in self._records()]
        if (self._folder / MANIFEST).exists():
            done = [range(len(self.lengths))]
        self._recorded = {episode for part in done for episode in part}
        return self._recorded

    def _records(self) -> list[dict[str, Tensor]]:
        return [read_tensors(file) for file in sorted(self._notes.glob("*/*.safetensors"))]

    @contextmanager
    def recording(self, part: str) -> Iterator[None]:
        """Open the file of rows; the finished episodes are recorded at the end too, also after an error."""
        self._note = self._notes / part / "finished.safetensors"
        self._mine = read_tensors(self._note) if self._note.exists() else {"episodes": torch.empty(0).long()}
        with self._values.open("r+b") as self._file:
            try:
                yield
            finally:
                self._record()

    def write(self, row: int, values: Tensor) -> None:
        """Write rows [b ...] of the stream's type from `row` on."""
        content = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
        offset = row * self.row.numel() * self.row.element_size()
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written

    def finish(self, episode: int, mean: "MeanFrames") -> None:
        """Note an episode whose rows are written and the sum of its frames."""
        if episode not in self._recorded:
            self._recorded.add(episode)
            self._mine["episodes"] = torch.cat([self._mine["episodes"], torch.tensor([episode])])
            for camera, total in mean.sums.items():
                self._mine[camera] = self._mine.get(camera, 0) + total
        if time.monotonic() - self._last > RECORD_EVERY:
            self._record()

    def _record(self) -> None:
        os.fdatasync(self._file.fileno())  # what is recorded is on the disk
        write_tensors(self._note, self._mine)
        self._last = time.monotonic()

    def complete(self) -> None:
        """Give the stream its final name if all episodes are finished.

        The manifest says so in the draft too: a kill between the next steps loses nothing.
        """
        if not self._folder.exists() or len(self.reload()) < len(self.lengths):
            return
        if not (self._folder / MANIFEST).exists():
            records = self._records()
            totals = {
                camera: torch.stack([record[camera] for record in records if camera in record]).sum(0)
                for camera in self.stream.key["cameras"]
            }
            mean = {camera: (total / (255 * self.starts[-1])).float() for camera, total in totals.items()}
            write_tensors(self._folder / MEAN_FRAMES, mean)
            manifest = {"key": self.stream.key, "shape": list(self.row.shape)}
            manifest["dtype"] = str(TYPES[self.stream.name])
            write_text(self._folder / MANIFEST, json.dumps(manifest, indent=2))
        shutil.rmtree(self._notes)
        complete_folder(self._folder, self.root / self.stream.folder)


class FramesDraft:
    """An unfinished cache of frames, whose rows several processes write at any place.

    Attributes:
        values: File of all rows [n v 3 h w] uint8, in its full size.
        notes: Folder in which the writers record what they have written; it is deleted at the end.
        sums: Sum of all frames by camera [3 h w], to be set before the context ends.
    """

    def __init__(self, folder: Path) -> None:
        self.values, self.notes = folder / VALUES, folder / "notes"
        self.sums: Mapping[str, Any] = {}


@contextmanager
def draft_frames(root: Path, stream: Stream, rows: int) -> Iterator[FramesDraft]:
    """Yield a cache of n = `rows` frames to be filled; without an error in the context it is complete then.

    After an interruption the same call yields the draft as it was left.

    Raises:
        FolderInUseError: If another process fills it.
        DiskFullError: If it does not fit on the disk.
    """
    cameras, size = stream.key["cameras"], stream.key["frame_size"]
    shape = [len(cameras), 3, size, size]
    folder = root / f"{stream.folder}.draft"
    with open_run(folder, {"key": stream.key, "rows": rows}, option="cache_root"):
        draft = FramesDraft(folder)
        draft.notes.mkdir(exist_ok=True)
        with draft.values.open("ab") as file:
            file.truncate(rows * prod(shape))
        written = draft.values.stat().st_blocks * 512  # the file is sparse
        check_space(root, rows * prod(shape) - written, f"the cache of {rows} frames")
        yield draft
        mean = {name: torch.as_tensor(total) / (255 * rows) for name, total in draft.sums.items()}
        tensors = {name: mean[name].float().contiguous() for name in cameras}
        write_tensors(folder / MEAN_FRAMES, tensors)
        manifest = {"key": stream.key, "shape": shape, "dtype": str(TYPES[stream.name])}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        complete_folder(folder, root / stream.folder)  # still locked: a second start must not resume it
    shutil.rmtree(root / stream.folder / draft.notes.name)


def cached_clips(
    frames: Tensor, cameras: Sequence[str], episodes: Iterable[Tensor], length: int = 128
) -> Clips:
    """Yield rows [m] of cached frames [n v 3 h w], those of each episode, `length` time steps at once."""
    for rows in (some for episode in episodes for some in episode.split(length)):
        yield {camera: frames[rows, view] for view, camera in enumerate(cameras)}


def pick_instants(clips: Clips, kept: Tensor) -> Clips:
    """Yield of all frames of a dataset, in order, those of the rows where `kept` [n] is true."""
    start = 0
    for clip in clips:
        length = len(next(iter(clip.values())))
        chosen = kept[start : start + length]
        start += length
        if chosen.any():
            yield {camera: frames[chosen] for camera, frames in clip.items()}


@torch.no_grad()
def _encode(
    model: VegaModel,
    instants: dict[str, Tensor],
    names: Sequence[str],
    instructions: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the values of a batch of time steps by stream, on the CPU in the stream's type."""
    side = model.config.frame_size
    if list(names) == ["frames"] and all(clip.shape[-2:] == (side, side) for clip in instants.values()):
        return {"frames": torch.stack(list(instants.values()), dim=1)}  # the same bytes as below
    device = next(model.parameters()).device
    views = {camera: clip.to(device).float() / 255 for camera, clip in instants.items()}
    frames = stack_views(views, side, model.config.resize)  # [b v 1 3 h w]
    values = {}
    if "frames" in names:
        values["frames"] = (frames[:, :, -1] * 255).round()
    if "semantic" in names:
        values["semantic"] = model.backbone.encode(frames[:, :, -1])
    if "prior" in names:
        words = {} if instructions is None else {"instruction": list(instructions)}
        values["prior"] = model.prior(frames, **words)
    return {name: value.to(TYPES[name]).cpu() for name, value in values.items()}
