"""Reading a dataset's frames in order: each video from front to back, several stretches of it at once.

Nearly all the time goes into libav's decoding (0.8 ms for a lossless frame of 128 pixels on one core), which
releases Python's lock: threads decode as many stretches at once as there are cores. Pre-training reads no
videos and must run without libav, which is imported where it decodes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vega_policy.data.dataset import FrameTable, LocalDataset
from vega_policy.data.dataset_files import DatasetError, list_files
from vega_policy.run_dir import available_cores

if TYPE_CHECKING:
    from av.container import InputContainer

STRETCH = 128  # time steps read at once, a multiple of `feature_cache.BATCH`
HELD_BYTES = 2**30  # that stretches which are read ahead hold together, at most
SAMPLED_EPISODES = 32  # for the mean frames where no cache is built

Clips = dict[str, Tensor]
"""Consecutive frames by camera, uint8 [t 3 h w]."""


def frames_in_order(
    dataset: LocalDataset, cameras: list[str], backend: str, episodes: Sequence[int] | None = None
) -> Iterator[Clips]:
    """Yield all frames of episodes (None: all), each decoded once, up to `STRETCH` of one episode at a time.

    The backend `pyav` decodes on all cores; `torchcodec` and stored images are read one stretch at a time.

    Raises:
        DatasetError: If frames of a video are damaged or missing; names the file.
    """
    chosen = range(dataset.num_episodes) if episodes is None else episodes
    jobs = (job for episode in chosen for job in _stretches(dataset, cameras, backend, episode))
    videos = all(dataset.is_video(camera) for camera in cameras)
    workers = available_cores() if videos and backend == "pyav" else 1
    size = STRETCH * sum(prod(dataset.features[camera]["shape"]) for camera in cameras)
    return in_parallel(jobs, workers, ahead=max(1, min(2 * workers, HELD_BYTES // size)))


def sampled_mean_frames(dataset: LocalDataset, cameras: list[str], backend: str) -> dict[str, Tensor]:
    """Return each camera's mean frame over at most 32 evenly spaced episodes, float32 [3 h w] in [0, 1]."""
    count = min(SAMPLED_EPISODES, dataset.num_episodes)
    episodes = np.linspace(0, dataset.num_episodes - 1, count).round().astype(int).tolist()
    mean = MeanFrames()
    for clips in frames_in_order(dataset, cameras, backend, episodes):
        mean.add(clips)
    return mean.result()


class MeanFrames:
    """Running mean of each camera's frames; `sums` are those of the frames by camera, int64 [3 h w]."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, frames: dict[str, Tensor]) -> None:
        """Add frames by camera, uint8 [t 3 h w]."""
        for camera, clip in frames.items():
            total = clip.sum(dim=0, dtype=torch.int32).long()  # a seventh of int64's time, and exact
            self.sums[camera] = self.sums[camera] + total if camera in self.sums else total
        self._count += len(next(iter(frames.values())))

    def result(self) -> dict[str, Tensor]:
        """Return each camera's mean frame, float32 [3 h w] in [0, 1]."""
        return {camera: (total / (255 * self._count)).float() for camera, total in self.sums.items()}


def in_parallel[T](
    jobs: Iterator[Callable[[], T]], workers: int, ahead: int, start: Callable[[], None] | None = None
) -> Iterator[T]:
    """Yield results in the jobs' order, at most `ahead` of them started in advance, in `workers` threads.

    Each thread calls `start` once before its first job.
    """
    begun: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="in_parallel", initializer=start)
    try:
        for job in jobs:
            begun.append(pool.submit(job))
            if len(begun) >= ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:  # also where the reader stops early
        pool.shutdown(cancel_futures=True)


def _stretches(
    dataset: LocalDataset, cameras: list[str], backend: str, episode: int
) -> Iterator[Callable[[], Clips]]:
    """Yield a function that reads each stretch of an episode."""
    length = int(dataset.episodes["length"].iloc[episode])
    reader = FrameReader(dataset, cameras, backend)
    for first in range(0, length, STRETCH):
        yield partial(reader.read, episode, first, min(STRETCH, length - first))


class FrameReader:
    """Reads consecutive frames of one episode, from videos or stored images.

    Frame k of an episode is the one nearest to k / fps after its beginning, at most a quarter of a frame
    away.
    """

    def __init__(self, dataset: LocalDataset, cameras: list[str], backend: str) -> None:
        self._dataset, self._cameras = dataset, cameras
        self._decode = read_video if backend == "pyav" else partial(_decode_with_lerobot, backend)
        self._images = _open_images(dataset, [camera for camera in cameras if not dataset.is_video(camera)])

    def read(self, episode: int, first: int, length: int) -> Clips:
        """Return frames `first` to `first + length` of the episode at this position in the dataset.

        Raises:
            DatasetError: If frames of a video are damaged or missing; names the file.
        """
        clips, fps = {}, self._dataset.fps
        for camera in self._cameras:
            if self._dataset.is_video(camera):
                path, start = self._dataset.video_start(camera, episode)
                clips[camera] = self._decode(path, start + first / fps, fps, length)
            else:
                row = int(self._dataset.episodes["dataset_from_index"].iloc[episode]) + first
                stored = self._images[row : row + length][self._dataset.stored_names[camera]]
                frames = np.stack([np.asarray(image.convert("RGB")) for image in stored])
                clips[camera] = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        return clips


