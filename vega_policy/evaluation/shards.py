"""An evaluation played by several machines: each takes some of the slots, one gathers.

A shard plays the slots s with s modulo the number of shards equal to its own, in a batch of full size, so
that every episode ends as it would have in one piece.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vega_policy.evaluation.run_folder import (
    EPISODES_FILE,
    PROGRESS_FILE,
    SETTINGS_FILE,
    SHARD_FOLDER,
    TRAJECTORY_FOLDER,
    Progress,
    RunFolder,
    Trajectories,
    read_episodes,
    require_equal,
)


@dataclass(frozen=True)
class Shard:
    """One of several parts of an evaluation.

    Attributes:
        index: Which one, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a shard that does not exist.

        Raises:
            ValueError: If the index is not below the count.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shards are counted from 0: expected shard in [0, {self.count - 1}] with "
                f"shards={self.count}, got {self.index}"
            )

    def folder(self, output_dir: Path) -> Path:
        """Return where it is played; the whole evaluation lies in `output_dir` itself."""
        return output_dir if self.count == 1 else output_dir / SHARD_FOLDER / f"{self.index}_of_{self.count}"

    def plays(self, slot: int) -> bool:
        """Tell whether it plays a slot."""
        return slot % self.count == self.index


def gather(folder: RunFolder, trajectories: Trajectories, kept_control: str) -> int:
    """Take over what shards have finished; return the number of episodes.

    Args:
        folder: The whole evaluation.
        trajectories: Its simulator states.
        kept_control: Control whose states are kept.

    Raises:
        OtherRunError: If a shard was played with other settings.
    """
    taken = 0
    for path in sorted((folder.path / SHARD_FOLDER).glob("*_of_*")):
        if not (path / EPISODES_FILE).is_file():
            continue
        require_equal(path, json.loads((path / SETTINGS_FILE).read_text()), folder.settings)
        fresh = [result for result in read_episodes(path) if not folder.has(result)]
        if not fresh:
            continue
        states = Trajectories(path / TRAJECTORY_FOLDER, 0)
        for result in fresh:
            if result.control == kept_control:
                trajectories.offer(result, states.load(result))
        folder.progress.absorb(Progress(path / PROGRESS_FILE))
        folder.add(fresh)
        taken += len(fresh)
    return taken
