"""Files of a LeRobotDataset v3 in a local folder: reading, writing, and which are missing or damaged."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

STATE, ACTION, DISPLACEMENT = "observation.state", "action", "displacement"
EXECUTED = "executed_action"
"""The action with its noise, as executed. What begins with `action` LeRobot takes for a policy's output."""
FORMAT = "v3.0"
_SAMPLE = 1 << 16
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BOX_HEADER = struct.Struct(">I4s")
"""Size and type of an MP4 box (ISO/IEC 14496-12); a size of 1 means that 64 bits of it follow."""


class DatasetError(ValueError):
    """The dataset is missing or does not fit the policy."""


def list_files(folder: Path, suffix: str) -> list[Path]:
    """Return all files of a suffix below a folder, sorted, without the `._` files that macOS adds."""
    return sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may begin with a byte-order mark.

    Raises:
        DatasetError: If it is missing, a Git LFS pointer, or no JSON.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing. Collect or download the dataset again.")
    if is_lfs_pointer(path):
        raise DatasetError(f"{path} is a Git LFS pointer, not the file. {lfs_advice(path.parents[1])}")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise DatasetError(f"{path} is no JSON ({error}). Collect or download the dataset again.") from error


def read_info(root: Path) -> dict[str, Any]:
    """Return `meta/info.json` of a dataset, with the fields that this package reads.

    Raises:
        DatasetError: If the file cannot be read, or names files outside the dataset.
    """
    path = root / "meta" / "info.json"
    info = read_json(path)
    features = info.get("features") if isinstance(info, dict) else None
    kinds = features.values() if isinstance(features, dict) else [None]
    described = all(isinstance(one, dict) and isinstance(one.get("dtype"), str) for one in kinds)
    if not described or not isinstance(info.get("total_frames"), int):
        raise DatasetError(
            f"{path}: expected total_frames and features with a dtype each. Collect or download the dataset "
            "again."
        )
    for field in ("data_path", "video_path"):
        pattern = Path(str(info.get(field)))
        if pattern.is_absolute() or ".." in pattern.parts:
            raise DatasetError(f"{path}: expected {field} to be inside the dataset, got {str(pattern)!r}.")
    return info


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the pointer that Git leaves where Git LFS did not download."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def lfs_advice(root: Path) -> str:
    """Return what to do about Git LFS pointers."""
    return f"Download the files: git -C {root} lfs pull"


def check_version(root: Path, repo_id: str) -> None:
    """Refuse a dataset of another format than v3.

    Raises:
        DatasetError: Names the command that converts it.
    """
    info = read_json(root / "meta" / "info.json")
    version = str(info.get("codebase_version") if isinstance(info, dict) else None)
    if version.startswith("v3."):
        return
    advice = "Update this package, or convert the dataset."
    if version.startswith("v2.1"):
        advice = (
            "Convert a copy of it: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id={repo_id} --root={root} --push-to-hub=false"
        )
    elif version.startswith(("v1.", "v2.")):
        advice = (
            "Convert it to v2.1 with lerobot==0.3.3, then to v3.0 with LeRobot's convert_dataset_v21_to_v30."
        )
    raise DatasetError(f"{root}: expected a LeRobotDataset {FORMAT}, got {version}. {advice}")


def describe_missing_dataset(root: Path, command: str | None = None) -> str:
    """Return what a folder without a dataset holds and what to do; `command` is the one that collects it."""
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) if root.is_dir() else None
    if found is None:
        found = "a file" if root.exists() else "no such folder"
    return (
        f"No demonstrations in {root}: expected the folder of a finalized LeRobotDataset (meta/info.json), "
        f"found {found or 'an empty folder'}. {_advise(root, command)}"
    )


def _advise(root: Path, command: str | None) -> str:
    if root.suffix == ".safetensors" and root.is_file():
        return f"Render a file of states first: vega-render {root} root=FOLDER repo_id=ORG/NAME"
    near = [root.parent, *(sorted(root.iterdir()) if root.is_dir() else ())]
    if found := [str(folder) for folder in near if (folder / "meta" / "info.json").is_file()]:
        return f"Did you mean {' or '.join(found[:3])}?"
    if command:
        return f"Collect them first: {command}"
    return "Give the folder of a dataset, or collect demonstrations first: vega-collect env=SUITE root=FOLDER"


def find_damaged_files(root: Path) -> list[str]:
    """Return one phrase for each unreadable or truncated file of a LeRobotDataset v3, and for missing rows.

    Only headers and footers are read, which takes milliseconds a file.
    """
    findings, rows = [], 0
    for path in list_files(root, ".parquet"):
        name = path.relative_to(root)
        if is_lfs_pointer(path):
            findings.append(f"{name} is a Git LFS pointer")
            continue
        try:
            held = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
            findings.append(f"{name} is no whole Parquet file ({path.stat().st_size} bytes)")
            continue
        rows += held if name.parts[0] == "data" else 0
    announced = read_info(root)["total_frames"]
    if not findings and rows != announced:
        findings.append(f"data/ holds {rows} rows, meta/info.json announces {announced}")
    for path in list_files(root / "videos", ".mp4"):
        if is_lfs_pointer(path):
            findings.append(f"{path.relative_to(root)} is a Git LFS pointer")
        elif not _is_whole(path):
            findings.append(f"{path.relative_to(root)} is truncated")
    return findings


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


