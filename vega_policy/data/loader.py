"""Training batches, from a cache in memory or from videos that are decoded during training.

Both give LeRobot's batches before pre-processing, for the same rows in the same order. Batches from a cache
involve no per-sample Python and no LeRobot.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vega_policy.data.dataset import ACTION, DISPLACEMENT, EXECUTED, STATE, FrameTable
from vega_policy.run_dir import free_space

Batch = dict[str, Any]
_PREFETCHED = 2  # batches of each decoding process, torch's default
_SHARED_MEMORY = Path("/dev/shm")  # where torch passes tensors between processes


class ShuffledRows:
    """An endless sequence of shuffled passes over rows [n], cut into batches.

    Batch k depends on seed and k only, so a resumed run needs no state, and each of several processes takes
    its own part of the same global batch. `batch_size` is that of one process.

    With `shares`, the number of rows and the weight of each dataset of a mixture, whose rows follow each
    other: each n samples hold as many of a dataset as its weight says, to the nearest one, and a dataset
    repeats a row only after all of its rows.
    """

    def __init__(
        self,
        rows: Tensor,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shares: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self._shares = shares
        self._passes: dict[int, Tensor] = {}

    def batch(self, number: int) -> Tensor:
        """Return the rows of batch `number` (from 0) for this process, [batch_size]."""
        first = (number * self.world + self.rank) * self.batch_size
        positions = torch.arange(first, first + self.batch_size)
        passes, offsets = positions // len(self.rows), positions % len(self.rows)
        needed = range(int(passes[0]), int(passes[-1]) + 1)
        self._passes = {index: self._permutation(index) for index in needed}
        picked = [self._passes[index][offsets[passes == index]] for index in needed]
        return self.rows[torch.cat(picked)]

    def _permutation(self, index: int) -> Tensor:
        if index in self._passes:
            return self._passes[index]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        if self._shares is None:
            return torch.randperm(len(self.rows), generator=generator)
        whole = sum(weight for _, weight in self._shares)
        picked, start, cumulative = [], 0, 0.0
        bounds = [[0, 0]]  # samples of this and earlier datasets, before and after this pass
        for part, (length, weight) in enumerate(self._shares):
            cumulative += weight
            bounds.append([round(len(self.rows) * k * cumulative / whole) for k in (index, index + 1)])
            begin, end = (now - before for now, before in zip(bounds[-1], bounds[-2], strict=True))
            picked.append(start + self._sequence(part, length, begin, end))
            start += length
        joined = torch.cat(picked)
        return joined[torch.randperm(len(joined), generator=generator)]

    def _sequence(self, part: int, length: int, begin: int, end: int) -> Tensor:
        """Return samples `begin` to `end` of one dataset's own endless sequence of shuffled passes."""
        passes = range(begin // length, -(-end // length))
        shuffled = []
        for index in passes:
            seed = (self.seed * 1_000_003 + (part + 1) * 7_368_787 + index) % 2**63
            shuffled.append(torch.randperm(length, generator=torch.Generator().manual_seed(seed)))
        if not shuffled:
            return torch.empty(0, dtype=torch.int64)
        skipped = begin - passes[0] * length
        return torch.cat(shuffled)[skipped : skipped + end - begin]


class PairedRows(ShuffledRows):
    """Batches of pairs: each row of `ShuffledRows` is followed by its counterpart.

    That is the row at the same phase of another episode of the same instruction, drawn from another dataset
    of the mixture where one has it: the scene, and so the action, differs, and the sentence does not (after
    arXiv 2609.39971). Batch k depends on seed and k only here too. `rows` rise; the datasets of a mixture
    begin at the rows `starts` of the table.
    """

    def __init__(
        self,
        rows: Tensor,
        batch_size: int,
        *,
        table: FrameTable,
        starts: Sequence[int] = (0,),
        **order: Any,
    ) -> None:
        super().__init__(rows, batch_size // 2, **order)
        episodes = table.episode[rows].unique_consecutive(return_inverse=True, return_counts=True)
        _, self._episode, self._lengths = episodes
        self._firsts = self._lengths.cumsum(0) - self._lengths  # positions in `rows`
        task = table.task[rows[self._firsts]]
        part = torch.searchsorted(torch.tensor(starts), rows[self._firsts], right=True)
        others: list[Tensor] = []  # of each episode, those from which its counterparts come
        for number in range(len(task)):
            alike = task == task[number]
            alike[number] = False
            elsewhere = alike & (part != part[number])
            others.append((elsewhere if elsewhere.any() else alike).nonzero()[:, 0])
            if not alike.any():
                raise ValueError(
                    "dataset.pairs=true needs two training episodes of each instruction; "
                    f"{table.tasks[int(task[number])]!r} has one. Collect more, or set dataset.pairs=false."
                )
        self._others, self._counts = torch.cat(others), torch.tensor([len(one) for one in others])

    def batch(self, number: int) -> Tensor:
        """Return the rows of batch `number` (from 0) for this process, pair by pair, [batch_size]."""
        rows = super().batch(number)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + 15_485_863 + number) % 2**63)
        draws = torch.randint(2**62, (self.world, len(rows)), generator=generator)[self.rank]
        places = torch.searchsorted(self.rows, rows)
        episode = self._episode[places]
        starts = self._counts.cumsum(0) - self._counts
        other = self._others[starts[episode] + draws % self._counts[episode]]
        phase = (places - self._firsts[episode]) / (self._lengths[episode] - 1).clamp(min=1)
        step = (phase * (self._lengths[other] - 1)).round().long()
        return torch.stack([rows, self.rows[self._firsts[other] + step]], dim=1).flatten()


