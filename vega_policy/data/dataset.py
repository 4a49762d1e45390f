"""LeRobot datasets: opening, checking against the policy, and the low-dimensional table.

LeRobot is imported where it is used: training from a cache reads the table only.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vega_policy.config import check_choice, check_choices, check_numbers
from vega_policy.data.dataset_files import (
    ACTION,
    DISPLACEMENT,
    EXECUTED,
    FORMAT,
    STATE,
    DatasetError,
    check_version,
    describe_missing_dataset,
    describe_values,
    find_damaged_files,
    fingerprint_frames,
    hash_bytes,
    lfs_advice,
    list_files,
    read_episodes,
    read_json,
    read_tasks,
)

if TYPE_CHECKING:
    from lerobot.configs import NormalizationMode, PolicyFeature

    from vega_policy.configuration_vega import VegaConfig

logger = logging.getLogger(__name__)

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
"""LeRobot's, where meta/info.json gives none."""
STREAMS = ("frames", "semantic", "prior")
_CACHES = ("none", "disk", "ram", "gpu")
_BACKENDS, _STATISTICS = ("pyav", "torchcodec"), ("stored", "computed")


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture; the fields are those of `DatasetConfig`."""

    repo_id: str
    root: str | None = None
    revision: str | None = None
    rename: dict[str, str] | None = None
    task: str | None = None
    episodes: list[int] | None = None
    weight: float = 1.0  # share of the training samples, relative to the weights of the other entries


@dataclass(frozen=True)
class DatasetConfig:
    """Which LeRobot dataset the policy learns from, and how its frames are read."""

    repo_id: str  # the dataset's name; on the hub if `root` is None
    root: str | None = None  # local folder of the dataset
    revision: str | None = None  # hub revision; None takes the newest
    # Names that the policy reads by the features' names in the files, such as `{actions: action}`; None keeps
    # the names in the files.
    rename: dict[str, str] | None = None
    task: str | None = None  # one instruction for all frames; None takes the dataset's
    # `stored` normalises with the statistics of the dataset's files, and computes those that are missing;
    # `computed` computes all from its states and actions.
    stats: str = "stored"
    # Datasets with the same features that are sampled by weight, instead of one; the other fields hold for
    # all of them.
    mixture: list[MixtureEntry] | None = None
    episodes: list[int] | None = None  # episode numbers to use; None takes all
    held_out: float = 0.0  # fraction of each task's episodes kept for the held-out loss, in [0, 1)
    # Only every k-th instant of an episode, its first one included, is an observation, in training and in the
    # cache, which then takes 1/k of the time and space; action chunks keep all actions.
    frame_stride: int = 1
    # Largest random shift of training frames; 0 for none. In pixels of `policy.frame_size` with a cache, of
    # the dataset's own frames without. It requires frames: cached features, and a cached prior beside cached
    # frames, are those of unshifted frames.
    shift: int = 0
    # Largest random change of brightness of training frames, a factor in [1 - x, 1 + x]; 0 for none. This and
    # the next three require frames as `shift` does.
    brightness: float = 0.0
    contrast: float = 0.0  # the same of the contrast about a frame's mean grey
    saturation: float = 0.0  # the same of the saturation
    # Largest random turn of the hue, as a fraction of the colour circle, at most 0.5; 0 for none.
    hue: float = 0.0
    # Probability that a training sample's whole normalised proprioceptive state is zero, in [0, 1).
    state_dropout: float = 0.0
    # A batch holds pairs: each sample is followed by one at the same phase of another episode of its
    # instruction, of another dataset of a mixture where one has it, and both share noise and augmentation.
    pairs: bool = False
    video_backend: str = "pyav"  # LeRobot's decoder, `pyav` or `torchcodec`
    workers: int = 2  # processes that decode videos during training; unused with a cache
    # `none` decodes videos in every step; `disk` maps a cache of frames or features into memory; `ram` holds
    # it there, `gpu` on the training device.
    cache: str = "none"
    # Streams that the cache holds: `frames` (uint8), `semantic`, `prior`.
    cached: list[str] = field(default_factory=lambda: ["semantic", "prior"])
    cache_root: str = "outputs/cache"  # folder of all caches
    # Command that collects this dataset, for the message where it is missing.
    collect_command: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "dataset.", cache=_CACHES, video_backend=_BACKENDS, stats=_STATISTICS)
        for stream in self.cached:
            check_choice("dataset.cached", stream, STREAMS)
        fractions = ("held_out", "brightness", "contrast", "saturation", "state_dropout")
        check_numbers(self, "dataset.", **dict.fromkeys(fractions, "[0, 1)"), hue="[0, 0.5]")
        check_numbers(self, "dataset.", frame_stride="[1, inf)", shift="[0, inf)", workers="[0, inf)")
        self._check_frames_are_cached()
        self._check_mixture()

    @property
    def parts(self) -> "list[DatasetConfig]":
        """Return the config of each dataset of a mixture; without one, this config alone."""
        if self.mixture is None:
            return [self]
        entries = ({**vars(entry)} for entry in self.mixture)
        return [
            replace(self, mixture=None, **{key: entry[key] for key in entry if key != "weight"})
            for entry in entries
        ]

    def _check_mixture(self) -> None:
        """Refuse weights that are no shares, and fields that belong into the entries of a mixture."""
        if self.mixture is None:
            return
        if not self.mixture:
            raise ValueError("dataset.mixture: expected at least one dataset; got an empty list.")
        for entry in self.mixture:
            if not 0 < entry.weight < float("inf"):
                raise ValueError(
                    f"dataset.mixture: expected a positive weight for {entry.repo_id}; got {entry.weight}."
                )
        for name in ("root", "revision", "rename", "task", "episodes"):
            if getattr(self, name) is not None:
                raise ValueError(f"dataset.{name}: give it in each entry of dataset.mixture that needs it.")

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
class LocalDataset:
    """A finalized LeRobotDataset v3 in a local folder, with its features under the policy's names.

    Depth streams are left out, and states and actions of several axes are flattened.
    """

    repo_id: str
    root: Path
    fps: int
    features: dict[str, dict[str, Any]]  # as in meta/info.json
    stored_names: dict[str, str]  # name in the files by feature
    episodes: pd.DataFrame  # rows of meta/episodes
    stats: dict[str, dict[str, np.ndarray]]  # of meta/stats.json by feature; empty without the file
    video_path: str

    @property
    def num_episodes(self) -> int:
        """Return the number of episodes."""
        return len(self.episodes)

    @property
    def num_frames(self) -> int:
        """Return the number of frames of a camera."""
        return int(self.episodes["length"].sum())

    @property
    def cameras(self) -> list[str]:
        """Return the names of all cameras."""
        return [name for name, feature in self.features.items() if feature["dtype"] in ("video", "image")]

    def is_video(self, camera: str) -> bool:
        """Return whether a camera's frames are stored as videos, not as images."""
        return self.features[camera]["dtype"] == "video"

    def has_frames(self) -> bool:
        """Return whether the dataset holds frames; False where they are in the cache alone."""
        videos = any(self.is_video(camera) for camera in self.cameras)
        return not videos or (self.root / "videos").is_dir()

    def video_start(self, camera: str, position: int) -> tuple[Path, float]:
        """Return the video of the episode at `position` and the time in seconds at which it begins."""
        key, row = self.stored_names[camera], self.episodes.iloc[position]
        chunk, file = (int(row[f"videos/{key}/{part}_index"]) for part in ("chunk", "file"))
        path = self.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
        return self.root / path, float(row[f"videos/{key}/from_timestamp"])


