"""LeRobot datasets: opening, checking against the policy, and the low-dimensional table.

LeRobot is imported where it is used: training from a cache reads the table only.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lerobot.configs import PolicyFeature, PreTrainedConfig
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

STATE, ACTION = "observation.state", "action"
STREAMS = ("frames", "semantic", "prior")
_CACHES = ("none", "disk", "ram", "gpu")
_SAMPLE = 1 << 16
_BOX_HEADER = struct.Struct(">I4s")
"""Size and type of an MP4 box (ISO/IEC 14496-12); a size of 1 means that 64 bits of it follow."""


class DatasetError(ValueError):
    """The dataset is missing or does not fit the policy."""


@dataclass(frozen=True)
class DatasetConfig:
    """Which LeRobot dataset the policy learns from, and how its frames are read.

    Attributes:
        repo_id: The dataset's name; on the hub if `root` is None.
        root: Local folder of the dataset.
        revision: Hub revision; None takes the newest.
        episodes: Episode numbers to use; None takes all.
        held_out: Fraction of each task's episodes kept for the held-out loss, in [0, 1).
        shift: Largest random shift of training frames; 0 for none. In pixels of `policy.frame_size` with a
            cache, of the dataset's own frames without. It requires frames: cached features, and a cached
            prior beside cached frames, are those of unshifted frames.
        brightness: Largest random change of brightness of training frames, a factor in [1 - x, 1 + x]; 0 for
            none. This and the next three require frames as `shift` does.
        contrast: The same of the contrast about a frame's mean grey.
        saturation: The same of the saturation.
        hue: Largest random turn of the hue, as a fraction of the colour circle, at most 0.5; 0 for none.
        state_dropout: Probability that a training sample's whole normalised proprioceptive state is zero, in
            [0, 1).
        video_backend: LeRobot's decoder, `pyav` or `torchcodec`.
        workers: Processes that decode videos during training; unused with a cache.
        cache: `none` decodes videos in every step; `disk` maps a cache of frames or features into memory;
            `ram` holds it there, `gpu` on the training device.
        cached: Streams that the cache holds: `frames` (uint8), `semantic`, `prior`.
        cache_root: Folder of all caches.
        collect_command: Command that collects this dataset, for the message where it is missing.
    """

    repo_id: str
    root: str | None = None
    revision: str | None = None
    episodes: list[int] | None = None
    held_out: float = 0.0
    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    state_dropout: float = 0.0
    video_backend: str = "pyav"
    workers: int = 2
    cache: str = "none"
    cached: list[str] = field(default_factory=lambda: ["semantic", "prior"])
    cache_root: str = "outputs/cache"
    collect_command: str | None = None

    def __post_init__(self) -> None:
        if self.cache not in _CACHES:
            raise ValueError(f"dataset.cache: expected one of {', '.join(_CACHES)}; got {self.cache!r}.")
        if unknown := [stream for stream in self.cached if stream not in STREAMS]:
            raise ValueError(f"dataset.cached: expected one of {', '.join(STREAMS)}; got {unknown[0]!r}.")
        for name in ("held_out", "brightness", "contrast", "saturation", "state_dropout"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"dataset.{name}: expected a fraction in [0, 1); got {value}.")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"dataset.hue: expected a fraction in [0, 0.5]; got {self.hue}.")
        if self.shift < 0:
            raise ValueError(f"dataset.shift must be at least 0; got {self.shift}.")
        self._check_frames_are_cached()

    def _check_frames_are_cached(self) -> None:
        """Refuse augmentation of frames where the cache holds only features of them."""
        if self.cache == "none" or ("frames" in self.cached and "semantic" not in self.cached):
            return
        for name in ("shift", "brightness", "contrast", "saturation", "hue"):
            if value := getattr(self, name):
                raise ValueError(
                    f"dataset.{name}={value} needs frames in the cache and no semantic features; got "
                    f"dataset.cached={list(self.cached)}. Take [frames] (the prior reads augmented frames "
                    f"too), [frames,prior] (faster; the prior reads frames as they are), or dataset.{name}=0."
                )


@dataclass(frozen=True)
class StateDataset:
    """A dataset without videos: states, actions and instructions, whose frames are in the cache alone."""

    repo_id: str
    root: Path
    meta: "LeRobotDatasetMetadata"

    @property
    def num_episodes(self) -> int:
        """Return the number of episodes."""
        return self.meta.total_episodes


def open_dataset(config: DatasetConfig, policy: "PreTrainedConfig") -> "LeRobotDataset | StateDataset":
    """Open all episodes, with a chunk of actions at every row and uint8 frames of videos.

    Raises:
        DatasetError: If a local root holds no finalized dataset, or a damaged one; names the files and the
            command that collects it. If a dataset without videos is to be read without a cache.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if config.root is not None and not (Path(config.root) / "meta" / "info.json").is_file():
        command = config.collect_command or "the command that collects or downloads it"
        raise DatasetError(
            f"No demonstrations in {config.root}: expected a finalized LeRobotDataset (meta/info.json), "
            f"found {_list_folder(Path(config.root))}. Collect them first: {command}"
        )
    if config.root is not None and (damaged := find_damaged_files(Path(config.root))):
        raise DatasetError(
            f"{config.root} is damaged or only partly written: {'; '.join(damaged[:5])}. Delete it, then "
            f"collect or download it again{f': {config.collect_command}' if config.collect_command else '.'}"
        )
    meta = LeRobotDatasetMetadata(config.repo_id, root=config.root, revision=config.revision)
    if config.root is not None and not has_videos(Path(config.root)):
        if config.cache == "none":
            raise DatasetError(
                f"dataset.cache=none reads videos, but {config.root} has none: its frames are in the cache "
                "alone. Set dataset.cache=gpu (or ram, disk) and dataset.cached=[frames]."
            )
        return StateDataset(config.repo_id, Path(config.root), meta)
    return LeRobotDataset(
        config.repo_id,
        root=config.root,
        revision=config.revision,
        video_backend=config.video_backend,
        delta_timestamps=resolve_delta_timestamps(policy, meta),
        return_uint8=True,
    )


