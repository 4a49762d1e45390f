"""On-disk cache of what training never changes: frames at the policy's size and features of frozen encoders.

One folder a stream, named by a hash over all that determines its values; it is complete or absent:

    <cache_root>/<stream>-<hash>/manifest.json   the key in full, shape and type
                                 values.bin      one row a dataset frame, memory-mapped
                                 mean_frames.safetensors

This module imports no LeRobot.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vega_policy.data.dataset_files import hash_bytes
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.model.observation import stack_views
from vega_policy.model.vega import VegaModel
from vega_policy.priors import resolve
from vega_policy.priors.base import fingerprint_weights
from vega_policy.run_dir import (
    atomic_folder,
    check_space,
    complete_folder,
    lock_folder,
    open_run,
    remove_partial,
)

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, VALUES, MEAN_FRAMES = "manifest.json", "values.bin", "mean_frames.safetensors"
BATCH = {"cpu": 8, "accelerator": 64}
"""Time steps encoded at once. On a CPU, 32 took 1.6 times as long for each (measured at 128 pixels)."""
TYPES = {"frames": torch.uint8, "semantic": torch.bfloat16, "prior": torch.bfloat16}

Clips = Iterable[dict[str, Tensor]]
"""All frames of a dataset, in order, some consecutive ones at a time: by camera, uint8 [t 3 h w]."""


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
    """Return the streams of `dataset.cached` that the cache must hold: the prior's only where there is one.

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
    model: VegaModel, dataset: dict[str, str], cameras: Sequence[str], names: Sequence[str], stride: int = 1
) -> list[Stream]:
    """Return the streams, accepted by `check_cacheable`, of one policy on one dataset.

    The key holds a hash of the model's frozen weights, `dataset` (its name and the fingerprint of its frames)
    and the cameras in the order of views. They hold every `stride`-th frame of each episode.
    """
    common = frames_stream(dataset, cameras, model.config.frame_size, model.config.resize, stride).key
    return [Stream(name, common | _own_key(model, name)) for name in names]