def open_dataset(config: DatasetConfig) -> LocalDataset:
    """Open a dataset, after downloading it where no folder is given.

    Raises:
        DatasetError: If a local root holds no finalized dataset of format v3, or a damaged one; names the
            files and the command that collects it. If a dataset without videos is to be read without a cache.
    """
    if config.video_backend == "torchcodec":
        _require_torchcodec()
    if config.root is None:
        return open_folder(_download(config), config.repo_id, config.rename)
    root = Path(config.root)
    if not (root / "meta" / "info.json").is_file():
        raise DatasetError(describe_missing_dataset(root, config.collect_command))
    check_version(root, config.repo_id)
    if damaged := find_damaged_files(root):
        command = f": {config.collect_command}" if config.collect_command else "."
        advice = f"Delete it, then collect or download it again{command}"
        if any("LFS" in finding for finding in damaged):
            advice = lfs_advice(root)
        raise DatasetError(
            f"{config.root} is damaged or only partly written: {'; '.join(damaged[:5])}. {advice}"
        )
    dataset = open_folder(root, config.repo_id, config.rename)
    if not dataset.has_frames() and config.cache == "none":
        raise DatasetError(
            f"dataset.cache=none reads videos, but {config.root} has none: its frames are in the cache "
            "alone. Set dataset.cache=gpu (or ram, disk) and dataset.cached=[frames]."
        )
    return dataset