def has_videos(root: Path) -> bool:
    """Return whether a local dataset holds the videos that its features name; True where they name none."""
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    named = any(feature["dtype"] == "video" for feature in features.values())
    return not named or (root / "videos").is_dir()


def fingerprint_dataset(root: Path, table: "FrameTable") -> dict[str, str]:
    """Return a hash of each part of a dataset that training reads, 16 hexadecimal digits.

    Numbers, instructions and metadata are hashed whole; of a file of frames, its size and the first, middle
    and last 64 KiB.
    """
    statistics = root / "meta" / "stats.json"
    return {
        "actions": hash_bytes(table.action.numpy().tobytes()),
        "states": hash_bytes(table.state.numpy().tobytes()),
        "instructions": hash_bytes(json.dumps(table.tasks).encode(), table.task.numpy().tobytes()),
        "statistics": hash_bytes(statistics.read_bytes() if statistics.is_file() else b""),
        **fingerprint_frames(root),
    }


def fingerprint_frames(root: Path) -> dict[str, str]:
    """Return the parts of `fingerprint_dataset` on which cached frames and features depend."""
    info = root / "meta" / "info.json"
    features = json.loads(info.read_text())["features"].values()
    stored_as = "data" if any(feature["dtype"] == "image" for feature in features) else "videos"
    files = sorted(path for path in (root / stored_as).rglob("*") if path.is_file())
    episodes = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    return {
        "features": hash_bytes(info.read_bytes()),
        "episodes": hash_bytes(*(path.read_bytes() for path in episodes)),
        "frames": hash_bytes(
            *(path.relative_to(root).as_posix().encode() + _sample_file(path) for path in files)
        ),
    }


