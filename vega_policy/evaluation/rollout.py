"""Asynchronous closed-loop rollout: whichever simulators wait for actions make the next batch of the policy.

No simulator waits for another. The policy predicts batches of one size: an episode has a fixed row in them,
rows without an observation are zero, and a row's noise depends on its episode and the number of the chunk. So
an episode's result depends neither on the other episodes nor on timing, the number of processes or an
interruption.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.env_worker import Commands, EnvObservation, EnvReport, Outcome
from vega_policy.evaluation.episodes import Episode
from vega_policy.evaluation.policies import ObservationBatch, check_compatible, stack_observations


@dataclass(frozen=True)
class FinishedEpisode:
    """An episode that ended, its outcome, and the number of chunks that were predicted for it."""

    episode: Episode
    outcome: Outcome
    policy_calls: int


class Plan(Protocol):
    """What a simulator executes between two predictions of an episode, if not a chunk's first actions."""

    def context(self) -> Any:
        """Return what a policy with real-time chunking is given besides the observation, or None."""
        ...

    def advance(self, chunk: np.ndarray) -> Commands:
        """Return the commands [a], at least one, executed from a chunk's observation until the next one.

        None is a step without a command, in which the environment holds still.
        """
        ...


class Schedule:
    """Episodes that have not begun, and which simulator begins which."""

    def __init__(self, episodes: Iterable[Episode], batch_size: int) -> None:
        self._batch_size = batch_size
        self._waiting: dict[tuple[str, int], list[Episode]] = {}
        self._simulators: Counter[tuple[str, int]] = Counter()  # by task
        for episode in episodes:
            self._waiting.setdefault(episode.scene, []).append(episode)

    def take(self, last: Episode | None = None, running: Collection[Episode] = ()) -> Episode | None:
        """Return the next episode of a simulator, None if all have begun.

        A simulator stays with the task of its `last` episode for as long as it can, because building another
        scene costs a LIBERO simulator as long as an episode; then it helps with the longest queue. Rows that
        no `running` episode has come first: two episodes of one row are never in one batch.
        """
        if not self._waiting:
            return None
        if last is not None and last.scene in self._waiting:
            task = last.scene
        else:
            if last is not None:
                self._simulators[last.scene] -= 1
            task = max(
                self._waiting, key=lambda task: len(self._waiting[task]) / (1 + self._simulators[task])
            )
            self._simulators[task] += 1
        used = {episode.row(self._batch_size) for episode in running}
        queue = self._waiting[task]
        free = (number for number, episode in enumerate(queue) if episode.row(self._batch_size) not in used)
        episode = queue.pop(next(free, 0))
        if not queue:
            del self._waiting[task]
        return episode


@dataclass
class _Running:
    """The episode of a simulator."""

    episode: Episode
    plan: Plan | None = None
    observation: EnvObservation | None = None  # for which a chunk is to be predicted
    calls: int = 0


