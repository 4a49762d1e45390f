"""Opening a LeRobot dataset, and refusing one the policy cannot learn from."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow as pa
import pyarrow.parquet as parquet
import pyarrow.parquet as pq
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from vega_policy.training.config import DatasetConfig

BOX_HEADER = struct.Struct(">I4s")
"""Size and type of an MP4 box (ISO/IEC 14496-12); a size of 1 means that 64 bits of it follow."""


def damaged_files(root: Path) -> list[str]:
    """Files that are truncated or that nothing can read, and tables that hold fewer rows than announced.

    Only headers and footers are read: it takes milliseconds a file.

    Args:
        root: Folder of a LeRobotDataset v3.

    Returns:
        One phrase a finding, with the file's path below the root; empty if all is whole.
    """
    findings, rows = [], 0
    for path in sorted(root.glob("**/*.parquet")):
        name = path.relative_to(root)
        try:
            held = parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowInvalid, OSError):
            findings.append(f"{name} is no whole Parquet file ({path.stat().st_size} bytes)")
            continue
        rows += held if name.parts[0] == "data" else 0
    announced = json.loads((root / "meta" / "info.json").read_text())["total_frames"]
    if not findings and rows != announced:
        findings.append(f"data/ holds {rows} rows, meta/info.json announces {announced}")
    videos = sorted(root.glob("videos/**/*.mp4"))
    return findings + [f"{path.relative_to(root)} is truncated" for path in videos if not _whole(path)]


def _whole(video: Path) -> bool:
    """Whether an MP4 file is as long as its boxes say."""
    end, size = 0, video.stat().st_size
    with video.open("rb") as file:
        while end + BOX_HEADER.size <= size:
            file.seek(end)
            length, _ = BOX_HEADER.unpack(file.read(BOX_HEADER.size))
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length < BOX_HEADER.size:
                return False
            end += length
    return end == size > 0


class DatasetError(ValueError):
    """The dataset is missing or does not fit the policy."""


def open_dataset(config: DatasetConfig, policy: PreTrainedConfig) -> LeRobotDataset:
    """Opens all episodes, with a chunk of actions at every row.

    Args:
        config: Where the dataset is.
        policy: The policy's config, which says what is read around each row.

    Returns:
        The dataset; frames of videos are uint8.

    Raises:
        DatasetError: If a local root holds no finalized dataset, or a damaged one; names the files and the
            command that collects it.
    """
    if config.root is not None and not (Path(config.root) / "meta" / "info.json").is_file():
        command = config.collect_command or "the command that collects or downloads it"
        raise DatasetError(
            f"No demonstrations in {config.root}: expected a finalized LeRobotDataset (meta/info.json), "
            f"found {_listing(Path(config.root))}. Collect them first: {command}"
        )
    if config.root is not None and (damaged := damaged_files(Path(config.root))):
        raise DatasetError(
            f"{config.root} is damaged or only partly written: {'; '.join(damaged[:5])}. Delete it, then "
            f"collect or download it again{f': {config.collect_command}' if config.collect_command else '.'}"
        )
    meta = LeRobotDatasetMetadata(config.repo_id, root=config.root, revision=config.revision)
    return LeRobotDataset(
        config.repo_id,
        root=config.root,
        revision=config.revision,
        video_backend=config.video_backend,
        delta_timestamps=resolve_delta_timestamps(policy, meta),
        return_uint8=True,
    )


def match_features(policy: PreTrainedConfig, dataset: LeRobotDataset) -> None:
    """Gives the policy the dataset's features, or checks those it expects already.

    Cameras, `observation.state` and `action` are taken; anything else a dataset may hold, such as a
    simulator's state, never reaches a policy.

    Args:
        policy: The policy's config; filled in if it names no features yet.
        dataset: The dataset.

    Raises:
        DatasetError: If a camera, the state or the action is missing or has another width; names what the
            policy expects and what the dataset has.
    """
    seen = (FeatureType.VISUAL, FeatureType.STATE)
    there = dataset_to_policy_features(dataset.meta.features)
    if not policy.input_features:
        policy.input_features = {key: kept for key, kept in there.items() if kept.type in seen}
    if not policy.output_features:
        policy.output_features = {key: kept for key, kept in there.items() if kept.type is FeatureType.ACTION}
    expected = {**policy.input_features, **policy.output_features}
    wrong = [key for key, feature in expected.items() if not _fits(feature, there.get(key))]
    lacking = [
        name
        for name, found in (
            ("observation.images.<camera>", policy.image_features),
            ("observation.state", policy.robot_state_feature),
            ("action", policy.action_feature),
        )
        if not found
    ]
    if wrong or lacking:
        raise DatasetError(
            f"{dataset.repo_id} does not fit the policy ({', '.join(wrong + lacking)}). The policy expects: "
            f"{_names(expected, lacking)}. The dataset has: {_names(there)}. Rename or collect what is "
            "missing, or give policy.input_features that the dataset has."
        )


def _fits(expected: PolicyFeature, found: PolicyFeature | None) -> bool:
    """Same kind and width; a camera may have another size, its frames are resized."""
    if found is None or found.type is not expected.type:
        return False
    return expected.type is FeatureType.VISUAL or tuple(found.shape) == tuple(expected.shape)


def _names(features: dict[str, PolicyFeature], lacking: list[str] | None = None) -> str:
    told = [f"{key} {list(feature.shape)}" for key, feature in features.items()]
    return ", ".join([*told, *(lacking or [])]) or "nothing"


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"


STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True)
class FrameTable:
    """One row for each frame of a dataset, in the dataset's order.

    Attributes:
        state: Proprioceptive state, float32 [n s].
        action: Action taken at that frame, float32 [n a].
        episode: Episode number, int64 [n].
        episode_end: Row after the last one of the frame's episode, int64 [n].
        task: Index into `tasks`, int64 [n].
        tasks: Instructions.
        fps: Frames a second.
    """

    state: Tensor
    action: Tensor
    episode: Tensor
    episode_end: Tensor
    task: Tensor
    tasks: tuple[str, ...]
    fps: int

    def __len__(self) -> int:
        """Number of frames n."""
        return len(self.action)

    def chunks(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Actions from each row on.

        Args:
            rows: Row numbers [b].
            length: Actions in a chunk t.

        Returns:
            Actions [b t a], the episode's last one repeated beyond its end, and `is_pad` [b t], True there.
        """
        steps = rows[:, None] + torch.arange(length)  # [b t]
        last = (self.episode_end[rows] - 1)[:, None]
        return self.action[torch.minimum(steps, last)], steps > last

    def instructions(self, rows: Tensor) -> list[str]:
        """Instruction of each row, b strings."""
        return [self.tasks[index] for index in self.task[rows].tolist()]

    def rows_of(self, episodes: list[int]) -> Tensor:
        """Rows that belong to the given episodes, in order, int64 [m]."""
        return torch.isin(self.episode, torch.tensor(episodes, dtype=torch.int64)).nonzero()[:, 0]

    def split(self, held_out: float, episodes: list[int] | None = None) -> tuple[list[int], list[int]]:
        """Splits episodes into those to learn from and those held out: the last ones of each task.

        Args:
            held_out: Share of each task's episodes to hold out, rounded up, in [0, 1).
            episodes: Episodes to split; None takes all.

        Returns:
            Training and held-out episode numbers.

        Raises:
            ValueError: If an episode does not exist or nothing would be left to learn from.
        """
        first_rows = torch.cat([torch.zeros(1, dtype=torch.int64), self.episode_end.unique()[:-1]])
        task_of = dict(zip(self.episode[first_rows].tolist(), self.task[first_rows].tolist(), strict=True))
        wanted = sorted(task_of) if episodes is None else episodes
        unknown = [episode for episode in wanted if episode not in task_of]
        if unknown:
            raise ValueError(
                f"dataset.episodes: the dataset has no {unknown}; its episodes are {min(task_of)} to "
                f"{max(task_of)}."
            )
        by_task: dict[int, list[int]] = {}
        for episode in wanted:
            by_task.setdefault(task_of[episode], []).append(episode)
        learned, kept_out = [], []
        for members in by_task.values():
            count = int(np.ceil(len(members) * held_out))
            learned += members[: len(members) - count]
            kept_out += members[len(members) - count :]
        if not learned:
            raise ValueError(
                f"dataset.held_out={held_out} leaves no episode to learn from: the dataset has "
                f"{len(wanted)} episodes of {len(by_task)} tasks. Lower it or collect more."
            )
        return sorted(learned), sorted(kept_out)


def read_table(root: Path) -> FrameTable:
    """Reads the table of a finalized LeRobotDataset v3 on disk.

    Args:
        root: Folder that holds `meta/` and `data/`.

    Returns:
        The table of all episodes.
    """
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


def check_finite(table: FrameTable, rows: Tensor, source: str | Path) -> None:
    """Refuses rows that no policy can learn from.

    Args:
        table: The dataset's table.
        rows: Rows that training will read, [m].
        source: The dataset's place, for the message.

    Raises:
        ValueError: If an action or a state is not a finite number; names the first episode and frame.
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


def _matrix(column: pa.ChunkedArray) -> Tensor:
    """A column of equally long lists as float32 [n width]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.astype(np.float32).reshape(len(column), -1))
