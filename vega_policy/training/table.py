"""All states, actions and instructions of a LeRobot dataset as arrays in memory, without its videos."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

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
