"""Real-time chunking under LeRobot's rollout: an adapter that continues its queue where the queue ends."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SETTLE_SECONDS = 0.25
"""Pause after a reset: longer than a control step, so that the next observation is of the new episode."""

KEPT_ACTIONS = 256
"""Number of last actions that are kept to find where LeRobot's queue stands."""


class RTCQueueAdapter:
    """Answers LeRobot's rtc engine so that each planned action is executed at most once and in order.

    With `rtc_config.enabled=True` LeRobot 0.6.1 drops ceil(latency / period) actions of each chunk, whether
    or not others were executed meanwhile (the jump that its pull request 4223 describes). With
    `enabled=False`, which `VegaPolicy.init_rtc_processor` sets, its queue appends what it is given. So the
    adapter gives it the actions that follow those it still holds; they are counted in the queue, and no clock
    is read.

    LeRobot requests a chunk when `queue_threshold` actions are left, right after it has taken the action of
    the latest observation; the new chunk begins with that action. The first chunk after a reset is discarded:
    the observation may be the last one of the episode before.

    Args:
        action_steps: Actions of each chunk that are executed.
        latency_steps: Commands under way that an observation does not reflect yet.
        wait: Sleeps for a number of seconds.
    """

    def __init__(
        self, action_steps: int, latency_steps: int = 0, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._action_steps, self._latency_steps, self._wait = action_steps, latency_steps, wait
        self._lock = threading.Lock()  # LeRobot resets the policy while its thread predicts
        self._episode = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new episode; a prediction that is running gives no action."""
        with self._lock:
            self._episode += 1
            self._given: Tensor | None = None  # [t a], the last actions that LeRobot's queue was given
            self._is_settled = False

    def answer(
        self, predict: Callable[..., Tensor], *, prev_chunk_left_over: Tensor | None = None, **rtc: Any
    ) -> Tensor:
        """Return the actions [1 t a] that LeRobot's queue appends.

        `predict` gives a chunk [1 t a] from `inference_delay` and `prev_chunk_left_over`, here the actions
        since the observation [1 t a]. LeRobot's `prev_chunk_left_over` is the content of its queue [t a], cut
        or padded with zeros to some length. Its `inference_delay` is not used, since it is read off a clock.

        Raises:
            ValueError: If LeRobot requests chunks too early to tell which observation they rest on.
            RuntimeError: If the queue holds other actions than it was given.
        """
        with self._lock:
            episode, given, is_settled = self._episode, self._given, self._is_settled
            self._is_settled = True
        left, since = 0, None
        if given is not None:
            left = _count_left(given, prev_chunk_left_over)
            since = given[None, -(left + 1 + self._latency_steps) :]
        first = 0 if since is None else since.shape[1]
        rtc |= {"inference_delay": first, "prev_chunk_left_over": since}
        chunk = predict(**rtc)
        if not is_settled:
            self._wait(SETTLE_SECONDS)
            return chunk[:, :0]
        new = chunk[:, first : first + self._action_steps]
        if new.shape[1] <= left + self._latency_steps:
            raise ValueError(
                f"inference.queue_threshold: a chunk was requested with {left} actions left, and adds "
                f"{new.shape[1]} (chunk of {chunk.shape[1]}, n_action_steps {self._action_steps}, "
                f"latency_steps {self._latency_steps}); take a threshold below "
                f"{new.shape[1] - self._latency_steps}"
            )
        with self._lock:
            if episode != self._episode:
                return chunk[:, :0]
            self._given = (new[0] if given is None else torch.cat([given, new[0]]))[-KEPT_ACTIONS:]
        return new


def _count_left(given: Tensor, padded: Tensor | None) -> int:
    """Return how many of the given actions [t a] are left, from LeRobot's cut or padded copy of them."""
    if padded is None:
        return 0
    padded = padded.reshape(-1, padded.shape[-1]).to(given)
    for left in range(len(given) + 1):
        rest = given[len(given) - left :][: len(padded)]
        if torch.equal(functional.pad(rest, (0, 0, 0, len(padded) - len(rest))), padded):
            return left
    raise RuntimeError("LeRobot's queue holds actions that it was not given; reset the policy")
