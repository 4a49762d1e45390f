"""Videos of evaluated episodes, rendered from their stored simulator states."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.episodes import Episode, EpisodeResult, Trajectories
from vega_policy.run_dir import write_bytes

FOLDER = "videos"
FRAMES_PER_SECOND = 20
_STILLS = 6


@dataclass(frozen=True)
class Video:
    """Files of a rendered episode."""

    result: EpisodeResult
    video: Path  # h264, mp4
    still: Path  # PNG, six moments of the episode side by side


def choose_episodes(results: Sequence[EpisodeResult], count: int) -> list[EpisodeResult]:
    """Return the first `count` successes and the first `count` failures, by episode index, then by task."""
    ordered = sorted(results, key=lambda result: (result.index, result.task_index))
    successes, failures = ([r for r in ordered if r.success is kind][:count] for kind in (True, False))
    return successes + failures


def render_videos(
    results: Sequence[EpisodeResult],
    episodes: Sequence[Episode],
    trajectories: Trajectories,
    pool: WorkerPool,
    folder: Path,
    *,
    frame_size: int,
) -> list[Video]:
    """Render the chosen results into `folder/videos`, unless they are there, and return their files.

    Args:
        results: The episodes to render.
        episodes: All planned episodes.
        trajectories: Their simulator states; episodes without are left out.
        pool: Workers.
        folder: Folder of the evaluation.
        frame_size: Height and width in pixels.
    """
    specs = {episode.key: episode.spec() for episode in episodes}
    videos = [_video(result, folder / FOLDER) for result in results]
    states = [None if video.still.is_file() else trajectories.load(video.result) for video in videos]
    missing = [(video, kept) for video, kept in zip(videos, states, strict=True) if kept is not None]
    jobs = [(specs[video.result.key], kept) for video, kept in missing]
    for (video, _), frames in zip(missing, pool.render(jobs, frame_size=frame_size), strict=True):
        # The still comes last: where it exists, the video is complete.
        write_bytes(video.video, encode_video(frames))
        write_bytes(video.still, imageio.imwrite("<bytes>", film_strip(frames), extension=".png"))
    return [video for video in videos if video.still.is_file()]


def encode_video(frames: np.ndarray) -> bytes:
    """Return frames uint8 [t h w 3] as an h264 mp4; odd sizes lose their last row or column (yuv420p)."""
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    buffer = io.BytesIO()
    with imageio.imopen(buffer, "w", extension=".mp4", plugin="pyav") as file:
        file.write(frames[:, :height, :width], codec="libx264", fps=FRAMES_PER_SECOND)
    return buffer.getvalue()


def film_strip(frames: np.ndarray) -> np.ndarray:
    """Return six moments of frames [t h w 3], first and last included, side by side: [h 6w 3]."""
    moments = np.linspace(0, len(frames) - 1, _STILLS).round().astype(int)
    return np.concatenate(list(frames[moments]), axis=1)


def _video(result: EpisodeResult, folder: Path) -> Video:
    outcome = "success" if result.success else "failure"
    stem = f"{outcome}_{result.task}_{result.index:03d}"
    return Video(result, folder / f"{stem}.mp4", folder / f"{stem}.png")
