"""The loop: observe all slots, predict one batch of chunks, execute them open loop, repeat.

Time is cut into ticks. In each tick every slot executes the first actions of its row's chunk, and an episode
that ended is followed by the next one of the same slot. Batch shape and row positions never change, and the
noise of a row depends on its episode and on how far it is, not on what the other rows do: so neither the
number of processes nor an interruption can change a result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.env_worker import Outcome, SlotObservation, SlotReport, SlotSpec
from vega_policy.evaluation.episodes import Episode
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    ObservationBatch,
    check_compatible,
    stack_observations,
)


@dataclass(frozen=True)
class FinishedEpisode:
    """An episode that ended.

    Attributes:
        episode: What was played.
        outcome: How it went.
        policy_calls: Number of chunks predicted for it.
    """

    episode: Episode
    outcome: Outcome
    policy_calls: int


@dataclass
class _Row:
    """One slot as the main process sees it."""

    queue: deque[Episode]
    episode: Episode | None = None
    observation: SlotObservation | None = None
    calls: int = 0

    def order(self, actions: np.ndarray | None) -> SlotSpec:
        following = self.queue[0].order() if self.queue else None
        return {"actions": actions, "episode": following}

    def take(self, report: SlotReport) -> FinishedEpisode | None:
        """Follow what the worker did with the last order."""
        outcome, finished = report["outcome"], None
        if self.episode is not None and outcome is not None:
            finished = FinishedEpisode(self.episode, outcome, self.calls)
        if outcome is not None or self.episode is None:
            self.episode, self.calls = (self.queue.popleft() if self.queue else None), 0
        self.observation = report["observation"]
        return finished


@dataclass
class Rollout:
    """Plays episodes with a batched policy.

    Attributes:
        policy: The policy.
        pool: Opened workers.
        action_steps: How many actions of each chunk are executed.
        call_seconds: Duration of every policy call so far.
        last_batch: The last batch that the policy saw.
    """

    policy: ChunkPolicy
    pool: WorkerPool
    action_steps: int
    call_seconds: list[float] = field(default_factory=list)
    last_batch: ObservationBatch | None = None

    def play(self, queues: Sequence[deque[Episode]]) -> Iterator[FinishedEpisode]:
        """Play all episodes and yield each one as it ends.

        Args:
            queues: Episodes of each slot in the order of play; their number is the batch size.

        Raises:
            IncompatiblePolicyError: If the policy does not fit the environment.
            WorkerError: If a simulator failed.
            ValueError: If the policy predicts too few, non-finite or wrongly shaped actions.
        """
        self.policy.reset()
        rows = [_Row(deque(queue)) for queue in queues]
        orders = {slot: row.order(None) for slot, row in enumerate(rows) if row.queue}
        while orders:
            reports = self.pool.advance(orders)
            for slot in sorted(reports):
                finished = rows[slot].take(reports[slot])
                if finished is not None:
                    yield finished
            orders = self._next_orders(rows)

    def _next_orders(self, rows: Sequence[_Row]) -> dict[int, SlotSpec]:
        active = [slot for slot, row in enumerate(rows) if row.episode is not None]
        if not active:
            return {}
        for slot in active:
            self._check(rows[slot])
        actions = self._predict(rows, active)
        for slot in active:
            rows[slot].calls += 1
        return {slot: rows[slot].order(actions[slot]) for slot in active}

    def _check(self, row: _Row) -> None:
        if row.calls == 0 and row.observation is not None:
            check_compatible(self.policy.description, row.observation, reads_frames=self.policy.reads_frames)

    def _predict(self, rows: Sequence[_Row], active: Sequence[int]) -> np.ndarray:
        """Return the actions to execute, float32 [b action_steps a]; those of idle rows mean nothing."""
        description = self.policy.description
        cameras = description.cameras if self.policy.reads_frames else ()
        batch = stack_observations([row.observation for row in rows], cameras)
        noise = None if self.policy.noise_shape is None else _batch_noise(rows, self.policy.noise_shape)
        start = time.perf_counter()
        chunk = self.policy.chunk(batch, noise)
        self.call_seconds.append(time.perf_counter() - start)
        self.last_batch = batch
        expected = (len(rows), self.action_steps, description.action_size)
        _check_chunk(chunk, expected, active)
        return np.asarray(chunk[:, : self.action_steps], dtype=np.float32)


def _batch_noise(rows: Sequence[_Row], shape: tuple[int, int]) -> np.ndarray:
    """Draw the noise of every row, float32 [b t a]; zeros for idle rows."""
    noise = np.zeros((len(rows), *shape), np.float32)
    for index, row in enumerate(rows):
        if row.episode is not None:
            noise[index] = episode_noise(row.episode.seed, row.calls, shape)
    return noise


def episode_noise(seed: int, call: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw the noise of one chunk, standard normal float32 [t a], by episode seed and number of the call."""
    return np.random.default_rng((seed, call)).standard_normal(shape, dtype=np.float32)


def single_call_seconds(
    policy: ChunkPolicy, batch: ObservationBatch, calls: int, warm_up: int = 3
) -> list[float]:
    """Time the policy on one observation at a time, as a robot would ask it.

    Args:
        policy: The policy.
        batch: Observations, of which the first is shown.
        calls: Number of timed calls.
        warm_up: Number of calls before them.
    """
    one = batch.row(0)
    seconds = []
    for call in range(warm_up + calls):
        noise = None if policy.noise_shape is None else episode_noise(0, call, policy.noise_shape)[None]
        start = time.perf_counter()
        policy.chunk(one, noise)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def _check_chunk(chunk: np.ndarray, expected: tuple[int, int, int], active: Sequence[int]) -> None:
    rows, steps, size = expected
    if chunk.ndim != 3 or chunk.shape[0] != rows or chunk.shape[1] < steps or chunk.shape[2] != size:
        raise ValueError(
            f"expected a chunk of shape [{rows}, at least {steps}, {size}], got {list(chunk.shape)}; "
            "action_steps must not exceed the length of the policy's chunk"
        )
    bad = [slot for slot in active if not np.isfinite(chunk[slot, :steps]).all()]
    if bad:
        raise ValueError(f"the policy predicted actions that are not finite (NaN or infinite) in rows {bad}")
