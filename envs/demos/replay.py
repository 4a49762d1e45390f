"""Demonstrations of a collected dataset as physics again: states, actions, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.base import Task
from envs.demos.shards import Recording, read_metadata


@dataclass(frozen=True)
class StoredEpisode:
    """One episode of a collected dataset.

    Attributes:
        index: Its index in the dataset.
        task: What was demonstrated.
        recording: Seed, simulator states, actions.
    """

    index: int
    task: Task
    recording: Recording


def collected_metadata(root: Path) -> dict[str, Any]:
    """Return the metadata of a collected dataset.

    Raises:
        FileNotFoundError: If `root` holds no dataset that this package collected.
    """
    metadata = read_metadata(root)
    if metadata is None:
        raise FileNotFoundError(
            f"{root} holds no dataset collected by scripts/collect_demos.py (no meta/vega.json): its "
            "simulator states are not known"
        )
    return metadata


def read_episodes(root: Path, indices: Sequence[int] | None = None) -> list[StoredEpisode]:
    """Read episodes of a collected dataset with their simulator states.

    Args:
        root: Folder of the dataset.
        indices: Which ones; None reads all.

    Raises:
        FileNotFoundError: If `root` holds no dataset that this package collected.
        ValueError: If an episode does not exist, a file is damaged, or states and actions do not belong
            together.
    """
    metadata = collected_metadata(root)
    tasks = {task.name: task for task in envs.tasks(metadata["settings"]["suite"])}
    count = len(metadata["episodes"])
    chosen = list(range(count)) if indices is None else list(indices)
    unknown = [index for index in chosen if not 0 <= index < count]
    if unknown:
        raise ValueError(f"{root} has the episodes 0 to {count - 1}, got {unknown}")
    actions, states = _actions(root), _states(root)
    return [_episode(root, index, metadata["episodes"][index], tasks, actions, states) for index in chosen]


def _episode(
    root: Path,
    index: int,
    entry: dict[str, Any],
    tasks: dict[str, Task],
    actions: dict[int, np.ndarray],
    states: dict[int, np.ndarray],
) -> StoredEpisode:
    played, seen = len(actions.get(index, ())), len(states.get(index, ()))
    if not played == seen == entry["length"]:
        raise ValueError(
            f"episode {index} of {root} has {entry['length']} steps, but {played} actions and "
            f"{seen} simulator states are stored: the dataset was changed or is damaged; "
            "collect it again"
        )
    return StoredEpisode(index, tasks[entry["task"]], Recording(entry["seed"], states[index], actions[index]))


def _actions(root: Path) -> dict[int, np.ndarray]:
    """Return the actions float32 [t a] of each episode, from the dataset's tables."""
    import pyarrow
    import pyarrow.parquet

    by_episode: dict[int, list[np.ndarray]] = {}
    for path in sorted((root / "data").rglob("*.parquet")):
        try:
            table = pyarrow.parquet.read_table(path, columns=["episode_index", "action"])
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from None
        rows = np.stack(table["action"].to_numpy()).astype(np.float32)
        episodes = table["episode_index"].to_numpy()
        for index in np.unique(episodes):
            by_episode.setdefault(int(index), []).append(rows[episodes == index])
    return {index: np.concatenate(parts) for index, parts in by_episode.items()}


def _states(root: Path) -> dict[int, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    states: dict[int, np.ndarray] = {}
    for path in sorted((root / "states").glob("*.safetensors")):
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error) from None
        states |= {int(name.removeprefix("episode_")): value for name, value in stored.items()}
    return states


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(
        f"{path} is damaged or was not written to its end ({reason}); collect or copy the dataset again"
    )
