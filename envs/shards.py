"""Shards: small finished LeRobotDatasets with their simulator states, merged into one at the end.

LeRobot loses everything when it is killed before `finalize()`, so a shard is written under a provisional
name, finalized, and only then renamed: what bears a shard's name is whole. Its files' hashes tell damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from envs.base import ManipulationEnv
from envs.recording import Recording, dataset_features, dataset_frames

DATASET, STATES, MANIFEST = "dataset", "states.safetensors", "shard.json"
CODECS: dict[str, dict[str, Any]] = {
    "lossless": {
        "vcodec": "hevc",
        "pix_fmt": "gbrp",
        "preset": "ultrafast",
        "crf": 0,
        "g": 2,
        "extra_options": {"x265-params": "lossless=1:log-level=none"},
    },
    "h264": {"vcodec": "h264", "preset": "veryfast", "crf": 18, "g": 2},
}
"""How frames are stored. A policy sees the simulator's own frames when it is rolled out, and image encoders
are touchy about smooth pictures: h264 moves EfficientNet-Lite0's features of the wrist camera by 0.8 of their
spread over four episodes, one grey level of noise by 0.6. Lossless video takes 13 times the space."""


@dataclass(frozen=True)
class ShardSummary:
    """What a shard holds.

    Attributes:
        task: Name of the task.
        seeds: Seeds of its episodes, in order.
        lengths: Steps of its episodes.
        attempts: Episodes played, failures included.
    """

    task: str
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    attempts: int


def write_shard(
    folder: Path, env: ManipulationEnv, recordings: Iterable[Recording], repo_id: str, video: str
) -> ShardSummary:
    """Render recordings and write them as one shard.

    Args:
        folder: Where the shard will lie; must not exist.
        env: Environment of the recordings' task, with cameras.
        recordings: Successful demonstrations; each is written before the next one is asked for.
        repo_id: LeRobot's name for the dataset.
        video: How frames are stored, a name in `CODECS`.

    Returns:
        What the shard holds.
    """
    provisional = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(provisional, ignore_errors=True)
    written = _write_dataset(provisional / DATASET, env, recordings, repo_id, video)
    _save_states(provisional / STATES, [recording.states for recording in written], first=0)
    summary = ShardSummary(
        task=env.task.name,
        seeds=tuple(recording.seed for recording in written),
        lengths=tuple(len(recording.actions) for recording in written),
        attempts=sum(recording.attempts for recording in written),
    )
    manifest = {"summary": asdict(summary), "files": _hashes(provisional)}
    (provisional / MANIFEST).write_text(json.dumps(manifest))
    provisional.rename(folder)
    return summary


def read_shard(folder: Path) -> ShardSummary | None:
    """Return what a shard holds, or None if it is missing, was not finished, or is damaged.

    It reads every byte (0.7 s a gigabyte); `read_summary` suffices for a shard that is known to be whole.
    """
    try:
        whole = json.loads((folder / MANIFEST).read_text())["files"] == _hashes(folder)
        return read_summary(folder) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_summary(folder: Path) -> ShardSummary:
    """Return what a whole shard holds."""
    summary = json.loads((folder / MANIFEST).read_text())["summary"]
    lists = {name: tuple(summary[name]) for name in ("seeds", "lengths")}
    return ShardSummary(summary["task"], attempts=summary["attempts"], **lists)


def merge_shards(folders: Sequence[Path], root: Path, repo_id: str) -> None:
    """Merge shards, in order, into one dataset with its simulator states under `root`/states.

    Each shard keeps its files: to make one of them, LeRobot would write all of it again for each shard.

    Args:
        folders: Whole shards.
        root: Where the dataset will lie; must not exist.
        repo_id: LeRobot's name for the dataset.
    """
    from lerobot.datasets.aggregate import aggregate_datasets
    from safetensors.numpy import load_file

    with _quiet_lerobot(bars=True):  # LeRobot's merge_datasets, without decoding a frame of each shard
        roots = [folder / DATASET for folder in folders]
        aggregate_datasets(
            [repo_id] * len(roots),
            repo_id,
            roots=roots,
            aggr_root=root,
            concatenate_videos=False,
            concatenate_data=False,
        )
    (root / "states").mkdir()
    first = 0
    for folder in folders:
        states = load_file(folder / STATES)
        episodes = [states[name] for name in sorted(states)]
        _save_states(root / "states" / f"{_episode_name(first)}.safetensors", episodes, first=first)
        first += len(episodes)


def _write_dataset(
    root: Path, env: ManipulationEnv, recordings: Iterable[Recording], repo_id: str, video: str
) -> list[Recording]:
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with _quiet_lerobot():
        dataset = LeRobotDataset.create(
            repo_id,
            fps=env.metadata["render_fps"],
            features=dataset_features(env),
            root=root,
            robot_type=env.robot_type,
            use_videos=True,
            video_backend="pyav",
            rgb_encoder=RGBEncoderConfig(**CODECS[video]),
            streaming_encoding=True,
            encoder_threads=1,
            encoder_queue_maxsize=env.task.horizon + 1,  # a full queue makes LeRobot drop frames
        )
        written = []
        for recording in recordings:
            for frame in dataset_frames(env, recording):
                dataset.add_frame(frame)
            dataset.save_episode()
            written.append(recording)
        dataset.finalize()
    _check_videos(root, sum(len(recording.actions) for recording in written))
    return written


def _check_videos(root: Path, expected: int) -> None:
    import av

    for path in sorted((root / "videos").rglob("*.mp4")):
        with av.open(str(path)) as video:
            found = video.streams.video[0].frames
        if found != expected:
            raise RuntimeError(f"{path} holds {found} frames instead of {expected}: the encoder lost some")


def _save_states(path: Path, episodes: Sequence[Any], *, first: int) -> None:
    from safetensors.numpy import save_file

    save_file({_episode_name(first + index): states for index, states in enumerate(episodes)}, path)


def _episode_name(index: int) -> str:
    return f"episode_{index:06d}"


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@contextlib.contextmanager
def _quiet_lerobot(*, bars: bool = False) -> Iterator[None]:
    """Silence codec logs and reports of LeRobot's libraries, and its bars; warnings and errors pass."""
    import av
    import datasets

    level, disabled = av.logging.get_level(), logging.root.manager.disable
    logging.disable(logging.INFO)
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        datasets.enable_progress_bars()
        av.logging.set_level(level)
        logging.disable(disabled)
