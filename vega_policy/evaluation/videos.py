"""Films of the first successes and failures, rendered afterwards from the stored simulator states."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from vega_policy.evaluation.episodes import Episode, EpisodeResult
from vega_policy.evaluation.pool import WorkerPool
from vega_policy.evaluation.run_folder import Trajectories, write_atomically

FOLDER = "videos"
FRAMES_PER_SECOND = 20
_STILLS = 6


@dataclass(frozen=True)
class Film:
    """A filmed episode.

    Attributes:
        result: The episode.
        video: h264 file.
        still: PNG file with six moments of the episode side by side.
    """

    result: EpisodeResult
    video: Path
    still: Path


def choose(results: Sequence[EpisodeResult], count: int) -> list[EpisodeResult]:
    """Return the first `count` successes and the first `count` failures, by episode index, then by task."""
    ordered = sorted(results, key=lambda result: (result.index, result.task_index))
    chosen = [[r for r in ordered if r.success is success][:count] for success in (True, False)]
    return chosen[0] + chosen[1]


def film(
    results: Sequence[EpisodeResult],
    episodes: Sequence[Episode],
    trajectories: Trajectories,
    pool: WorkerPool,
    folder: Path,
    *,
    frame_size: int,
) -> list[Film]:
    """Render episodes from their stored states; episodes filmed before are not rendered again.

    Args:
        results: The episodes to film.
        episodes: All planned episodes.
        trajectories: Their simulator states.
        pool: Workers that can build the environments.
        folder: Folder of the evaluation; films lie in its folder `videos`.
        frame_size: Height and width of the pictures in pixels.
    """
    films = [_named(result, folder / FOLDER) for result in results]
    orders = {episode.key: episode.order() for episode in episodes}
    states = {f.result.key: trajectories.load(f.result) for f in films if not _finished(f)}
    waiting = [f for f in films if states.get(f.result.key) is not None]
    jobs = [(orders[f.result.key], stored) for f in waiting if (stored := states[f.result.key]) is not None]
    for made, frames in zip(waiting, pool.film(jobs, frame_size=frame_size), strict=True):
        # The still comes last: where it exists, the film is complete.
        write_atomically(made.video, encode(frames))
        write_atomically(made.still, imageio.imwrite("<bytes>", film_strip(frames), extension=".png"))
    return [f for f in films if _finished(f)]


def encode(frames: np.ndarray) -> bytes:
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


def _named(result: EpisodeResult, folder: Path) -> Film:
    outcome = "success" if result.success else "failure"
    stem = f"{outcome}_{result.task}_{result.index:03d}"
    return Film(result, folder / f"{stem}.mp4", folder / f"{stem}.png")


def _finished(made: Film) -> bool:
    return made.still.is_file()
