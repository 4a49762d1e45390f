"""Batches over clients: requests that fit together are predicted together, in one thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vega_policy.deployment.metrics import ServerMetrics
from vega_policy.deployment.protocol import Request
from vega_policy.deployment.servable import ServablePolicy
from vega_policy.deployment.wire import ProtocolError
from vega_policy.evaluation.policies import ObservationBatch

logger = logging.getLogger(__name__)

Answer = tuple[np.ndarray, float]
"""Actions float32 [b t a] of a request, and the seconds that its batch spent in the policy."""


@dataclass
class _Waiting:
    request: Request
    answer: asyncio.Future[Answer]


class Batcher:
    """Collects requests and lets the policy predict them.

    One client alone is never kept waiting and gets exactly what the policy says of its rows by themselves;
    with several, the rows of a batch may differ by rounding from those of a batch of one.

    Args:
        policy: The policy; called from one thread only.
        rows: Most observations of a batch.
        wait_seconds: How long a request waits for others to join it.
        crowded: Says whether there is anybody to wait for.
        metrics: Where batches are counted.
    """

    def __init__(
        self,
        policy: ServablePolicy,
        *,
        rows: int,
        wait_seconds: float,
        crowded: Callable[[], bool],
        metrics: ServerMetrics,
    ) -> None:
        self._policy = policy
        self._rows = rows
        self._wait = wait_seconds
        self._crowded = crowded
        self._metrics = metrics
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._left_over: _Waiting | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    async def predict(self, request: Request) -> Answer:
        """Return what the policy predicts for a request.

        Raises:
            ProtocolError: With code `policy`, if the policy failed.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = await self._collect()
            await self._answer(batch)

    def close(self) -> None:
        """Let the policy's thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[_Waiting]:
        first = self._left_over or await self._queue.get()
        self._left_over = None
        batch, rows = [first], len(first.request.batch.instructions)
        deadline = time.monotonic() + (self._wait if self._crowded() else 0.0)
        while rows < self._rows:
            following = await self._next(deadline - time.monotonic())
            if following is None:
                break
            rows += len(following.request.batch.instructions)
            if rows > self._rows or _kind(following.request) != _kind(first.request):
                self._left_over = following
                break
            batch.append(following)
        return batch

    async def _next(self, seconds: float) -> _Waiting | None:
        if not self._queue.empty():
            return self._queue.get_nowait()
        if seconds <= 0:
            return None
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None

    async def _answer(self, batch: list[_Waiting]) -> None:
        requests = [waiting.request for waiting in batch]
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, requests)
        await asyncio.wait([work])
        error = work.exception()
        if error is not None:
            logger.error("the policy failed", exc_info=error)
        for index, waiting in enumerate(batch):
            if waiting.answer.done():  # its client is gone
                continue
            if error is None:
                actions, seconds = work.result()
                waiting.answer.set_result((actions[index], seconds))
            else:
                waiting.answer.set_exception(
                    ProtocolError("policy", "the policy failed; see the server's log")
                )

    def _predict(self, requests: list[Request]) -> tuple[list[np.ndarray], float]:
        start = time.perf_counter()
        first = requests[0]
        if first.continuation is not None:
            chunks = self._policy.continue_chunk(first.batch, first.noise, first.continuation)
        else:
            chunks = self._policy.chunk(*_joined(requests))
        seconds = time.perf_counter() - start
        self._metrics.model_seconds.observe(seconds)
        self._metrics.batch_rows.observe(len(chunks))
        ends = np.cumsum([len(request.batch.instructions) for request in requests])
        return np.split(np.asarray(chunks, np.float32), ends[:-1]), seconds


def _kind(request: Request) -> Any:
    """What must agree for requests to share a batch; a continuation stands alone."""
    if request.continuation is not None:
        return object()
    shapes = {camera: frames.shape[1:] for camera, frames in request.batch.frames.items()}
    return shapes, request.batch.state.shape[1:], request.noise is None


def _joined(requests: list[Request]) -> tuple[ObservationBatch, np.ndarray | None]:
    if len(requests) == 1:
        return requests[0].batch, requests[0].noise
    batches = [request.batch for request in requests]
    joined = ObservationBatch(
        {camera: np.concatenate([batch.frames[camera] for batch in batches]) for camera in batches[0].frames},
        np.concatenate([batch.state for batch in batches]),
        [text for batch in batches for text in batch.instructions],
    )
    noises = [request.noise for request in requests if request.noise is not None]
    return joined, np.concatenate(noises) if noises else None