def hash_bytes(*parts: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 over the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _sample_file(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 3 * _SAMPLE:
            return file.read()
        samples = [size.to_bytes(8)]
        for start in (0, size // 2, size - _SAMPLE):
            file.seek(start)
            samples.append(file.read(_SAMPLE))
    return b"".join(samples)


def find_damaged_files(root: Path) -> list[str]:
    """Return one phrase for each unreadable or truncated file of a LeRobotDataset v3, and for missing rows.

    Only headers and footers are read, which takes milliseconds a file.
    """
    findings, rows = [], 0
    for path in sorted(root.glob("**/*.parquet")):
        name = path.relative_to(root)
        try:
            held = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
            findings.append(f"{name} is no whole Parquet file ({path.stat().st_size} bytes)")
            continue
        rows += held if name.parts[0] == "data" else 0
    announced = json.loads((root / "meta" / "info.json").read_text())["total_frames"]
    if not findings and rows != announced:
        findings.append(f"data/ holds {rows} rows, meta/info.json announces {announced}")
    videos = sorted(root.glob("videos/**/*.mp4"))
    return findings + [f"{path.relative_to(root)} is truncated" for path in videos if not _is_whole(path)]


def _is_whole(video: Path) -> bool:
    """Return whether an MP4 file is as long as its boxes say."""
    end, size = 0, video.stat().st_size
    with video.open("rb") as file:
        while end + _BOX_HEADER.size <= size:
            file.seek(end)
            length, _ = _BOX_HEADER.unpack(file.read(_BOX_HEADER.size))
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length < _BOX_HEADER.size:
                return False
            end += length
    return end == size > 0


def match_features(policy: "PreTrainedConfig", dataset: "LeRobotDataset | StateDataset") -> None:
    """Give the policy's config the dataset's features, or check those that it already names.

    Only cameras, `observation.state` and `action` are taken: a simulator's state never reaches a policy.

    Raises:
        DatasetError: If a camera, the state or the action is missing or has another width; lists expected
            and available features.
    """
    from lerobot.configs import FeatureType
    from lerobot.utils.feature_utils import dataset_to_policy_features

    observed = (FeatureType.VISUAL, FeatureType.STATE)
    available = dataset_to_policy_features(dataset.meta.features)
    if not policy.input_features:
        policy.input_features = {key: kept for key, kept in available.items() if kept.type in observed}
    if not policy.output_features:
        policy.output_features = {
            key: kept for key, kept in available.items() if kept.type is FeatureType.ACTION
        }
    expected = {**policy.input_features, **policy.output_features}
    wrong = [key for key, feature in expected.items() if not _fits(feature, available.get(key))]
    missing = [
        name
        for name, found in (
            ("observation.images.<camera>", policy.image_features),
            ("observation.state", policy.robot_state_feature),
            ("action", policy.action_feature),
        )
        if not found
    ]
    if wrong or missing:
        raise DatasetError(
            f"{dataset.repo_id} does not fit the policy ({', '.join(wrong + missing)}). The policy expects: "
            f"{_list_features(expected, missing)}. The dataset has: {_list_features(available)}. Rename or "
            "collect what is missing, or give policy.input_features that the dataset has."
        )


def _fits(expected: "PolicyFeature", found: "PolicyFeature | None") -> bool:
    """Return whether kind and width agree; a camera may have another size, its frames are resized."""
    if found is None or found.type is not expected.type:
        return False
    return expected.type.name == "VISUAL" or tuple(found.shape) == tuple(expected.shape)


def _list_features(features: "dict[str, PolicyFeature]", missing: list[str] | None = None) -> str:
    named = [f"{key} {list(feature.shape)}" for key, feature in features.items()]
    return ", ".join([*named, *(missing or [])]) or "nothing"


def _list_folder(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"


@dataclass(frozen=True)
class FrameTable:
    """One row for each frame of a dataset, in the dataset's order."""

    state: Tensor  # proprioception, float32 [n s]
    action: Tensor  # taken at that frame, float32 [n a]
    episode: Tensor  # episode number, int64 [n]
    episode_end: Tensor  # row after the last one of the frame's episode, int64 [n]
    task: Tensor  # index into `tasks`, int64 [n]
    tasks: tuple[str, ...]  # instructions
    fps: int

    def __len__(self) -> int:
        """Return the number of frames n."""
        return len(self.action)

    def chunks(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the chunks of `length` actions from rows [b] on: actions [b t a] and `is_pad` [b t].

        Beyond an episode's end its last action is repeated, and `is_pad` is True.
        """
        steps = rows[:, None] + torch.arange(length)  # [b t]
        last = (self.episode_end[rows] - 1)[:, None]
        return self.action[torch.minimum(steps, last)], steps > last

    def instructions(self, rows: Tensor) -> list[str]:
        """Return the instruction of each row, b strings."""
        return [self.tasks[index] for index in self.task[rows].tolist()]

    def rows_of(self, episodes: list[int]) -> Tensor:
        """Return the rows of the given episodes, in order, int64 [m]."""
        return torch.isin(self.episode, torch.tensor(episodes, dtype=torch.int64)).nonzero()[:, 0]

    def split(self, held_out: float, episodes: list[int] | None = None) -> tuple[list[int], list[int]]:
        """Split episodes (None: all) into training and held-out ones, the last of each task.

        `held_out`, in [0, 1), is the fraction of each task's episodes, rounded up.

        Raises:
            ValueError: If an episode does not exist or no training episode would be left.
        """
        first_rows = torch.cat([torch.zeros(1, dtype=torch.int64), self.episode_end.unique()[:-1]])
        task_of = dict(zip(self.episode[first_rows].tolist(), self.task[first_rows].tolist(), strict=True))
        chosen = sorted(task_of) if episodes is None else episodes
        unknown = [episode for episode in chosen if episode not in task_of]
        if unknown:
            raise ValueError(
                f"dataset.episodes: the dataset has no {unknown}; its episodes are {min(task_of)} to "
                f"{max(task_of)}."
            )
        by_task: dict[int, list[int]] = {}
        for episode in chosen:
            by_task.setdefault(task_of[episode], []).append(episode)
        training, kept_out = [], []
        for members in by_task.values():
            count = len(members) - int(np.ceil(len(members) * held_out))
            training += members[:count]
            kept_out += members[count:]
        if not training:
            raise ValueError(
                f"dataset.held_out={held_out} leaves no episode to learn from: the dataset has "
                f"{len(chosen)} episodes of {len(by_task)} tasks. Lower it or collect more."
            )
        return sorted(training), sorted(kept_out)


def read_table(root: Path) -> FrameTable:
    """Read the table of all episodes of a finalized LeRobotDataset v3 (`meta/` and `data/` below `root`)."""
    info = json.loads((root / "meta" / "info.json").read_text())
    tasks = pq.read_table(root / "meta" / "tasks.parquet").to_pydict()
    (sentences,) = (column for name, column in tasks.items() if name != "task_index")
    names = dict(zip(tasks["task_index"], sentences, strict=True))
    columns = ["index", STATE, ACTION, "episode_index", "task_index"]
    files = sorted((root / "data").rglob("*.parquet"))
    data = pa.concat_tables([pq.read_table(file, columns=columns) for file in files]).sort_by("index")
    episode = torch.from_numpy(data["episode_index"].to_numpy().copy())
    boundaries = (episode[1:] != episode[:-1]).nonzero()[:, 0] + 1
    ends = torch.cat([boundaries, torch.tensor([len(episode)])])
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    return FrameTable(
        state=_matrix(data[STATE]),
        action=_matrix(data[ACTION]),
        episode=episode,
        episode_end=torch.repeat_interleave(ends, lengths),
        task=torch.from_numpy(data["task_index"].to_numpy().copy()),
        tasks=tuple(names[index] for index in range(len(names))),
        fps=info["fps"],
    )


def _matrix(column: pa.ChunkedArray) -> Tensor:
    """Convert a column of equally long lists to float32 [n width]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.astype(np.float32).reshape(len(column), -1))


def check_finite(table: FrameTable, rows: Tensor, source: str | Path) -> None:
    """Refuse training rows [m] with an action or a state that is not finite; `source` names the dataset.

    Raises:
        ValueError: Names the first episode and frame.
    """
    for name, values in ((ACTION, table.action), (STATE, table.state)):
        bad = rows[(~values[rows].isfinite()).any(dim=1)]
        if len(bad) == 0:
            continue
        row = int(bad[0])
        episode = int(table.episode[row])
        frame = row - int((table.episode == episode).nonzero()[0])
        raise ValueError(
            f"{source}: expected finite numbers in {name}, found {values[row].tolist()} in episode "
            f"{episode}, frame {frame} ({len(bad)} of {len(rows)} frames are affected). Record these "
            "episodes again, or leave them out with dataset.episodes=[...]."
        )


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class LowDimensionalEpisode:
    """What a dataset holds of an episode beside its frames."""

    state: np.ndarray  # proprioception, float32 [t s]
    action: np.ndarray  # float32 [t a]
    instruction: str


def write_state_dataset(
    root: Path,
    episodes: Sequence[LowDimensionalEpisode],
    features: dict[str, dict[str, Any]],
    *,
    fps: int,
    robot_type: str,
) -> None:
    """Write a LeRobotDataset v3 without videos into the folder `root`; `features` name its cameras too."""
    lengths = [len(episode.action) for episode in episodes]
    instructions = [episode.instruction for episode in episodes]
    values = {
        STATE: np.concatenate([episode.state for episode in episodes]),
        ACTION: np.concatenate([episode.action for episode in episodes]),
    }
    tasks = list(dict.fromkeys(instructions))
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    task_index = np.repeat([tasks.index(instruction) for instruction in instructions], lengths)
    pq.write_table(_frame_rows(values, lengths, task_index, fps), root / "data/chunk-000/file-000.parquet")
    pq.write_table(_episode_rows(lengths, instructions), root / "meta/episodes/chunk-000/file-000.parquet")
    named = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task"))
    named.to_parquet(root / "meta" / "tasks.parquet")
    stats = {name: _statistics(array) for name, array in values.items()}
    (root / "meta" / "stats.json").write_text(json.dumps(stats, indent=4))
    counters = {"timestamp": "float32"} | dict.fromkeys(
        ("frame_index", "episode_index", "index", "task_index"), "int64"
    )
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": {name: feature | {"shape": list(feature["shape"])} for name, feature in features.items()}
        | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in counters.items()},
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "robot_type": robot_type,
        "splits": {"train": f"0:{len(lengths)}"},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info, indent=4))


def _frame_rows(
    values: dict[str, np.ndarray], lengths: list[int], task_index: np.ndarray, fps: int
) -> pa.Table:
    frame = np.concatenate([np.arange(length) for length in lengths])
    columns = {name: pa.array(list(array), pa.list_(pa.float32())) for name, array in values.items()}
    columns["timestamp"] = pa.array((frame / fps).astype(np.float32))
    columns["frame_index"] = pa.array(frame)
    columns["episode_index"] = pa.array(np.repeat(np.arange(len(lengths)), lengths))
    columns["index"] = pa.array(np.arange(len(frame)))
    columns["task_index"] = pa.array(task_index)
    return pa.table(columns)


def _episode_rows(lengths: list[int], instructions: list[str]) -> pa.Table:
    ends, zeros = np.cumsum(lengths), np.zeros(len(lengths), np.int64)
    columns = {
        "episode_index": np.arange(len(lengths)),
        "tasks": [[instruction] for instruction in instructions],
        "length": np.array(lengths),
        "dataset_from_index": ends - lengths,
        "dataset_to_index": ends,
    }
    places = ("data/chunk_index", "data/file_index", "meta/episodes/chunk_index", "meta/episodes/file_index")
    return pa.table(columns | dict.fromkeys(places, zeros))


def _statistics(values: np.ndarray) -> dict[str, list[Any]]:
    """Return what LeRobot stores of a feature [n width]."""
    exact = values.astype(np.float64)
    found = {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0), "std": exact.std(0)}
    found |= {name: np.quantile(exact, fraction, axis=0) for name, fraction in QUANTILES.items()}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}
