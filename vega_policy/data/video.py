"""Reading a dataset's frames in order: each video from front to back, several stretches of it at once.

Nearly all the time goes into libav's decoding (0.8 ms for a lossless frame of 128 pixels on one core), which
releases Python's lock: threads decode as many stretches at once as there are cores.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from torch import Tensor

from vega_policy.data.dataset import DatasetError
from vega_policy.data.feature_cache import MeanFrames
from vega_policy.provenance import available_cores

STRETCH = 128  # time steps read at once, a multiple of `feature_cache.BATCH`
HELD_BYTES = 2**30  # that stretches which are read ahead hold together, at most
SAMPLED_EPISODES = 32  # for the mean frames where no cache is built

Clips = dict[str, Tensor]
"""Consecutive frames by camera, uint8 [t 3 h w]."""


def frames_in_order(
    dataset: LeRobotDataset, cameras: list[str], backend: str, episodes: Sequence[int] | None = None
) -> Iterator[Clips]:
    """Yield all frames of episodes (None: all), each decoded once, up to `STRETCH` of one episode at a time.

    The backend `pyav` decodes on all cores; `torchcodec` and stored images are read one stretch at a time.

    Raises:
        DatasetError: If frames of a video are damaged or missing; names the file.
    """
    chosen = range(dataset.num_episodes) if episodes is None else episodes
    jobs = (job for episode in chosen for job in _stretches(dataset, cameras, backend, episode))
    videos = set(cameras) <= set(dataset.meta.video_keys)
    workers = available_cores() if videos and backend == "pyav" else 1
    size = STRETCH * sum(prod(dataset.meta.features[camera]["shape"]) for camera in cameras)
    return _in_parallel(jobs, workers, ahead=max(1, min(2 * workers, HELD_BYTES // size)))


def sampled_mean_frames(dataset: LeRobotDataset, cameras: list[str], backend: str) -> dict[str, Tensor]:
    """Return each camera's mean frame over at most 32 evenly spaced episodes, float32 [3 h w] in [0, 1]."""
    count = min(SAMPLED_EPISODES, dataset.num_episodes)
    episodes = np.linspace(0, dataset.num_episodes - 1, count).round().astype(int).tolist()
    mean = MeanFrames()
    for clips in frames_in_order(dataset, cameras, backend, episodes):
        mean.add(clips)
    return mean.result()


def _in_parallel(jobs: Iterator[Callable[[], Clips]], workers: int, ahead: int) -> Iterator[Clips]:
    """Yield results in the jobs' order, at most `ahead` of them started in advance."""
    begun: deque[Future[Clips]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decoding")
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
    dataset: LeRobotDataset, cameras: list[str], backend: str, episode: int
) -> Iterator[Callable[[], Clips]]:
    """Yield a function that reads each stretch of an episode."""
    meta = dataset.meta
    assert meta.episodes is not None  # a dataset that opened has them
    row = meta.episodes[episode]
    for first in range(0, row["length"], STRETCH):
        length = min(STRETCH, row["length"] - first)
        read: dict[str, Callable[[], Tensor]] = {}
        for camera in cameras:
            if camera not in meta.video_keys:
                start = row["dataset_from_index"] + first
                read[camera] = partial(_read_images, dataset, camera, range(start, start + length))
                continue
            path = dataset.root / meta.get_video_file_path(episode, camera)
            seconds = row[f"videos/{camera}/from_timestamp"] + first / meta.fps
            decode = read_video if backend == "pyav" else partial(_decode_with_lerobot, backend)
            read[camera] = partial(decode, path, seconds, meta.fps, length)
        yield lambda read=read: {camera: clip() for camera, clip in read.items()}


def _read_images(dataset: LeRobotDataset, camera: str, rows: range) -> Tensor:
    frames = dataset.hf_dataset.select_columns([camera])[rows.start : rows.stop][camera]
    return (torch.stack(list(frames)) * 255).round().to(torch.uint8)


def _decode_with_lerobot(backend: str, path: Path, start: float, fps: int, length: int) -> Tensor:
    times = [start + frame / fps for frame in range(length)]
    # LeRobot compares times in float32: in a video of hours its usual tolerance of 1e-4 s is below rounding.
    return decode_video_frames(path, times, 0.25 / fps, backend, True)


def read_video(path: Path, start: float, fps: float, length: int) -> Tensor:
    """Decode t = `length` frames of a video at `start` (s), `start` + 1 / fps, ... on one core.

    Returns:
        Frames uint8 [t 3 h w], the bytes that LeRobot's own `pyav` decoder gives.

    Raises:
        DatasetError: If frames are damaged, or none lies within a quarter of a frame of a time.
    """
    where = f"{path}, {length} frames from {start:.3f} s on"
    advice = "The video is damaged or of another dataset; collect or download it again."
    try:
        with av.open(str(path)) as container:
            frames, distances = _decode(container, start, fps, length)
    except av.FFmpegError as error:
        raise DatasetError(f"{where}: {error.strerror} in decoding. {advice}") from error
    missing = np.count_nonzero(distances > 0.25)
    if missing:
        raise DatasetError(f"{where}: {missing} are damaged or missing. {advice}")
    return torch.from_numpy(frames)


def _decode(container: InputContainer, start: float, fps: float, length: int) -> tuple[Any, Any]:
    """Return the frame nearest to each time, uint8 [t 3 h w], and its distance in frames [t]."""
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
