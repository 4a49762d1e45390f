"""Recorded actions played again open loop, by the workers that evaluate policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vega_policy.evaluation.pool import WorkerPool
from vega_policy.evaluation.worker import EpisodeOrder


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode as it was recorded.

    Attributes:
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        seed: Seed of the reset.
        start: Simulator state before the first action, float64 [n].
        actions: Executed actions, float32 [t a].
    """

    suite: str
    task: str
    task_index: int
    seed: int
    start: np.ndarray
    actions: np.ndarray


def replay(
    episodes: Sequence[RecordedEpisode], pool: WorkerPool, *, slots: int
) -> Iterator[tuple[RecordedEpisode, bool]]:
    """Put each episode's initial state back, play its actions, and say whether that is a success.

    Args:
        episodes: What was recorded.
        pool: Workers; nothing is rendered.
        slots: Episodes played at a time.

    Raises:
        WorkerError: If a simulator failed.
    """
    pool.open(render=False, keep_states=False)
    for first in range(0, len(episodes), slots):
        batch = dict(enumerate(episodes[first : first + slots]))
        pool.advance({slot: {"actions": None, "episode": _start(one)} for slot, one in batch.items()})
        reports = pool.advance(
            {slot: {"actions": one.actions, "episode": None} for slot, one in batch.items()}
        )
        for slot, episode in batch.items():
            outcome = reports[slot]["outcome"]
            yield episode, outcome is not None and outcome["success"]


def _start(episode: RecordedEpisode) -> EpisodeOrder:
    return {
        "suite": episode.suite,
        "task_index": episode.task_index,
        "seed": episode.seed,
        "initial_state": None,
        "start": episode.start,
    }
