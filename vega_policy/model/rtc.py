"""Real-time chunking under LeRobot's rollout: the rest of the last chunk, and an adapter for its queue."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FIRST_SECONDS = 1.0
"""Least duration of the first answer; the number of steps LeRobot measures for it gives the step's length."""

DELAYS = 10
"""Number of last delays that are kept; the longest is the delay of the next chunk."""


def left_over(padded: Tensor | None, chunk_size: int) -> Tensor | None:
    """Return what remains of the last chunk, [1 t a]; None if nothing does.

    LeRobot's rollout pads it with zeros to a fixed length, which must not guide the new chunk.

    Args:
        padded: Normalised actions [t a] or [1 t a]; None for the first chunk.
        chunk_size: Most actions of a chunk.
    """
    if padded is None:
        return None
    left = padded.reshape(-1, padded.shape[-1])[:chunk_size]
    nonzero = left.ne(0).any(dim=-1).nonzero()
    return left[None, : int(nonzero[-1]) + 1] if len(nonzero) else None


class RTCQueueAdapter:
    """Answers LeRobot's rtc engine so that each planned action is executed once.

    That engine drops the first ceil(latency / period) actions of each answer, whether or not others were
    executed meanwhile, and a policy that commands displacements never recovers a lost one. Therefore:

    - The first answer is a single action, which LeRobot drops, and takes a second: the latency that LeRobot
      then reports in steps gives the length of a step.
    - Where too little remained to be executed during inference (an episode begins, the queue runs dry), as
      many actions as are dropped without effect are inserted before the first one that is due. Such an answer
      waits until the middle of a step, so that their number is certain; the robot has no action until then.
    - LeRobot reads the remaining actions after it has taken the action of the observed moment. The plan
      begins with that action, so it is put back in front of them.

    One error remains: a policy so slow that LeRobot requests a chunk at once is sometimes miscounted by one
    step, since LeRobot does not say when in a step it did. `scripts/deploy_policy.py` counts instead.

    Args:
        now: Clock, in seconds.
        wait: Sleeps for a number of seconds.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._now, self._wait = now, wait
        self._first = 0.0
        self._period: float | None = None
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._last: Tensor | None = None
        self._due: int | None = None  # index in the last answer at which the robot goes on after waiting

    def answer(
        self,
        predict: Callable[..., Tensor],
        *,
        inference_delay: int,
        prev_chunk_left_over: Tensor | None = None,
        **rtc: Any,
    ) -> Tensor:
        """Return a chunk [1 t a] for LeRobot's queue.

        Args:
            predict: Predicts a chunk [1 t a] from the same keywords.
            inference_delay: LeRobot's longest latency so far, in steps; 0 before it has measured one.
            prev_chunk_left_over: What remains of the last answer [t a], zeros after its end; None if nothing.
            **rtc: Passed to `predict`.
        """
        start, padded = self._now(), prev_chunk_left_over
        if inference_delay == 0:  # LeRobot has measured no latency: a rollout begins
            self._period = None
            self._delays.clear()
        elif self._first == 0.0:  # another caller, whose step length is unknown
            return predict(inference_delay=inference_delay, prev_chunk_left_over=padded, **rtc)
        elif self._period is None:
            self._period = self._first / (inference_delay - 0.5)
        left, executed, waited = self._from_observation(padded)
        chunk = predict(inference_delay=max(self._delays, default=0), prev_chunk_left_over=left, **rtc)
        if chunk.is_cuda:
            torch.cuda.synchronize(chunk.device)  # the computation is timed, not its launch
        if self._period is None:
            self._wait(max(start + FIRST_SECONDS - self._now(), 0.0))
            self._first, chunk = self._now() - start, chunk[:, :1]
        else:
            if waited:  # no action belongs to the observed moment, but LeRobot drops one for it
                chunk, executed = torch.cat([chunk[:, :1], chunk], dim=1), executed + 1
            chunk = self._fill_dropped(chunk, executed, start, self._period)
        self._last = chunk
        return chunk

    def _fill_dropped(self, chunk: Tensor, executed: int, start: float, period: float) -> Tensor:
        """Insert as many actions before the due one as are dropped though nothing is executed."""
        passed = (self._now() - start) / period
        dropped = math.ceil(passed)
        if executed >= min(dropped, chunk.shape[1]):
            self._delays.append(dropped)
            self._due = None
            return chunk
        middle = math.ceil(passed + 0.5)  # the number dropped, at most half a step from now
        self._due = middle
        self._wait(max(start + (middle - 0.5) * period - self._now(), 0.0))
        due = chunk[:, executed : executed + 1].expand(-1, middle - executed, -1)
        return torch.cat([chunk[:, :executed], due, chunk[:, executed:]], dim=1)

    def _from_observation(self, padded: Tensor | None) -> tuple[Tensor | None, int, bool]:
        """Return the actions from the observed moment on [1 t a], their number, and if the robot waited.

        If the remaining actions are no part of the last answer, their first one also stands for the one
        before.
        """
        left = None if padded is None else left_over(padded, padded.shape[-2])
        if left is None:
            return None, 0, False
        last, length = left if self._last is None else self._last.to(left), left.shape[1]
        for index in range(1, last.shape[1] - length + 1):
            if torch.equal(last[:, index : index + length], left):
                if index == self._due:  # it still waited at the observed moment
                    return left, last.shape[1] - index, True
                return torch.cat([last[:, index - 1 : index], left], dim=1), last.shape[1] - index + 1, False
        return torch.cat([left[:, :1], left], dim=1), length + 1, False