class Source(Protocol):
    """Gives batches of chosen rows."""

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Yield the batches of `sampler` endlessly, from number `first` on."""
        ...

    def batch(self, rows: Tensor) -> Batch:
        """Return the batch of some rows [b]."""
        ...


class CachedSource:
    """Batches by index from arrays of the whole dataset, in memory or on a device, [n v ...] by stream.

    A batch has `observation.state` [b s], `action` [b t a], `action_is_pad` [b t], `task`, and of the cached
    streams `vega.<stream>` with the type and place of the array: frames stay uint8 until they are on the
    device, which copies a quarter of the bytes. Where the streams hold only some rows of the table, `stored`
    [n] are these, in order.

    With `future`, k numbers of control steps, it also has what the cameras see so many steps later:
    `vega.future_semantic` [b k v ...] if that is cached, else `vega.future_frames`, and
    `vega.future_is_pad` [b k], True behind the end of the episode, where the present row is repeated.
    """

    def __init__(
        self,
        table: FrameTable,
        streams: Mapping[str, Tensor],
        chunk_size: int,
        stored: Tensor | None = None,
        future: Sequence[int] = (),
    ) -> None:
        self._table, self._streams, self._chunk_size = table, streams, chunk_size
        self._stored, self._future = stored, torch.tensor(future, dtype=torch.int64)

    def batch(self, rows: Tensor) -> Batch:
        """Return the batch of some rows [b]."""
        batch = _low_dimensional(self._table, rows, self._chunk_size)
        for name in self._streams:
            batch[f"vega.{name}"] = self._take(name, rows)
        if len(self._future):
            later = rows[:, None] + self._future  # [b k]
            is_pad = later >= self._table.episode_end[rows][:, None]
            later = torch.where(is_pad, rows[:, None], later)
            name = "semantic" if "semantic" in self._streams else "frames"
            values = self._take(name, later.flatten()).unflatten(0, later.shape)
            batch |= {f"vega.future_{name}": values, "vega.future_is_pad": is_pad}
        return batch

    def _take(self, name: str, rows: Tensor) -> Tensor:
        """Return a stream's values of some rows of the table [b]."""
        values = self._streams[name]
        rows = rows if self._stored is None else torch.searchsorted(self._stored, rows)
        return values.index_select(0, rows.to(values.device))

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Yield the batches of `sampler` endlessly, from number `first` on."""
        return (self.batch(sampler.batch(number)) for number in count(first))


class MixedSource:
    """Batches of a mixture: each row comes from the source of its dataset, which begins at row `starts`."""

    def __init__(self, sources: Sequence[CachedSource], starts: Sequence[int]) -> None:
        self._sources, self._starts = sources, torch.tensor(starts)

    def batch(self, rows: Tensor) -> Batch:
        """Return the batch of some rows [b]."""
        owner = torch.searchsorted(self._starts, rows, right=True) - 1
        batch: Batch = {}
        for part in owner.unique().tolist():
            places = (owner == part).nonzero()[:, 0]
            for name, values in self._sources[part].batch(rows[places] - self._starts[part]).items():
                if torch.is_tensor(values):
                    if name not in batch:
                        batch[name] = values.new_empty((len(rows), *values.shape[1:]))
                    batch[name][places.to(values.device)] = values
                else:
                    texts = batch.setdefault(name, [""] * len(rows))
                    for place, text in zip(places.tolist(), values, strict=True):
                        texts[place] = text
        return batch

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Yield the batches of `sampler` endlessly, from number `first` on."""
        return (self.batch(sampler.batch(number)) for number in count(first))


