"""Real-time chunking of VEGA's own heads: a chunk that goes on from what is left of the last one."""

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor


def left_over(padded: Tensor | None, chunk_size: int) -> Tensor | None:
    """Return what is left of the last chunk, [1 t a]; None if nothing is.

    LeRobot's rollout pads it with zeros to a fixed length, and the new chunk would be drawn to those.

    Args:
        padded: Normalised actions [t a] or [1 t a]; None for the first chunk.
        chunk_size: Most actions that a chunk holds.
    """
    if padded is None:
        return None
    left = padded.reshape(-1, padded.shape[-1])[:chunk_size]
    told = left.ne(0).any(dim=-1).nonzero()
    return left[None, : int(told[-1]) + 1] if len(told) else None


def blend(
    processor: RTCProcessor,
    chunk: Tensor,
    left: Tensor,
    inference_delay: int = 0,
    execution_horizon: int | None = None,
) -> Tensor:
    """Begin a chunk as what is left goes on: kept in the delay, then less and less.

    An L1 head has no flow to guide, so its chunk itself is weighed against what is left.

    Args:
        processor: Has the weights, those of a flow's guidance (Black et al., arXiv 2506.07339).
        chunk: The new chunk [b t a].
        left: What is left of the last one [1 t a].
        inference_delay: How many actions will have been executed when the new chunk arrives.
        execution_horizon: Up to which action the chunks are blended; None takes the processor's.
    """
    horizon = execution_horizon or processor.rtc_config.execution_horizon
    length = min(horizon, left.shape[1])
    weights = processor.get_prefix_weights(inference_delay, length, chunk.shape[1])
    kept = torch.nn.functional.pad(left, (0, 0, 0, chunk.shape[1] - left.shape[1]))
    weights = weights.to(chunk)[:, None]  # [t 1]
    return weights * kept.to(chunk) + (1 - weights) * chunk


def integrate(denoise: Any, noise: Tensor, steps: int, **guidance: Any) -> Tensor:
    """LeRobot's Euler integrator, so that its real-time chunking applies.

    That one takes the velocity's Jacobian for the identity, but would still record the network's graph.

    Args:
        denoise: Velocity of actions [b t a] at times [b].
        noise: Where the flow starts, [b t a].
        steps: Number of Euler steps.
        **guidance: `rtc_processor`, `rtc_enabled` and what they need.
    """
    return euler_integrate(torch.no_grad()(denoise), noise, steps, **guidance)


def go_on(
    act: Callable[..., Tensor], processor: RTCProcessor, left: Tensor, *, flows: bool, **rtc: Any
) -> Tensor:
    """A chunk [b t a] that goes on from what is left of the last one.

    Args:
        act: The policy's chunk, given how a flow is integrated.
        processor: Guides a flow, and has the weights of a blend.
        left: What is left of the last one [1 t a].
        flows: Whether the head is a flow, which can be guided.
        **rtc: `inference_delay` and, perhaps, `execution_horizon`.
    """
    if not flows:
        return blend(processor, act(integrate), left, **rtc)
    guidance = {"prev_chunk_left_over": left, "rtc_processor": processor, "rtc_enabled": True}
    return act(partial(integrate, **rtc, **guidance))


FIRST_SECONDS = 1.0
"""How long LeRobot's first answer takes at least; how many steps it says that was tells what a step is."""

DELAYS = 10
"""So many of the last delays are remembered; the longest is what the next chunk reckons with."""


