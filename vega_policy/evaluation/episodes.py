"""What is played, in which slot, and what is kept of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from vega_policy.evaluation.worker import EpisodeOrder

FIRST_SEED = 1_000_000
"""Evaluation episodes are reset with seeds from here on; demonstrations use the seeds below."""

EPISODES_PER_SEED = 10_000
"""Seed k of an evaluation owns the episode seeds FIRST_SEED + k * EPISODES_PER_SEED and following."""


class TaskDescription(Protocol):
    """What an evaluation has to know of a task; `envs.base.Task` satisfies it."""

    @property
    def suite(self) -> str:
        """Name of the suite."""
        ...

    @property
    def index(self) -> int:
        """Position in the suite, from 0."""
        ...

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def official_states(self) -> int:
        """Number of official initial states; 0 where there are none."""
        ...

    @property
    def group(self) -> str:
        """Group of the task where the suite has some, else empty."""
        ...


EpisodeKey = tuple[int, int]
"""Index of the task and index of the episode within it: unique in one evaluation of one suite."""


@dataclass(frozen=True)
class Episode:
    """One episode to be played.

    Attributes:
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        index: Index of the episode within the task, from 0.
        seed: Seed of the reset.
        initial_state: Official initial state, or None where the seed alone decides.
    """

    suite: str
    task: str
    task_index: int
    index: int
    seed: int
    initial_state: int | None

    @property
    def key(self) -> EpisodeKey:
        """What identifies the episode within its evaluation."""
        return self.task_index, self.index

    def order(self) -> EpisodeOrder:
        """Return the episode as a worker is told of it."""
        return {
            "suite": self.suite,
            "task_index": self.task_index,
            "seed": self.seed,
            "initial_state": self.initial_state,
        }


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went: a row of episodes.parquet.

    Attributes:
        control: Name of the control it was played under.
        suite: Name of the suite.
        task: Name of the task.
        task_index: Index of the task in its suite.
        index: Index of the episode within the task.
        seed: Seed of the reset.
        success: Whether the simulator's own check was satisfied.
        length: Number of executed actions.
        policy_calls: Number of chunks predicted.
        initial_hash: Short SHA-256 of the simulator state after the reset.
        final_hash: Short SHA-256 of the last simulator state.
    """

    control: str
    suite: str
    task: str
    task_index: int
    index: int
    seed: int
    success: bool
    length: int
    policy_calls: int
    initial_hash: str
    final_hash: str

    @property
    def key(self) -> EpisodeKey:
        """What identifies the episode within its evaluation and control."""
        return self.task_index, self.index


def plan_episodes(
    tasks: Sequence[TaskDescription], episodes_per_task: int, seed: int, *, official_states: bool
) -> list[Episode]:
    """List all episodes of an evaluation, task by task.

    Args:
        tasks: The tasks to evaluate on.
        episodes_per_task: Episodes of each task, 1 to `EPISODES_PER_SEED`.
        seed: Seed of the evaluation, at least 0; different seeds share no episode.
        official_states: Whether episode i starts from the suite's official initial state i.

    Raises:
        ValueError: If there is no task, a number is out of range, or official states are missing.
    """
    if not tasks:
        raise ValueError("expected at least one task to evaluate on, got none")
    if not 1 <= episodes_per_task <= EPISODES_PER_SEED:
        raise ValueError(
            f"expected episodes_per_task in [1, {EPISODES_PER_SEED}], got {episodes_per_task}; "
            "use several seeds for more"
        )
    if seed < 0:
        raise ValueError(
            f"expected a seed of at least 0, got {seed}; lower seeds belong to the demonstrations"
        )
    if official_states:
        _require_official_states(tasks, episodes_per_task)
    first = FIRST_SEED + seed * EPISODES_PER_SEED
    return [
        Episode(task.suite, task.name, task.index, index, first + index, index if official_states else None)
        for task in tasks
        for index in range(episodes_per_task)
    ]


def _require_official_states(tasks: Sequence[TaskDescription], episodes_per_task: int) -> None:
    for task in tasks:
        if task.official_states == 0:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has no official initial states; set "
                "official_states=false, and seeds draw its episodes"
            )
        if episodes_per_task > task.official_states:
            raise ValueError(
                f"{task.name} of suite {task.suite!r} has {task.official_states} official initial states, "
                f"but episodes_per_task is {episodes_per_task}; lower it, or set official_states=false"
            )


def slot_queues(
    episodes: Sequence[Episode], slots: int, finished: Collection[EpisodeKey]
) -> list[deque[Episode]]:
    """Return each slot's episodes in the order of play.

    Where an episode belongs depends on nothing that is finished: that is what makes a resumed evaluation
    equal to an uninterrupted one.

    Args:
        episodes: All episodes of the evaluation.
        slots: Number of slots.
        finished: Keys of the episodes that need not be played again.
    """
    queues: list[deque[Episode]] = [deque() for _ in range(slots)]
    for number, episode in enumerate(episodes):
        if episode.key not in finished:
            queues[slot_of(number, len(episodes), slots)].append(episode)
    return queues


def slot_of(number: int, episodes: int, slots: int) -> int:
    """Return the slot of one of all episodes: each slot plays a stretch of them.

    So a slot stays with one task for as long as it can; building another one's scene costs a LIBERO
    environment as long as an episode.
    """
    return number * slots // episodes