def frames_stream(
    dataset: dict[str, str],
    cameras: Sequence[str],
    frame_size: int,
    resize: str = "stretch",
    stride: int = 1,
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
        config = asdict(resolve(model.config.prior)) | {"fingerprint": model.prior.fingerprint}
        places = ("path", "revision", "engine")  # the fingerprint says what was loaded, and engines agree
        kept = {field: value for field, value in config.items() if field not in places}
        return {"prior": kept, "grid": list(model.backbone.grid)}
    return {}


def open_stream(root: Path, stream: Stream, rows: int, place: torch.device | None) -> Tensor:
    """Return the read-only values [n ...] of a built stream for n = `rows` frames.

    They are read to the device `place` now; None maps them into memory.

    Raises:
        CacheError: If the folder is truncated or was built from other inputs; says which folder to delete.
    """
    folder = root / stream.folder
    advice = f"Delete {folder} to have it built again."
    manifest = json.loads((folder / MANIFEST).read_text())
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
    return load_file(root / stream.folder / MEAN_FRAMES)


def build_streams(root: Path, streams: Sequence[Stream], model: VegaModel, clips: Clips, frames: int) -> None:
    """Build the streams that are missing, in one pass over `clips`, which are read only then.

    Processes that share `root` take turns; the later ones find the work done. The model computes on its own
    device and is left in evaluation mode. `frames` is the dataset's number of frames.

    Raises:
        DiskFullError: If the streams do not fit on the disk.
        OSError: If `root` is a file or cannot be written to; see `lock_folder`.
    """
    if not _missing(root, streams):
        return  # without a lock: a finished cache may be on a disk that cannot be written to
    with lock_folder(root, wait=True), ExitStack() as stack:
        missing = _missing(root, streams)
        if not missing:
            return
        remove_partial(root)
        model.eval()
        batch = BATCH["cpu" if next(model.parameters()).device.type == "cpu" else "accelerator"]
        writers = [stack.enter_context(_Writer(root, stream)) for stream in missing]
        mean = MeanFrames()
        bar = stack.enter_context(
            tqdm(total=frames, desc="Caching " + ", ".join(s.name for s in missing), unit="frame")
        )
        for clip in clips:
            mean.add(clip)
            for start in range(0, len(next(iter(clip.values()))), batch):
                instants = {camera: stretch[start : start + batch] for camera, stretch in clip.items()}
                values = _encode(model, instants, [stream.name for stream in missing])
                if bar.n == 0:
                    row = sum(value[0].numel() * value.element_size() for value in values.values())
                    check_space(root, row * frames, f"the cache of {frames} frames")
                    logger.info("Caching %d frames: %.2f GB in %s.", frames, row * frames / 1e9, root)
                for writer in writers:
                    writer.append(values[writer.stream.name])
                bar.update(len(next(iter(instants.values()))))
        for writer in writers:
            save_file(mean.result(), writer.folder / MEAN_FRAMES)


def _missing(root: Path, streams: Sequence[Stream]) -> list[Stream]:
    return [stream for stream in streams if not (root / stream.folder).exists()]


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
    with open_run(folder, {"key": stream.key, "rows": rows}):
        draft = FramesDraft(folder)
        draft.notes.mkdir(exist_ok=True)
        with draft.values.open("ab") as file:
            file.truncate(rows * prod(shape))
        written = draft.values.stat().st_blocks * 512  # the file is sparse
        check_space(root, rows * prod(shape) - written, f"the cache of {rows} frames")
        yield draft
        mean = {name: torch.as_tensor(total) / (255 * rows) for name, total in draft.sums.items()}
        save_file({name: mean[name].float().contiguous() for name in cameras}, folder / MEAN_FRAMES)
        manifest = {"key": stream.key, "shape": shape, "dtype": str(TYPES[stream.name])}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    complete_folder(folder, root / stream.folder)
    shutil.rmtree(root / stream.folder / draft.notes.name)


def cached_clips(frames: Tensor, cameras: Sequence[str], length: int = 128) -> Clips:
    """Yield cached frames [n v 3 h w] as `build_streams` takes them, `length` time steps at once."""
    for rows in frames.split(length):
        yield {camera: rows[:, view] for view, camera in enumerate(cameras)}


def pick_instants(clips: Clips, kept: Tensor) -> Clips:
    """Yield of all frames of a dataset, in order, those of the rows where `kept` [n] is true."""
    start = 0
    for clip in clips:
        length = len(next(iter(clip.values())))
        chosen = kept[start : start + length]
        start += length
        if chosen.any():
            yield {camera: frames[chosen] for camera, frames in clip.items()}


class MeanFrames:
    """Running mean of each camera's frames."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, frames: dict[str, Tensor]) -> None:
        """Add frames by camera, uint8 [t 3 h w]."""
        for camera, clip in frames.items():
            total = clip.sum(dim=0, dtype=torch.int32).long()  # a seventh of int64's time, and exact
            self._sums[camera] = self._sums[camera] + total if camera in self._sums else total
        self._count += len(next(iter(frames.values())))

    def result(self) -> dict[str, Tensor]:
        """Return each camera's mean frame, float32 [3 h w] in [0, 1]."""
        return {camera: (total / (255 * self._count)).float() for camera, total in self._sums.items()}


class _Writer:
    """Appends rows to one stream's folder, which appears when the context ends without an error."""

    def __init__(self, root: Path, stream: Stream) -> None:
        self.stream = stream
        self._shape: list[int] | None = None
        self._stack = ExitStack()
        self._target = root / stream.folder

    def __enter__(self) -> "_Writer":
        self.folder = self._stack.enter_context(atomic_folder(self._target))
        self._file = self._stack.enter_context((self.folder / VALUES).open("wb"))
        return self

    def append(self, values: Tensor) -> None:
        """Append rows [b ...] of the stream's type."""
        self._shape = list(values.shape[1:])
        self._file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy())

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            manifest = {"key": self.stream.key, "shape": self._shape, "dtype": str(TYPES[self.stream.name])}
            (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        self._stack.__exit__(*error)


@torch.no_grad()
def _encode(model: VegaModel, instants: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
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
        values["prior"] = model.prior(frames)
    return {name: value.to(TYPES[name]).cpu() for name, value in values.items()}
