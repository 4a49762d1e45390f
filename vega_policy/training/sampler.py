"""The order in which frames are visited, as a pure function of seed and position."""

import torch
from torch import Tensor


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