def _require_torchcodec() -> None:
    """Refuse a decoder that cannot be loaded, before its error comes from a decoding process."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise DatasetError(
            f"dataset.video_backend=torchcodec cannot be loaded ({str(error).strip().splitlines()[0]}). Set "
            "dataset.video_backend=pyav, or install torchcodec and FFmpeg for this version of torch."
        ) from error


def _download(config: DatasetConfig) -> Path:
    """Download a dataset of the hub, or find it in the local cache, and return its folder."""
    import httpx
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.utils import BackwardCompatibilityError

    try:
        return Path(LeRobotDataset(config.repo_id, revision=config.revision, video_backend="pyav").root)
    except BackwardCompatibilityError as error:
        raise DatasetError(
            f"dataset.repo_id={config.repo_id}: expected a LeRobotDataset {FORMAT}, got an older format. "
            f"Convert a copy of it: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id={config.repo_id}"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(
            f"dataset.repo_id={config.repo_id}: the dataset is neither on this machine nor could it be "
            f"downloaded ({reason}). For a local one give its folder, dataset.root=FOLDER; else check the "
            "name, the network and the login (hf auth login)."
        ) from error


def open_folder(root: Path, repo_id: str, rename: Mapping[str, str] | None = None) -> LocalDataset:
    """Open a LeRobotDataset v3 whose files are whole.

    `rename` gives features of the files, by their names there, the names that the policy reads.

    Raises:
        DatasetError: If metadata or videos are missing, or a renamed feature is.
    """
    info: dict[str, Any] = read_json(root / "meta" / "info.json")
    rename = dict(rename or {})
    stored_keys: list[str] = list(info["features"])
    if unknown := sorted(rename.keys() - info["features"].keys()):
        raise DatasetError(
            f"dataset.rename: {root} has no {', '.join(unknown)}; its features are "
            f"{', '.join(info['features'])}."
        )
    features = {}
    for stored, feature in info["features"].items():
        if _is_depth(feature):
            logger.info("%s: %s is a depth stream, which no policy here reads; ignored.", root, stored)
        else:
            features[rename.get(stored, stored)] = _flattened(feature)
    names: dict[str, str] = {rename.get(stored, stored): stored for stored in stored_keys}
    statistics = root / "meta" / "stats.json"
    stats: dict[str, Any] = read_json(statistics) if statistics.is_file() else {}
    dataset = LocalDataset(
        repo_id=repo_id,
        root=root,
        fps=info["fps"],
        features=features,
        stored_names=names,
        episodes=read_episodes(root),
        stats={
            name: {key: np.atleast_1d(np.asarray(value, np.float64)) for key, value in found.items()}
            for name in features
            if (found := stats.get(names[name]))
        },
        video_path=info.get("video_path") or VIDEO_PATH,
    )
    _check_videos(dataset)
    return dataset


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature is a depth stream; LeRobot marks it in one of three places."""
    info, video = feature.get("info") or {}, feature.get("video_info") or {}
    marks = (info.get("is_depth_map"), info.get("video.is_depth_map"), video.get("video.is_depth_map"))
    return any(marks) or (
        feature["dtype"] in ("video", "image") and 1 in (feature["shape"][0], feature["shape"][-1])
    )


def _flattened(feature: dict[str, Any]) -> dict[str, Any]:
    """Return a numeric feature as a vector, with a name for each entry where the dataset names them."""
    if feature["dtype"] in ("video", "image", "string", "language"):
        return feature
    shape = feature.get("shape") or [1]
    width, names = int(np.prod(shape)), feature.get("names")
    if isinstance(names, Mapping):  # as LeRobot's converted datasets: {"motors": [...]}
        names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
    if isinstance(names, list) and names and all(isinstance(axis, list) for axis in names):
        names = [".".join(map(str, parts)) for parts in product(*names)]
    if not isinstance(names, list) or len(names) != width:
        names = None
    return feature | {"shape": [width], "names": names}


def fingerprint_dataset(root: Path, table: "FrameTable") -> dict[str, str]:
    """Return a hash of each part of a dataset that training reads, 16 hexadecimal digits.

    Numbers, instructions and metadata are hashed whole; of a file of frames, its size and the first, middle
    and last 64 KiB.
    """
    statistics, displacement = root / "meta" / "stats.json", table.displacement
    more = {} if displacement is None else {"displacements": hash_bytes(displacement.numpy().tobytes())}
    if table.executed is not None:
        more["executed actions"] = hash_bytes(table.executed.numpy().tobytes())
    return more | {
        "actions": hash_bytes(table.action.numpy().tobytes()),
        "states": hash_bytes(table.state.numpy().tobytes()),
        "instructions": hash_bytes(json.dumps(table.tasks).encode(), table.task.numpy().tobytes()),
        "statistics": hash_bytes(statistics.read_bytes() if statistics.is_file() else b""),
        **fingerprint_frames(root),
    }


