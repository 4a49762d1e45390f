"""Real-time chunking that executes every action once: chunks are joined by the number of executed actions.

LeRobot's engine drops as many actions of a new chunk as were due by the clock. When there was nothing to
execute (the first chunk, or after a hold) these actions are lost, and a policy that commands displacements is
out of step from then on: measured on LiftWide, it hardly ever succeeds. Here each observation carries the
number of actions executed before it, and a chunk begins at that number.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lerobot.rollout.inference.base import InferenceEngine
from torch import Tensor

from vega_policy.deployment.safety import SafetyFilter

logger = logging.getLogger(__name__)

Predict = Callable[[dict[str, Any], int, Tensor | None], tuple[Tensor, Tensor]]
"""(observation, delay, rest of the last chunk [t a]) -> chunk in the policy's units, and in the robot's."""

REMEMBERED_DELAYS = 10  # the longest of them is the delay that the next chunk assumes
MAX_FAILURES = 10  # in a row


@dataclass(frozen=True)
class Snapshot:
    """An observation, its time (monotonic clock), and the number of actions executed before it."""

    observation: dict[str, Any]
    seconds: float
    index: int


class ChunkQueue:
    """Actions to execute, each with its index in the episode; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: tuple[Tensor, Tensor] | None = None
        self._first = 0  # index of the chunk's first action
        self.index = 0  # of the next action: the number of executed ones

    def pop(self) -> Tensor | None:
        """Return the next action [a] in the robot's units; None if there is none."""
        with self._lock:
            if self._chunk is None or self.index - self._first >= len(self._chunk[1]):
                return None
            self.index += 1
            return self._chunk[1][self.index - 1 - self._first].clone()

    def rest(self, index: int) -> Tensor | None:
        """Return the actions [t a] in the policy's units from an index on; None if there are none."""
        with self._lock:
            if self._chunk is None:
                return None
            rest = self._chunk[0][index - self._first :]
            return rest.clone() if len(rest) else None

    def join(self, chunk: Tensor, actions: Tensor, index: int) -> int:
        """Continue with a chunk [t a] that begins at an index; return how many of it were executed since."""
        with self._lock:
            self._chunk, self._first = (chunk, actions), index
            return self.index - index

    def clear(self) -> None:
        """Remove all actions and begin at index 0."""
        with self._lock:
            self._chunk, self._first, self.index = None, 0, 0


class RealTimeEngine(InferenceEngine):
    """Predicts the next chunk in its own thread while the last one is executed.

    Args:
        predict: The policy.
        reset_policy: Resets policy and processors.
        safety: Knows the time of the last observation, and the largest age of one when its chunk arrives.
        threshold: The next chunk is predicted when at most this many actions are left.
        shutdown: Set after `MAX_FAILURES` failed predictions in a row.
        retry_seconds: Pause after a failed prediction.
    """

    def __init__(
        self,
        predict: Predict,
        reset_policy: Callable[[], None],
        safety: SafetyFilter,
        *,
        threshold: int,
        shutdown: threading.Event,
        retry_seconds: float = 0.5,
    ) -> None:
        self._predict, self._reset_policy = predict, reset_policy
        self._safety, self._threshold, self._shutdown = safety, threshold, shutdown
        self._retry_seconds = retry_seconds
        self._queue = ChunkQueue()
        self._delays: deque[int] = deque(maxlen=REMEMBERED_DELAYS)
        self._latest: Snapshot | None = None
        self._episode = 0
        self._lock = threading.Lock()
        self._has_news = threading.Event()
        self._ended = threading.Event()
        self._failed = False
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether the engine stopped after repeated failures."""
        return self._failed

    def start(self) -> None:
        """Start the thread that predicts."""
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="real-time chunking", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a prediction that hangs is abandoned."""
        self._ended.set()
        self._has_news.set()
        if self._thread is not None:
            self._thread.join(timeout=3.0)

    def reset(self) -> None:
        """Remove actions and observation; a prediction that is running will not be executed."""
        with self._lock:
            self._episode += 1
            self._latest = None
            self._queue.clear()
        self._reset_policy()

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Set the observation before the next action."""
        with self._lock:
            self._latest = Snapshot(obs, self._safety.observed_at, self._queue.index)
        self._has_news.set()

    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """Return the next action [a] in the robot's units, or None."""
        return self._queue.pop()

    def predict_if_due(self) -> None:
        """Predict once, if there is a new observation and at most `threshold` actions are left."""
        with self._lock:
            latest, episode = self._latest, self._episode
            rest = None if latest is None else self._queue.rest(latest.index)
            if latest is None or (rest is not None and len(rest) > self._threshold):
                return
            self._latest = None
        chunk, actions = self._predict(latest.observation, max(self._delays, default=0), rest)
        with self._lock:
            if episode != self._episode or not self._safety.accept_chunk(latest.seconds):
                return
            delay = self._queue.join(chunk, actions, latest.index)
        if rest is not None:  # while nothing is executed, no delay can be counted
            self._delays.append(delay)

    def _run(self) -> None:
        failures = 0
        try:
            while not self._ended.is_set() and failures < MAX_FAILURES:
                self._has_news.wait()
                self._has_news.clear()
                if self._ended.is_set():
                    break
                try:
                    self.predict_if_due()
                    failures = 0
                except (OSError, RuntimeError, ValueError) as error:
                    failures += 1
                    logger.error("prediction failed (%d in a row): %s", failures, error)
                    self._ended.wait(self._retry_seconds)
        finally:
            if not self._ended.is_set():
                self._failed = True
                self._shutdown.set()
