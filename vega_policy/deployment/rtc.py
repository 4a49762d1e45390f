"""Real-time chunking for a robot that must not lose a step: chunks are joined by what was executed.

LeRobot's own engine drops as many actions of a new chunk as the clock says were executed meanwhile. When
there was nothing to execute (the first chunk, or after a hold) they are lost, and a policy that commands
displacements is out of step from then on: measured on LiftWide, it hardly ever succeeds. Here each
observation carries the number of actions that were executed before it, and a chunk begins at that number.
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
"""(observation, delay, what is left [t a]) -> the chunk as the policy has it, and in the robot's units."""

DELAYS = 10
"""So many of the last delays are remembered; the longest is what the next chunk reckons with."""

FAILURES_IN_A_ROW = 10
SECONDS_AFTER_FAILURE = 0.5


class Plan:
    """Actions to be executed, each with its place in the episode; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: tuple[Tensor, Tensor] | None = None
        self._first = self._taken = 0

    @property
    def taken(self) -> int:
        """How many actions were taken, which is also the place of the next one."""
        return self._taken

    def take(self) -> Tensor | None:
        """Return the next action [a] in the robot's units; None if there is none, which takes none."""
        with self._lock:
            if self._chunk is None or self._taken - self._first >= len(self._chunk[1]):
                return None
            self._taken += 1
            return self._chunk[1][self._taken - 1 - self._first].clone()

    def left(self, place: int | None = None) -> Tensor | None:
        """Return the policy's own actions [t a] from a place on, that of the next one by default; or None."""
        with self._lock:
            if self._chunk is None:
                return None
            rest = self._chunk[0][(self._taken if place is None else place) - self._first :]
            return rest.clone() if len(rest) else None

    def join(self, chunk: Tensor, actions: Tensor, place: int) -> int:
        """Go on with a chunk [t a] that begins at a place; return how many of it are over already."""
        with self._lock:
            self._chunk, self._first = (chunk, actions), place
            return self._taken - place

    def clear(self) -> None:
        """Forget what was to be executed."""
        with self._lock:
            self._chunk, self._first, self._taken = None, 0, 0


@dataclass(frozen=True)
class Seen:
    """An observation, when it was taken (monotonic clock), and how many actions were executed before."""

    observation: dict[str, Any]
    seconds: float
    place: int


class RealTimeEngine(InferenceEngine):
    """Predicts the next chunk in a thread of its own while the last one is executed.

    Args:
        predict: Asks the policy.
        reset_policy: Lets policy and processors forget the episode.
        safety: Knows when the last observation was taken, and how old a view may be when its plan is there.
        threshold: The next chunk is asked for when no more actions than these are left.
        shutdown: Set when predictions failed again and again.
    """

    def __init__(
        self,
        predict: Predict,
        reset_policy: Callable[[], None],
        safety: SafetyFilter,
        *,
        threshold: int,
        shutdown: threading.Event,
    ) -> None:
        self._predict, self._reset_policy = predict, reset_policy
        self._safety, self._threshold, self._shutdown = safety, threshold, shutdown
        self._plan = Plan()
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._seen: Seen | None = None
        self._episode = 0
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._ended = threading.Event()
        self._failed = False
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether predictions failed again and again."""
        return self._failed

    def start(self) -> None:
        """Start the thread that predicts."""
        self._ended.clear()
        self._thread = threading.Thread(target=self._work, name="real-time chunking", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a prediction that hangs is left behind."""
        self._ended.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(timeout=3.0)

    def reset(self) -> None:
        """Forget the plan and the observation; what is being predicted from it will not be executed."""
        with self._lock:
            self._episode += 1
            self._seen = None
            self._plan.clear()
        self._reset_policy()

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Say what is seen before the next action is taken."""
        with self._lock:
            self._seen = Seen(obs, self._safety.observed_at, self._plan.taken)
        self._news.set()

    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """The next action [a] in the robot's units, or None."""
        return self._plan.take()

    def _work(self) -> None:
        failures = 0
        try:
            while not self._ended.is_set() and failures < FAILURES_IN_A_ROW:
                self._news.wait()
                self._news.clear()
                if self._ended.is_set():
                    break
                try:
                    self.think()
                    failures = 0
                except (OSError, RuntimeError, ValueError) as error:
                    failures += 1
                    logger.error("prediction failed (%d in a row): %s", failures, error)
                    self._ended.wait(SECONDS_AFTER_FAILURE)
        finally:
            if not self._ended.is_set():
                self._failed = True
                self._shutdown.set()

    def think(self) -> None:
        """Predict once, if there is a view that was not thought about and little is left to be executed."""
        with self._lock:
            seen, episode = self._seen, self._episode
            left = None if seen is None else self._plan.left(seen.place)
            if seen is None or (left is not None and len(left) > self._threshold):
                return
            self._seen = None
        chunk, actions = self._predict(seen.observation, max(self._delays, default=0), left)
        with self._lock:
            if episode != self._episode or not self._safety.accepts_view(seen.seconds):
                return
            over = self._plan.join(chunk, actions, seen.place)
        if left is not None:  # while nothing is executed, no delay can be counted
            self._delays.append(over)
