"""What a server needs of a policy, beyond what the evaluation harness does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vega_policy.evaluation.policies import ChunkPolicy, ObservationBatch


@dataclass(frozen=True)
class Continuation:
    """What real-time chunking needs to know of the chunk that is being executed.

    Attributes:
        actions: Actions still to be executed, float32 [t a], in the robot's units.
        delay: How many of them will have been executed when the new chunk arrives.
        horizon: Up to which of them the new chunk is guided.
        guidance: Largest weight of the guidance.
    """

    actions: np.ndarray
    delay: int
    horizon: int
    guidance: float


class ServablePolicy(ChunkPolicy, Protocol):
    """A chunk policy that a server can offer."""

    @property
    def fingerprint(self) -> str:
        """Hash over the checkpoint's files."""
        ...

    @property
    def continues(self) -> bool:
        """Whether `continue_chunk` works."""
        ...

    def continue_chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, continuation: Continuation
    ) -> np.ndarray:
        """Predict a chunk for one row that goes on from the last one, float32 [1 t a]."""
        ...
