"""Where training batches come from: a cache in memory, or videos decoded on the way.

Both give LeRobot's batches before pre-processing, for the same rows in the same order. What a cache gives
passes through no per-sample Python and imports no lerobot.
"""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vega_policy.data.dataset import ACTION, STATE, FrameTable


class ShuffledRows:
    """An endless sequence of shuffled passes over some rows, cut into batches.

    Batch k is the same whenever and wherever it is asked for, so a resumed run needs no state, and each
    process of several takes its own slice of the same global batch.
    """

    def __init__(self, rows: Tensor, batch_size: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        """Remembers what to shuffle.

        Args:
            rows: Row numbers to visit, [n], n >= 1.
            batch_size: Rows in one process's batch.
            seed: Seed of every pass's order.
            rank: This process, 0 <= rank < world.
            world: Number of processes.
        """
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self._passes: dict[int, Tensor] = {}

    def batch(self, number: int) -> Tensor:
        """Rows of batch `number` (from 0) for this process, [batch_size]."""
        first = (number * self.world + self.rank) * self.batch_size
        positions = torch.arange(first, first + self.batch_size)
        passes, offsets = positions // len(self.rows), positions % len(self.rows)
        wanted = range(int(passes[0]), int(passes[-1]) + 1)
        self._passes = {index: self._order(index) for index in wanted}
        picked = [self._passes[index][offsets[passes == index]] for index in wanted]
        return self.rows[torch.cat(picked)]

    def _order(self, index: int) -> Tensor:
        """Permutation of pass `index`, [n]."""
        if index in self._passes:
            return self._passes[index]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        return torch.randperm(len(self.rows), generator=generator)


Batch = dict[str, Any]


class Source(Protocol):
    """Gives batches of chosen rows."""

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Batches of `sampler`, endlessly, from number `first` on."""
        ...

    def batch(self, rows: Tensor) -> Batch:
        """The batch of some rows [b]."""
        ...


class CachedSource:
    """Batches by index from arrays that hold the whole dataset.

    A batch has `observation.state` [b s], `action` [b t a], `action_is_pad` [b t], `task`, and of the cached
    streams `vega.<stream>` as they are stored and where they are: frames stay uint8 until they are on the
    device, a quarter of the way's bytes.
    """

    def __init__(self, table: FrameTable, streams: Mapping[str, Tensor], chunk_size: int) -> None:
        """Refers to the arrays; nothing is copied.

        Args:
            table: States, actions, instructions.
            streams: Cached values by stream, [n v ...], in memory or on a device.
            chunk_size: Actions in a chunk t.
        """
        self._table, self._streams, self._chunk_size = table, streams, chunk_size

    def batch(self, rows: Tensor) -> Batch:
        """The batch of some rows [b]."""
        action, is_pad = self._table.chunks(rows, self._chunk_size)
        batch: Batch = {STATE: self._table.state[rows], ACTION: action, "action_is_pad": is_pad}
        batch["task"] = self._table.instructions(rows)
        for name, values in self._streams.items():
            batch[f"vega.{name}"] = values.index_select(0, rows.to(values.device))
        return batch

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Batches of `sampler`, endlessly, from number `first` on."""
        return (self.batch(sampler.batch(number)) for number in count(first))


class VideoSource:
    """Batches through LeRobotDataset, which decodes the videos around each row."""

    def __init__(self, dataset: Dataset, cameras: list[str], workers: int, seed: int) -> None:
        """Remembers how to load.

        Args:
            dataset: LeRobotDataset over all episodes, its frames uint8 or float in [0, 1].
            cameras: Camera keys.
            workers: Decoding processes; 0 decodes in this one.
            seed: Seed of the workers' random states.
        """
        self._dataset, self._cameras, self._workers = dataset, cameras, workers
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: Tensor) -> Batch:
        """The batch of some rows [b]."""
        return next(self._load([rows.tolist()], workers=0))

    def stream(self, sampler: ShuffledRows, first: int) -> Iterator[Batch]:
        """Batches of `sampler`, endlessly, from number `first` on."""
        return self._load(_RowLists(sampler, first), self._workers)

    def _load(self, row_lists: Any, workers: int) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=row_lists,
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
            generator=self._generator,  # the process's own random state is not touched
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            for camera in self._cameras:
                if batch[camera].dtype == torch.uint8:
                    batch[camera] = batch[camera].float() / 255
            yield batch


class _RowLists:
    """The sampler's batches as lists, which is what a DataLoader takes."""

    def __init__(self, sampler: ShuffledRows, first: int) -> None:
        self._sampler, self._first = sampler, first

    def __iter__(self) -> Iterator[list[int]]:
        return (self._sampler.batch(number).tolist() for number in count(self._first))