class RTCQueueAdapter:
    """Answers LeRobot's rtc engine so that each action that is planned is executed once.

    That engine drops the first ceil(latency / period) actions of each answer, whether or not others were
    executed meanwhile, and a policy that commands displacements never makes up for a lost one. So:

    - The very first answer is a single action, which LeRobot drops. It takes a second: LeRobot then tells its
      longest latency in steps, and so how long a step is.
    - Where nothing, or too little, is left to be executed while the policy thinks (an episode begins, the
      queue runs dry), as many actions as are dropped in vain are put in front of the first one that is due.
      Such an answer waits until the middle of a step, so that it is surely so many; the robot has nothing to
      execute until then anyway.
    - LeRobot looks at what is left after it has taken the action of the moment that is seen. The plan begins
      with that action, so it is put back in front of what is left.

    What stays: a policy so slow that LeRobot asks again at once is miscounted by one step now and then, since
    LeRobot does not say when in a step it asked. `scripts/deploy_policy.py` counts instead.

    Args:
        now: The clock, in seconds.
        wait: Waits so many seconds.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._now, self._wait = now, wait
        self._first = 0.0
        self._period: float | None = None
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._last: Tensor | None = None
        self._due: int | None = None  # where in the last answer the robot goes on after it had to wait

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
            predict: Asks the policy for a chunk [1 t a]; takes the same keywords.
            inference_delay: LeRobot's longest latency until now, in steps; 0 before it has measured one.
            prev_chunk_left_over: What is left of the last answer [t a], zeros after its end; None if nothing.
            **rtc: Handed on.
        """
        start, padded = self._now(), prev_chunk_left_over
        if inference_delay == 0:  # LeRobot has measured no latency: it begins
            self._period = None
            self._delays.clear()
        elif self._first == 0.0:  # somebody else asks, whose steps are not known
            return predict(inference_delay=inference_delay, prev_chunk_left_over=padded, **rtc)
        elif self._period is None:
            self._period = self._first / (inference_delay - 0.5)
        seen, executed, waited = self._from_the_seen(padded)
        chunk = predict(inference_delay=max(self._delays, default=0), prev_chunk_left_over=seen, **rtc)
        if chunk.is_cuda:
            torch.cuda.synchronize(chunk.device)  # the work is timed, not its launch
        if self._period is None:
            self._wait(max(start + FIRST_SECONDS - self._now(), 0.0))
            self._first, chunk = self._now() - start, chunk[:, :1]
        else:
            if waited:  # no action belongs to the moment that is seen, but LeRobot drops one for it
                chunk, executed = torch.cat([chunk[:, :1], chunk], dim=1), executed + 1
            chunk = self._whole(chunk, executed, start, self._period)
        self._last = chunk
        return chunk

    def _whole(self, chunk: Tensor, executed: int, start: float, period: float) -> Tensor:
        """Put in front of what is due as many actions as are dropped though nothing is executed."""
        passed = (self._now() - start) / period
        dropped = math.ceil(passed)
        if executed >= min(dropped, chunk.shape[1]):
            self._delays.append(dropped)
            self._due = None
            return chunk
        middle = math.ceil(passed + 0.5)  # dropped, half a step from now at most
        self._due = middle
        self._wait(max(start + (middle - 0.5) * period - self._now(), 0.0))
        due = chunk[:, executed : executed + 1].expand(-1, middle - executed, -1)
        return torch.cat([chunk[:, :executed], due, chunk[:, executed:]], dim=1)

    def _from_the_seen(self, padded: Tensor | None) -> tuple[Tensor | None, int, bool]:
        """What is executed from the moment that is seen on, [1 t a], how many, and if the robot still waited.

        Where what is left is no part of the last answer, its first action is taken for the one before it.
        """
        left = None if padded is None else left_over(padded, padded.shape[-2])
        if left is None:
            return None, 0, False
        last, length = left if self._last is None else self._last.to(left), left.shape[1]
        for place in range(1, last.shape[1] - length + 1):
            if torch.equal(last[:, place : place + length], left):
                if place == self._due:  # while it was seen, it still waited
                    return left, last.shape[1] - place, True
                return torch.cat([last[:, place - 1 : place], left], dim=1), last.shape[1] - place + 1, False
        return torch.cat([left[:, :1], left], dim=1), length + 1, False