def _open_images(dataset: LocalDataset, cameras: list[str]) -> Any:
    """Return the rows of images that the Parquet files of a dataset hold, None for no cameras."""
    if not cameras:
        return None
    import datasets

    names = [dataset.stored_names[camera] for camera in cameras]
    return datasets.Dataset.from_parquet(
        [str(path) for path in list_files(dataset.root / "data", ".parquet")],
        columns=names,
        features=datasets.Features({name: datasets.Image() for name in names}),
    )


class FrameRows(Dataset):
    """Frames by row of a table: `row`, and by camera uint8 [3 h w].

    With a history of t frames they are [t 3 h w], the row's own last; the first of the episode is repeated.
    """

    def __init__(
        self, dataset: LocalDataset, table: FrameTable, cameras: list[str], backend: str, history: int = 0
    ) -> None:
        self._reader, self._history = FrameReader(dataset, cameras, backend), history
        first = torch.cat([torch.zeros(1, dtype=torch.int64), table.episode_end.unique()[:-1]])
        self._position = torch.searchsorted(first, torch.arange(len(table)), right=True) - 1
        self._first = first

    def __len__(self) -> int:
        return len(self._position)

    def __getitem__(self, row: int) -> dict[str, Any]:
        position = int(self._position[row])
        frame = row - int(self._first[position])
        begin = max(0, frame - self._history + 1) if self._history else frame
        clips = self._reader.read(position, begin, frame - begin + 1)
        if not self._history:
            return {"row": row, **{camera: clip[0] for camera, clip in clips.items()}}
        lacking = self._history - (frame - begin + 1)
        padded = {camera: torch.cat([clip[:1]] * lacking + [clip]) for camera, clip in clips.items()}
        return {"row": row, **padded}


def _decode_with_lerobot(backend: str, path: Path, start: float, fps: float, length: int) -> Tensor:
    from lerobot.datasets.video_utils import decode_video_frames

    times = [start + frame / fps for frame in range(length)]
    # LeRobot compares times in float32: in a video of hours its usual tolerance of 1e-4 s is below rounding.
    return decode_video_frames(path, times, 0.25 / fps, backend, True)


def read_video(path: Path, start: float, fps: float, length: int) -> Tensor:
    """Decode t = `length` frames of a video at `start` (s), `start` + 1 / fps, ... on one core.

    Returns uint8 [t 3 h w], the bytes that LeRobot's own `pyav` decoder gives.

    Raises:
        DatasetError: If frames are damaged, or none lies within a quarter of a frame of a time.
    """
    import av

    where = f"{path}, {length} frames from {start:.3f} s on"
    advice = "The video is damaged or of another dataset; collect or download it again."
    try:
        with av.open(str(path)) as container:
            frames, distances = _decode(container, start, fps, length)
    except av.FFmpegError as error:
        raise DatasetError(f"{where}: {error.strerror} in decoding. {advice}") from error
    missing = np.count_nonzero(distances > 0.25)
    if missing:
        raise DatasetError(f"{where}: {missing} are damaged or missing at {fps:g} frames a second. {advice}")
    return torch.from_numpy(frames)


def _decode(container: "InputContainer", start: float, fps: float, length: int) -> tuple[Any, Any]:
    """Return the frame nearest to each time, uint8 [t 3 h w], and its distance in frames [t]."""
    from av.video.reformatter import VideoReformatter

    stream = container.streams.video[0]
    stream.thread_type, stream.thread_count = "NONE", 1  # the other cores decode other stretches
    assert stream.time_base is not None  # a stream of an opened file has one
    container.seek(round(start / stream.time_base) - 1, stream=stream)  # to the keyframe before
    reformatter = VideoReformatter()
    frames, distances = np.empty((length, 3, stream.height, stream.width), np.uint8), np.full(length, inf)
    for frame in container.decode(stream):
        if frame.pts is None or frame.is_corrupt:
            continue
        place = (float(frame.pts * stream.time_base) - start) * fps
        index = round(place)
        if 0 <= index < length and abs(place - index) < distances[index]:
            rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()  # [h w 3]
            frames[index], distances[index] = rgb.transpose(2, 0, 1), abs(place - index)
        if place > length - 1.25:
            break
    return frames, distances