def _check_videos(dataset: LocalDataset) -> None:
    """Refuse a dataset that lacks some of its videos; one without any may have its frames in the cache."""
    videos = [camera for camera in dataset.cameras if dataset.is_video(camera)]
    if not videos or not dataset.has_frames():
        return
    missing = []
    for camera in videos:
        key = dataset.stored_names[camera]
        columns = [f"videos/{key}/{part}_index" for part in ("chunk", "file")]
        if not set(columns) <= set(dataset.episodes.columns):
            raise DatasetError(
                f"{dataset.root}: meta/episodes says nothing about the videos of {key}. Collect or download "
                "the dataset again."
            )
        for chunk, file in dataset.episodes[columns].drop_duplicates().itertuples(index=False):
            path = dataset.video_path.format(video_key=key, chunk_index=int(chunk), file_index=int(file))
            if not (dataset.root / path).is_file():
                missing.append(path)
    if missing:
        raise DatasetError(
            f"{dataset.root} is incomplete: expected {missing[0]}"
            f"{f' and {len(missing) - 1} other videos' if len(missing) > 1 else ''}, found no such file. "
            "Copy or download the dataset again."
        )


def match_features(policy: "VegaConfig", dataset: LocalDataset) -> None:
    """Give the policy's config the dataset's features, or check those that it already names.

    Only cameras (`observation.image...`), `observation.state` and `action` are taken: a simulator's state
    never reaches a policy.

    Raises:
        DatasetError: If a camera, the state or the action is missing or has another width; lists expected
            and available features.
    """
    available = policy_features(dataset)
    if not policy.input_features:
        policy.input_features = {key: kept for key, kept in available.items() if key != ACTION}
    if not policy.output_features:
        policy.output_features = {key: kept for key, kept in available.items() if key == ACTION}
    expected = {**policy.input_features, **policy.output_features}
    wrong = [key for key, feature in expected.items() if not _fits(feature, available.get(key))]
    missing = [
        name
        for name, found in (
            ("observation.images.<camera>", policy.image_features),
            (STATE, policy.robot_state_feature),
            (ACTION, policy.action_feature),
        )
        if not found
    ]
    if wrong or missing:
        raise DatasetError(
            f"{dataset.repo_id} does not fit the policy ({', '.join(wrong + missing)}). The policy expects: "
            f"{_list_features(expected, missing)}. The dataset has: {_list_stored(dataset)}. "
            f"{_suggest_rename(dataset, missing)}"
        )
    policy.set_dataset_feature_metadata(dataset.features)
    policy.dataset_fps = dataset.fps
    policy.set_dataset_rendering(dataset.root)


def policy_features(dataset: LocalDataset) -> "dict[str, PolicyFeature]":
    """Return what a policy can read of a dataset: cameras as [3 h w], state and action as vectors."""
    from lerobot.configs import FeatureType, PolicyFeature

    found = {}
    for name, feature in dataset.features.items():
        if name in dataset.cameras and name.startswith("observation.image"):
            shape = list(feature["shape"])
            channels_last = shape[-1] == 3
            height, width = shape[:2] if channels_last else shape[1:]
            found[name] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
        elif name in (STATE, ACTION) and name not in dataset.cameras:
            kind = FeatureType.STATE if name == STATE else FeatureType.ACTION
            found[name] = PolicyFeature(kind, tuple(feature["shape"]))
    return found


def _suggest_rename(dataset: LocalDataset, missing: Sequence[str]) -> str:
    """Return the override that gives features of other names, such as openpi's, those that policies read."""
    rename = {}
    for name in dataset.features:
        last = name.replace("/", ".").rpartition(".")[2]
        if name in dataset.cameras and not name.startswith("observation.image"):
            rename[name] = f"observation.images.{last}"
        elif STATE in missing and last in ("state", "states", "proprio", "qpos"):
            rename[name] = STATE
        elif ACTION in missing and last in ("action", "actions"):
            rename[name] = ACTION
    if not rename:
        return "Rename or collect what is missing, or give policy.input_features that the dataset has."
    pairs = ",".join(f"{old}: {new}" for old, new in rename.items())
    return f"Name its features for the policy: 'dataset.rename={{{pairs}}}'"