class MixedFrames(Dataset):
    """Frames of a mixture by row: those of each dataset, which begins at row `starts`."""

    def __init__(self, parts: Sequence[Any], starts: Sequence[int]) -> None:
        self._parts, self._starts = parts, starts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]] | {"row": row}


def join_tables(tables: Sequence[FrameTable]) -> FrameTable:
    """Return one table of the rows of several, with episodes numbered on."""
    if len(tables) == 1:
        return tables[0]
    optional = {name: [getattr(table, name) for table in tables] for name in ("displacement", "executed")}
    sentences = list(dict.fromkeys(text for table in tables for text in table.tasks))
    row, number, ends, episodes, tasks = 0, 0, [], [], []
    for table in tables:
        ends.append(table.episode_end + row)
        episodes.append(table.episode + number)
        tasks.append(torch.tensor([sentences.index(text) for text in table.tasks])[table.task])
        row, number = row + len(table), number + int(table.episode.max()) + 1
    return FrameTable(
        state=torch.cat([table.state for table in tables]),
        action=torch.cat([table.action for table in tables]),
        episode=torch.cat(episodes),
        episode_end=torch.cat(ends),
        task=torch.cat(tasks),
        tasks=tuple(sentences),
        fps=tables[0].fps,
        **{name: torch.cat(known) for name, known in optional.items() if all(x is not None for x in known)},
    )


def _low_dimensional(table: FrameTable, rows: Tensor, chunk_size: int) -> Batch:
    action, is_pad = table.chunks(rows, chunk_size)
    task = table.instructions(rows)
    batch = {STATE: table.state[rows], ACTION: action, "action_is_pad": is_pad, "task": task}
    if table.displacement is not None:
        batch[f"vega.{DISPLACEMENT}"] = table.displacement[rows]
    if table.executed is not None:
        batch[f"vega.{EXECUTED}"], _ = table.chunks(rows, chunk_size, table.executed)
    return batch


class VideoSource:
    """Batches whose frames are decoded around each row; the rest is the table's, as with a cache.

    `frames` gives `row` and frames by camera, uint8. `workers` processes decode, 0 for this one; `seed` is
    that of their random states.
    """

    def __init__(self, table: FrameTable, frames: Dataset, chunk_size: int, workers: int, seed: int) -> None:
        self._table, self._dataset, self._chunk_size, self._workers = table, frames, chunk_size, workers
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: Tensor) -> Batch:
        """Return the batch of some rows [b]."""
        return next(self._load([rows.tolist()], workers=0))

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Yield the batches of `sampler` endlessly, from number `first` on.

        Raises:
            ValueError: If the batches of the decoding processes do not fit into shared memory.
        """
        if self._workers:
            row = self._dataset[int(sampler.rows[0])]
            size = sum(
                value.numel() * value.element_size() for value in row.values() if torch.is_tensor(value)
            )
            check_shared_memory(size * sampler.batch_size * self._workers * _PREFETCHED, self._workers)
        return self._load(_RowLists(sampler, first), self._workers)

    def _load(self, row_lists: Any, workers: int) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=row_lists,
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            multiprocessing_context="forkserver" if workers else None,
            generator=self._generator,  # leaves the process's own random state alone
            pin_memory=torch.cuda.is_available(),
        )
        for decoded in loader:
            rows = decoded.pop("row")
            frames = {camera: clip.float() / 255 for camera, clip in decoded.items()}
            yield _low_dimensional(self._table, rows, self._chunk_size) | frames


def check_shared_memory(needed: int, workers: int) -> None:
    """Refuse decoding processes whose batches of `needed` bytes do not fit into shared memory.

    Without this check a process would die of a bus error.

    Raises:
        ValueError: If less is free; without this check a process would die of a bus error.
    """
    if _SHARED_MEMORY.is_dir() and (free := free_space(_SHARED_MEMORY)) < needed:
        raise ValueError(
            f"dataset.workers={workers} needs about {needed} bytes of shared memory, and {_SHARED_MEMORY} "
            f"has {free} free. Set dataset.workers=0, or give the container more (docker run --shm-size=2g)."
        )


class _RowLists:
    """The batches of a sampler as lists of rows, which a DataLoader requires."""

    def __init__(self, sampler: ShuffledRows, first: int) -> None:
        self._sampler, self._first = sampler, first

    def __iter__(self) -> Iterator[list[int]]:
        return (self._sampler.batch(number).tolist() for number in count(self._first))