def fingerprint_frames(root: Path) -> dict[str, str]:
    """Return a hash of each part of a dataset on which cached frames and features depend.

    A dataset with executed actions has the same frames, and so the same hashes, as one without.
    """
    info, content = read_info(root), (root / "meta" / "info.json").read_bytes()
    features = info["features"]
    stored_as = "data" if any(one["dtype"] == "image" for one in features.values()) else "videos"
    if features.pop(EXECUTED, None) is not None:
        content = _encode_info(info).encode()
    files = [path for path in list_files(root / stored_as, "") if path.is_file()]
    episodes = list_files(root / "meta" / "episodes", ".parquet")
    return {
        "features": hash_bytes(content),
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


def read_episodes(root: Path) -> pd.DataFrame:
    """Return the rows of `meta/episodes` in the order of episodes, without the episodes' statistics.

    Raises:
        DatasetError: If there are none.
    """
    files = list_files(root / "meta" / "episodes", ".parquet")
    if not files:
        raise DatasetError(
            f"{root}: expected meta/episodes/chunk-*/file-*.parquet, found none. Collect or download the "
            "dataset again."
        )
    tables = []
    for file in files:
        names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        tables.append(pq.read_table(file, columns=names).to_pandas())
    return pd.concat(tables, ignore_index=True).sort_values("episode_index", ignore_index=True)


def read_tasks(root: Path) -> dict[int, str]:
    """Return the instructions by index, of `meta/tasks.parquet` in any of the forms that writers give it.

    The sentences are the table's index or a column `task`; other columns are ignored.

    Raises:
        DatasetError: If the file is missing or holds no sentences.
    """
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise DatasetError(
            f"{path} is missing: the policy reads an instruction with every frame. Collect or download the "
            "dataset again, or give one instruction for all frames: dataset.task='...'"
        )
    columns = pq.read_table(path).to_pydict()
    named = [name for name in ("task", "__index_level_0__") if name in columns]
    text = [name for name, values in columns.items() if values and isinstance(values[0], str)]
    if "task_index" not in columns or not (named or len(text) == 1):
        raise DatasetError(
            f"{path}: expected the columns task_index and task, got {', '.join(columns)}. Rename them, or "
            "give one instruction for all frames: dataset.task='...'"
        )
    return dict(zip(columns["task_index"], columns[(named or text)[0]], strict=True))


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class LowDimensionalEpisode:
    """What a dataset holds of an episode beside its frames."""

    state: np.ndarray  # proprioception, float32 [t s]
    action: np.ndarray  # float32 [t a]
    instruction: str
    displacement: np.ndarray | None = None  # of the target from the gripper, float32 [t 3] m, where known
    executed: np.ndarray | None = None  # actions with their noise, float32 [t a], where known


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
    if DISPLACEMENT in features:
        values[DISPLACEMENT] = np.concatenate([np.asarray(episode.displacement) for episode in episodes])
    if EXECUTED in features:
        values[EXECUTED] = np.concatenate([np.asarray(episode.executed) for episode in episodes])
    tasks = list(dict.fromkeys(instructions))
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    task_index = np.repeat([tasks.index(instruction) for instruction in instructions], lengths)
    pq.write_table(_frame_rows(values, lengths, task_index, fps), root / "data/chunk-000/file-000.parquet")
    pq.write_table(_episode_rows(lengths, instructions), root / "meta/episodes/chunk-000/file-000.parquet")
    named = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task"))
    named.to_parquet(root / "meta" / "tasks.parquet")
    stats = {name: describe_values(array) for name, array in values.items()}
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
    (root / "meta" / "info.json").write_text(_encode_info(info))


def _encode_info(info: dict[str, Any]) -> str:
    """Return the text of `meta/info.json`, on whose bytes the hashes of `fingerprint_frames` depend."""
    return json.dumps(info, indent=4)


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


def describe_values(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, list[Any]]:
    """Return the statistics that LeRobot stores of a feature [n width], of rows that weigh [n] each."""
    exact = values.astype(np.float64)
    found = {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0), "std": exact.std(0)}
    how: dict[str, Any] = {}
    if weights is not None:
        mean = np.average(exact, axis=0, weights=weights)
        found |= {"mean": mean, "std": np.sqrt(np.average((exact - mean) ** 2, axis=0, weights=weights))}
        how = {"weights": weights, "method": "inverted_cdf"}
    found |= {name: np.quantile(exact, fraction, axis=0, **how) for name, fraction in QUANTILES.items()}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}
