"""Batched closed-loop rollout: observe all environments, predict one batch of chunks, execute them, repeat.

Time is divided into ticks. In each tick every environment executes the first actions of its row's chunk, and
an episode that ended is followed by the next one of the same environment. Batch shape and row positions never
change, and the noise of a row depends on its episode and the number of the call alone: so neither the number
of processes nor an interruption can change a result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.env_worker import EnvCommand, EnvObservation, EnvReport, Outcome
from vega_policy.evaluation.episodes import Episode
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    ObservationBatch,
    check_compatible,
    stack_observations,
)


@dataclass(frozen=True)
class FinishedEpisode:
    """An episode that ended, its outcome, and the number of chunks that were predicted for it."""

    episode: Episode
    outcome: Outcome
    policy_calls: int


class Plan(Protocol):
    """What an environment executes between two predictions of an episode, if not a chunk's first actions."""

    def context(self) -> Any:
        """Return what a policy with real-time chunking is given besides the observation, or None."""
        ...

    def advance(self, chunk: np.ndarray) -> np.ndarray:
        """Return the commands [n a], n >= 1, executed from a chunk's observation until the next one."""
        ...


@dataclass
class _Row:
    """State of one environment in the main process."""

    queue: deque[Episode]
    make_plan: Callable[[], Plan] | None = None
    plan: Plan | None = None
    episode: Episode | None = None
    observation: EnvObservation | None = None
    calls: int = 0

    def command(self, actions: np.ndarray | None) -> EnvCommand:
        return {"actions": actions, "episode": self.queue[0].spec() if self.queue else None}

    def update(self, report: EnvReport) -> FinishedEpisode | None:
        """Take over what the worker did with the last command."""
        outcome, finished = report["outcome"], None
        if self.episode is not None and outcome is not None:
            finished = FinishedEpisode(self.episode, outcome, self.calls)
        if outcome is not None or self.episode is None:
            self.episode, self.calls = (self.queue.popleft() if self.queue else None), 0
            self.plan = None if self.make_plan is None else self.make_plan()
        self.observation = report["observation"]
        return finished


@dataclass
class Rollout:
    """Runs episodes with a batched policy.

    With `make_plan` each episode has a plan, whose contexts go to the policy as a third argument, row by row.
    """

    policy: Any  # a ChunkPolicy
    pool: WorkerPool  # opened
    make_plan: Callable[[], Plan] | None = None
    call_seconds: list[float] = field(default_factory=list)  # duration of every policy call
    last_batch: ObservationBatch | None = None  # input of the last policy call

    def run(self, queues: Sequence[deque[Episode]]) -> Iterator[FinishedEpisode]:
        """Run the episodes of each environment in order and yield each one as it ends.

        Raises:
            IncompatiblePolicyError: If the policy does not fit the environment.
            WorkerError: If a simulator failed.
            ValueError: If the policy predicts too few, non-finite or wrongly shaped actions.
        """
        self.policy.reset()
        rows = [_Row(deque(queue), self.make_plan) for queue in queues]
        commands = {index: row.command(None) for index, row in enumerate(rows) if row.queue}
        while commands:
            reports = self.pool.advance(commands)
            for index in sorted(reports):
                finished = rows[index].update(reports[index])
                if finished is not None:
                    yield finished
            commands = self._next_commands(rows)

    def _next_commands(self, rows: Sequence[_Row]) -> dict[int, EnvCommand]:
        active = [index for index, row in enumerate(rows) if row.episode is not None]
        if not active:
            return {}
        for row in (rows[index] for index in active):
            if row.calls == 0 and row.observation is not None:
                reads_frames = self.policy.reads_frames
                check_compatible(self.policy.description, row.observation, reads_frames=reads_frames)
        chunk, steps, commands = self._predict(rows, active), self.policy.description.action_steps, {}
        for index in active:
            row = rows[index]
            row.calls += 1
            actions = chunk[index, :steps] if row.plan is None else row.plan.advance(chunk[index])
            commands[index] = row.command(actions)
        return commands

    def _predict(self, rows: Sequence[_Row], active: Sequence[int]) -> np.ndarray:
        """Return chunks, float32 [b t a]; those of idle rows are undefined."""
        description = self.policy.description
        cameras = description.cameras if self.policy.reads_frames else ()
        batch = stack_observations([row.observation for row in rows], cameras)
        noise = None if self.policy.noise_shape is None else _batch_noise(rows, self.policy.noise_shape)
        start = time.perf_counter()
        contexts = {index: plan.context() for index in active if (plan := rows[index].plan) is not None}
        chunk = self._predict_batch(batch, noise, contexts)
        self.call_seconds.append(time.perf_counter() - start)
        self.last_batch = batch
        steps = description.action_steps
        _check_chunk(chunk, (len(rows), steps, description.action_size), active)
        return np.asarray(chunk, dtype=np.float32)

    def _predict_batch(
        self, batch: ObservationBatch, noise: np.ndarray | None, contexts: dict[int, Any]
    ) -> np.ndarray:
        """Predict all rows at once, or one by one where a row continues the last chunk."""
        if all(context is None for context in contexts.values()):
            return self.policy.chunk(batch, noise)
        chunks = {
            row: self.policy.chunk(batch.row(row), None if noise is None else noise[row : row + 1], context)[
                0
            ]
            for row, context in contexts.items()
        }
        idle = np.zeros_like(next(iter(chunks.values())))
        return np.stack([chunks.get(row, idle) for row in range(len(batch.instructions))])


def _batch_noise(rows: Sequence[_Row], shape: tuple[int, int]) -> np.ndarray:
    """Return the noise of every row, float32 [b t a]; zeros for idle rows."""
    noise = np.zeros((len(rows), *shape), np.float32)
    for index, row in enumerate(rows):
        if row.episode is not None:
            noise[index] = episode_noise(row.episode.seed, row.calls, shape)
    return noise


def episode_noise(seed: int, call: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the standard normal noise of one chunk, float32 [t a], by episode seed and call number."""
    return np.random.default_rng((seed, call)).standard_normal(shape, dtype=np.float32)


def _check_chunk(chunk: np.ndarray, expected: tuple[int, int, int], active: Sequence[int]) -> None:
    rows, steps, size = expected
    if chunk.ndim != 3 or chunk.shape[0] != rows or chunk.shape[1] < steps or chunk.shape[2] != size:
        raise ValueError(
            f"expected a chunk of shape [{rows}, at least {steps}, {size}], got {list(chunk.shape)}; "
            "action_steps must not exceed the length of the policy's chunk"
        )
    bad = [index for index in active if not np.isfinite(chunk[index, :steps]).all()]
    if bad:
        raise ValueError(
            f"expected finite actions, got NaN or infinite ones in rows {bad}; check the checkpoint"
        )


def single_call_seconds(
    policy: ChunkPolicy, batch: ObservationBatch, calls: int, warm_up: int = 3
) -> list[float]:
    """Return the durations of `calls` policy calls with the first observation of a batch, as on a robot."""
    one = batch.row(0)
    seconds = []
    for call in range(warm_up + calls):
        noise = None if policy.noise_shape is None else episode_noise(0, call, policy.noise_shape)[None]
        start = time.perf_counter()
        policy.chunk(one, noise)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]