def _fits(expected: "PolicyFeature", found: "PolicyFeature | None") -> bool:
    """Return whether kind and width agree; a camera may have another size, its frames are resized."""
    if found is None or found.type is not expected.type:
        return False
    return expected.type.name == "VISUAL" or tuple(found.shape) == tuple(expected.shape)


def _list_features(features: "dict[str, PolicyFeature]", missing: Sequence[str]) -> str:
    return (
        ", ".join([*(f"{key} {list(feature.shape)}" for key, feature in features.items()), *missing])
        or "nothing"
    )


def _list_stored(dataset: LocalDataset) -> str:
    counters = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    named = [
        f"{key} {list(feature['shape'])}" for key, feature in dataset.features.items() if key not in counters
    ]
    return ", ".join(named) or "nothing"


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
    displacement: Tensor | None = None  # of the target from the gripper, float32 [n 3] m, if it is read
    executed: Tensor | None = None  # action with its noise, as the robot executed it, float32 [n a], if read

    def __len__(self) -> int:
        """Return the number of frames n."""
        return len(self.action)

    def chunks(self, rows: Tensor, length: int, action: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the chunks of `length` actions from rows [b] on: actions [b t a] and `is_pad` [b t].

        Beyond an episode's end its last action is repeated, and `is_pad` is True. Other actions than the
        table's may be given, [n a].
        """
        steps = rows[:, None] + torch.arange(length)  # [b t]
        last = (self.episode_end[rows] - 1)[:, None]
        return (self.action if action is None else action)[torch.minimum(steps, last)], steps > last

    def every(self, stride: int) -> Tensor:
        """Return whether each row is one of every `stride`-th of its episode from the first on, bool [n]."""
        first = torch.cat([torch.zeros(1, dtype=torch.int64), self.episode_end.unique()])
        rows = torch.arange(len(self))
        return (rows - first[torch.searchsorted(first, rows, right=True) - 1]) % stride == 0

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


def read_table(
    root: Path,
    stored_names: Mapping[str, str] | None = None,
    task: str | None = None,
    *,
    displacement: bool = False,
    executed: bool = False,
) -> FrameTable:
    """Read the table of all episodes of a finalized LeRobotDataset v3 (`meta/` and `data/` below `root`).

    `stored_names` are those of the features in the files; `task` replaces all instructions. Displacements and
    executed actions are read where they are requested.

    Raises:
        DatasetError: If a column is missing or ragged, or frames have a task without a sentence.
    """
    features = [STATE, ACTION, *([DISPLACEMENT] if displacement else []), *([EXECUTED] if executed else [])]
    names = {name: (stored_names or {}).get(name, name) for name in features}
    columns = ["index", *names.values(), "episode_index", "task_index"]
    tables = []
    for file in list_files(root / "data", ".parquet"):
        if absent := [name for name in columns if name not in pq.read_schema(file).names]:
            raise DatasetError(
                f"{file}: expected the columns {', '.join(columns)}, found no {', '.join(absent)}. Collect "
                "or download the dataset again."
            )
        tables.append(pq.read_table(file, columns=columns))
    data = pa.concat_tables(tables, promote_options="permissive").sort_by("index")
    episode = torch.from_numpy(data["episode_index"].to_numpy().copy())
    boundaries = (episode[1:] != episode[:-1]).nonzero()[:, 0] + 1
    ends = torch.cat([boundaries, torch.tensor([len(episode)])])
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    task_index, tasks = _tasks_of(root, data["task_index"].to_numpy(), task)
    values = {name: _matrix(data[stored], stored, root) for name, stored in names.items()}
    return FrameTable(
        state=values[STATE],
        action=values[ACTION],
        displacement=values.get(DISPLACEMENT),
        executed=values.get(EXECUTED),
        episode=episode,
        episode_end=torch.repeat_interleave(ends, lengths),
        task=torch.from_numpy(task_index),
        tasks=tasks,
        fps=read_json(root / "meta" / "info.json")["fps"],
    )


def _tasks_of(root: Path, indices: np.ndarray, task: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the number of each frame's instruction [n], and all instructions."""
    if task is not None:
        if not task.strip():
            logger.warning("dataset.task is empty: the policy learns without an instruction.")
        return np.zeros(len(indices), np.int64), (task,)
    sentences = read_tasks(root)
    numbers = np.array(sorted(sentences))
    if unknown := sorted(set(np.unique(indices)) - set(numbers)):
        raise DatasetError(
            f"{root}: frames have task_index {', '.join(map(str, unknown[:5]))}, meta/tasks.parquet names "
            f"{', '.join(map(str, numbers[:5]))}. Mend that file, or give one instruction: dataset.task='...'"
        )
    if any(not sentences[index].strip() for index in np.unique(indices)):
        logger.warning("%s: some frames have an empty instruction. Give one: dataset.task='...'", root)
    return np.searchsorted(numbers, indices).astype(np.int64), tuple(sentences[index] for index in numbers)


def _matrix(column: pa.ChunkedArray, name: str, root: Path) -> Tensor:
    """Convert a column of numbers or of equally long, possibly nested lists to float32 [n width]."""
    values, rows = column.combine_chunks(), len(column)
    while not pa.types.is_primitive(values.type):
        values = values.storage if isinstance(values, pa.ExtensionArray) else values.flatten()
    flat = values.to_numpy(zero_copy_only=False).astype(np.float32)
    lengths = len(flat) / rows
    if column.null_count or lengths != int(lengths):
        raise DatasetError(
            f"{root}: expected {name} of one width in every frame, got {len(flat)} numbers in {rows} frames "
            f"({column.null_count} empty). Record these episodes again."
        )
    return torch.from_numpy(flat.reshape(rows, -1))


def check_finite(table: FrameTable, rows: Tensor, source: str | Path) -> None:
    """Refuse training rows [m] with numbers that are not finite; `source` names the dataset.

    Raises:
        ValueError: Names the first episode and frame.
    """
    more = ((DISPLACEMENT, table.displacement), (EXECUTED, table.executed))
    for name, values in ((ACTION, table.action), (STATE, table.state), *more):
        if values is None:
            continue
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


_NEEDED = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Statistics that LeRobot's normalisation modes read."""


def normalization_stats(
    dataset: LocalDataset,
    values: Mapping[str, Tensor],
    modes: "Mapping[str, NormalizationMode]",
    *,
    computed: bool = False,
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return statistics by feature, and one line for each that the dataset's files lack or have wrong.

    Statistics of state and action that are missing, not finite or of another width are computed from
    `values` [n width]; so are all with `computed`. Stored ones that are far from the data are kept.
    """
    stats, lines = dict(dataset.stats), []
    for name, data in values.items():
        mode = modes["ACTION" if name == ACTION else "STATE"].name
        stored = {key: array.reshape(-1) for key, array in dataset.stats.get(name, {}).items()}
        exact = {key: np.asarray(value) for key, value in describe_values(data.numpy()).items()}
        problem = _find_problem(stored, data.shape[1], _NEEDED[mode])
        if problem and not computed:
            lines.append(f"meta/stats.json: {problem} for {name} ({mode}); computed from the data.")
        stats[name] = exact if problem or computed else stored
        if not computed and not problem and (far := _find_distance(stored, exact, _NEEDED[mode])):
            lines.append(f"meta/stats.json is far from the data: {name} {far}. Take dataset.stats=computed.")
    return stats, lines


def _find_problem(stored: Mapping[str, np.ndarray], width: int, needed: Sequence[str]) -> str | None:
    """Return why stored statistics cannot be used, None if they can."""
    if missing := [key for key in needed if key not in stored]:
        return f"no {', '.join(missing)}"
    for key in needed:
        if len(stored[key]) != width:
            return f"{key} of width {len(stored[key])} instead of {width}"
        if not np.isfinite(stored[key]).all():
            return f"{key} is not finite"
    return None


def _find_distance(
    stored: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], needed: Sequence[str]
) -> str | None:
    """Return the first entry whose stored centre or spread is far from the data's, with figures."""
    if not needed:
        return None
    spans = []
    for stats in (stored, exact):
        low, high = (stats[key].astype(np.float64) for key in needed)
        spans.append((low, high) if needed[0] == "mean" else ((low + high) / 2, (high - low) / 2))
    (center, spread), (true_center, true_spread) = spans
    unit = np.maximum(true_spread, 1e-6)
    far = (np.abs(center - true_center) > unit) | (spread < unit / 3) | (spread > 3 * unit)
    far &= true_spread > 1e-6  # of a constant every spread is as good
    if not far.any():
        return None
    entry = int(far.nonzero()[0][0])
    return f"[{entry}] " + ", ".join(
        f"{key} {stored[key][entry]:.4g} (data: {exact[key][entry]:.4g})" for key in needed
    )