@dataclass
class Rollout:
    """Runs episodes with a batched policy.

    With `lockstep`, a batch waits until every simulator has an observation. Only then are results repeatable
    of a policy that mixes the rows of a batch; they depend on the number of processes.

    With `make_plan` each episode has a plan, whose contexts go to the policy as a third argument, row by row.
    """

    policy: Any  # a ChunkPolicy
    pool: WorkerPool  # opened
    batch_size: int
    lockstep: bool = False
    make_plan: Callable[[], Plan] | None = None
    call_seconds: list[float] = field(default_factory=list)  # duration of every policy call
    _single: ObservationBatch | None = None  # the observation of a row of the last policy call
    busy_fraction: float = 0.0  # of the simulators' time that they did not wait for the policy

    def run(self, episodes: Iterable[Episode], instructions: Sequence[str] = ()) -> Iterator[FinishedEpisode]:
        """Run episodes of a suite, whose tasks have these instructions, and yield each one as it ends.

        Raises:
            IncompatiblePolicyError: If the policy does not fit the environment.
            WorkerError: If a simulator failed.
            ValueError: If the policy predicts too few, non-finite or wrongly shaped actions.
        """
        self.policy.reset(instructions)
        start, busy = time.perf_counter(), self.pool.busy_seconds
        schedule = Schedule(episodes, self.batch_size)
        running: dict[int, _Running] = {}
        for worker in range(len(self.pool)):
            self._begin_next(worker, schedule, running)
        waiting: dict[int, _Running] = {}  # for their next chunk, the longest wait first
        while running:
            for worker, report in self.pool.receive(all_of_them=self.lockstep, block=not waiting):
                one = running[worker]
                if (outcome := report["outcome"]) is not None:
                    self._begin_next(worker, schedule, running)
                    yield FinishedEpisode(one.episode, outcome, one.calls)
                else:
                    self._take_in(one, report)
                    waiting[worker] = one
            if waiting and not (self.lockstep and len(waiting) < len(running)):
                self._predict(waiting)
        seconds = time.perf_counter() - start
        self.busy_fraction = (self.pool.busy_seconds - busy) / seconds / len(self.pool)

    def single_call_seconds(self, calls: int, warm_up: int = 3) -> list[float]:
        """Return the durations of `calls` policy calls with the last observation alone, as on a robot."""
        assert self._single is not None
        seconds = []
        for call in range(warm_up + calls):
            shape = self.policy.noise_shape
            noise = None if shape is None else episode_noise(0, call, shape)[None]
            start = time.perf_counter()
            self.policy.chunk(self._single, noise)
            seconds.append(time.perf_counter() - start)
        return seconds[warm_up:]

    def _begin_next(self, worker: int, schedule: Schedule, running: dict[int, _Running]) -> None:
        last = running.pop(worker, None)
        others = [one.episode for one in running.values()]
        episode = schedule.take(None if last is None else last.episode, others)
        if episode is not None:
            running[worker] = _Running(episode, None if self.make_plan is None else self.make_plan())
            self.pool.begin(worker, episode.spec())

    def _take_in(self, one: _Running, report: EnvReport) -> None:
        one.observation = report["observation"]
        if one.calls == 0 and one.observation is not None:
            check_compatible(self.policy.description, one.observation, reads_frames=self.policy.reads_frames)

    def _predict(self, waiting: dict[int, _Running]) -> None:
        """Predict a chunk for one waiting simulator of each row, and let them execute it."""
        rows: dict[int, int] = {}
        for worker, one in waiting.items():
            rows.setdefault(one.episode.row(self.batch_size), worker)
        chosen = {row: waiting.pop(worker) for row, worker in rows.items()}
        chunks, steps = self._predict_rows(chosen), self.policy.description.action_steps
        for row, one in chosen.items():
            one.calls += 1
            actions = chunks[row, :steps] if one.plan is None else one.plan.advance(chunks[row])
            self.pool.execute(rows[row], actions)

    def _predict_rows(self, rows: dict[int, _Running]) -> np.ndarray:
        """Return chunks, float32 [b t a]; those of padding rows are undefined."""
        description = self.policy.description
        cameras = description.cameras if self.policy.reads_frames else ()
        observations = [rows[row].observation if row in rows else None for row in range(self.batch_size)]
        batch = stack_observations(observations, cameras)
        noise = None
        if (shape := self.policy.noise_shape) is not None:
            noise = np.zeros((self.batch_size, *shape), np.float32)
            for row, one in rows.items():
                noise[row] = episode_noise(one.episode.seed, one.calls, shape)
        contexts = {row: one.plan.context() for row, one in rows.items() if one.plan is not None}
        start = time.perf_counter()
        chunk = self._predict_batch(batch, noise, contexts)
        self.call_seconds.append(time.perf_counter() - start)
        self._single = batch.row(next(iter(rows)))
        _check_chunk(chunk, (self.batch_size, description.action_steps, description.action_size), rows)
        return np.asarray(chunk, dtype=np.float32)

    def _predict_batch(
        self, batch: ObservationBatch, noise: np.ndarray | None, contexts: dict[int, Any]
    ) -> np.ndarray:
        """Predict rows that continue the last chunk one by one, and all others at once."""
        continued = {row: context for row, context in contexts.items() if context is not None}
        chunks = {}
        for row, context in continued.items():
            only = None if noise is None else noise[row : row + 1]
            chunks[row] = self.policy.chunk(batch.row(row), only, context)[0]
        if chunks and len(chunks) == len(contexts):
            padding = np.zeros_like(next(iter(chunks.values())))
            return np.stack([chunks.get(row, padding) for row in range(self.batch_size)])
        others = self.policy.chunk(batch, noise)
        return np.stack([chunks.get(row, chunk) for row, chunk in enumerate(others)]) if chunks else others


def episode_noise(seed: int, call: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the standard normal noise of one chunk, float32 [t a], by episode seed and call number."""
    return np.random.default_rng((seed, call)).standard_normal(shape, dtype=np.float32)


def _check_chunk(chunk: np.ndarray, expected: tuple[int, int, int], active: Iterable[int]) -> None:
    rows, steps, size = expected
    if chunk.ndim != 3 or chunk.shape[0] != rows or chunk.shape[1] < steps or chunk.shape[2] != size:
        raise ValueError(
            f"expected a chunk of shape [{rows}, at least {steps}, {size}], got {list(chunk.shape)}; "
            "action_steps must not exceed the length of the policy's chunk"
        )
    bad = sorted(index for index in active if not np.isfinite(chunk[index, :steps]).all())
    if bad:
        raise ValueError(
            f"expected finite actions, got NaN or infinite ones in rows {bad}; check the checkpoint"
        )
