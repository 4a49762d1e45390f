"""Inference engines that execute every planned action at most once: chunks are joined by counting commands.

A chunk begins with the action that follows the last command that its observation reflects. Commands sent
since then are under way, and those sent while the policy predicts follow; the chunk continues after them.
Where actions are displacements, it can make up for what it planned for those steps (`catch_up`).
LeRobot's engines count neither: its sync engine starts each chunk at its first action, and its rtc engine
drops as many actions as were due by the clock (the jump that its pull request 4223 describes).
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.rollout.inference.base import InferenceEngine
from torch import Tensor

from vega_policy.deployment.safety import SafetyFilter

logger = logging.getLogger(__name__)

Predict = Callable[[Any, int, Tensor | None], tuple[Tensor, Tensor]]
"""(observation, delay, actions since it [t a]) -> chunk in the policy's units, and in the robot's."""

REMEMBERED_DELAYS = 10  # the longest of them is the delay that the next chunk assumes
MAX_FAILURES = 10  # in a row

LAST_COMMAND = "last_command"
"""Entry of an observation: number of the last command that it reflects, counted as by `commands_sent`."""


class CommandsUnderWay:
    """Commands of the policy that the robot's observations do not reflect yet.

    A robot with `commands_sent` reports in each observation, as `last_command`, the number of the last
    command that it reflects. For any other one a command is reflected `latency_steps + 1` periods (s) after
    it was sent.
    """

    def __init__(self, period: float, latency_steps: int = 0) -> None:
        self._seconds = (latency_steps + 0.5) * period
        self._commands: deque[tuple[int | None, float]] = deque()  # number and time of each, in order

    def add(self, number: int | None, seconds: float | None = None) -> None:
        """Add a command that was sent now, or at `seconds` of the monotonic clock; None: it has no number."""
        self._commands.append((number, time.monotonic() if seconds is None else seconds))

    def count(self, observation: dict[str, Any], observed_at: float) -> int:
        """Return how many are not reflected by an observation of that time; the others are removed."""
        reflected = observation.get(LAST_COMMAND)
        while self._commands:
            number, sent_at = self._commands[0]
            if reflected is None or number is None:
                is_under_way = observed_at - sent_at < self._seconds
            else:
                is_under_way = number > reflected
            if is_under_way:
                break
            self._commands.popleft()
        return len(self._commands)

    def clear(self) -> None:
        """Remove all: the plan of a new episode does not contain them."""
        self._commands.clear()


def catch_up(planned: Tensor, taken: Tensor, rest: Tensor, displacements: Sequence[int]) -> Tensor:
    """Return the rest [t a] of a late chunk with what it planned for the steps that it missed.

    `planned` and `taken` [d a] are its own actions of those steps and the last plan's, which were taken
    instead; what safety limits cut off them is not made up for. Actions that are displacements (their
    indices) move the robot elsewhere if they differ: the sum of the differences is spread evenly over the
    next d actions of the rest, or over all if there are fewer.
    """
    steps, columns = min(len(planned), len(rest)), list(displacements)
    if not steps or not columns:
        return rest
    missed = (planned - taken[: len(planned)])[:, columns].sum(dim=0)
    rest = rest.clone()
    rest[:steps, columns] += missed / steps
    return rest


def check_displacements(name: str, displacements: Sequence[int], size: int) -> None:
    """Refuse indices that are not of an action [size].

    Raises:
        ValueError: Says what was expected and received.
    """
    if not isinstance(displacements, Sequence) or not all(
        type(index) is int and 0 <= index < size for index in displacements
    ):
        raise ValueError(
            f"{name}: expected a list of indices of actions, from 0 to {size - 1}; got {displacements!r}."
        )


@dataclass(frozen=True)
class Snapshot:
    """An observation, its time (monotonic clock), and the number of the plan's actions that it reflects."""

    observation: Any
    seconds: float
    index: int


class ChunkQueue:
    """The plan: actions, each with its index in the episode; safe to use from several threads.

    `displacements` are the indices of the actions for which a late chunk makes up; see `catch_up`.
    """

    def __init__(self, displacements: Sequence[int] = ()) -> None:
        self._displacements = displacements
        self._lock = threading.Lock()
        self._plan: tuple[Tensor, Tensor] | None = None  # [t a] in the policy's units and in the robot's
        self._first = 0  # index of the plan's first action
        self.index = 0  # of the next action: the number of those taken

    def pop(self) -> Tensor | None:
        """Return the next action [a] in the robot's units; None if there is none."""
        with self._lock:
            if self._plan is None or self.index - self._first >= len(self._plan[1]):
                return None
            self.index += 1
            return self._plan[1][self.index - 1 - self._first].clone()

    def since(self, index: int) -> Tensor | None:
        """Return the actions [t a] in the policy's units from an index on, taken or not; None without any."""
        with self._lock:
            since = None if self._plan is None else self._plan[0][index - self._first :]
            return None if since is None or not len(since) else since.clone()

    def left(self) -> int:
        """Return the number of actions that are not taken."""
        with self._lock:
            return 0 if self._plan is None else len(self._plan[1]) - (self.index - self._first)

    def join(self, chunk: Tensor, actions: Tensor, index: int) -> int:
        """Continue with a chunk [t a] that begins at an index; return how many of it were taken since."""
        with self._lock:
            delay = self.index - index
            new = (chunk, actions)
            if self._plan is not None:  # what was taken stays what it was
                taken = slice(index - self._first, self.index - self._first)
                new = tuple(
                    torch.cat([old[taken], self._continue(old[taken], part, delay)])
                    for old, part in zip(self._plan, new, strict=True)
                )
            self._plan, self._first = (new[0], new[1]), index
            return delay

    def _continue(self, taken: Tensor, chunk: Tensor, delay: int) -> Tensor:
        """Return the actions of a chunk that were not due before it arrived, in either unit."""
        return catch_up(chunk[:delay], taken, chunk[delay:], self._displacements)

    def clear(self) -> None:
        """Remove all actions and begin at index 0."""
        with self._lock:
            self._plan, self._first, self.index = None, 0, 0


class AlignedEngine(InferenceEngine):
    """Base of the engines: joins chunks in a queue by the number of actions that observations reflect.

    `reset_policy` resets policy and processors. `safety` knows the time of the last observation, and the
    largest age of one when its chunk arrives. `under_way` counts the commands that an observation does not
    reflect. `displacements` are the indices of the actions for which a late chunk makes up (`catch_up`).
    """

    def __init__(
        self,
        predict: Predict,
        reset_policy: Callable[[], None],
        safety: SafetyFilter,
        under_way: CommandsUnderWay,
        displacements: Sequence[int] = (),
    ) -> None:
        self._predict, self._reset_policy = predict, reset_policy
        self._safety, self._under_way = safety, under_way
        self._queue = ChunkQueue(displacements)
        self._latest: Snapshot | None = None
        self._episode = 0
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Remove actions and observation; a prediction that is running will not be executed."""
        with self._lock:
            self._episode += 1
            self._latest = None
            self._queue.clear()
            self._under_way.clear()
        self._reset_policy()

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Set the observation before the next action."""
        with self._lock:
            seconds = self._safety.observed_at
            index = self._queue.index - self._under_way.count(obs, seconds)
            self._latest = Snapshot(obs, seconds, index)

    def command_sent(self, number: int | None) -> None:
        """Count the action that was just taken as a command; `number` is the robot's `commands_sent`."""
        with self._lock:
            self._under_way.add(number)

    @abstractmethod
    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """Return the next action [a] in the robot's units, or None."""


class SyncEngine(AlignedEngine):
    """Predicts a chunk when none of the last one's first `action_steps` actions is left; the robot waits.

    `prepare` is applied to every observation, for a policy that reads histories of frames.
    """

    def __init__(
        self,
        predict: Predict,
        reset_policy: Callable[[], None],
        safety: SafetyFilter,
        under_way: CommandsUnderWay,
        displacements: Sequence[int] = (),
        *,
        action_steps: int | None = None,
        prepare: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(predict, reset_policy, safety, under_way, displacements)
        self._action_steps, self._prepare = action_steps, prepare

    def start(self) -> None:
        """Do nothing: there is no thread."""

    def stop(self) -> None:
        """Do nothing: there is no thread."""

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Set the observation before the next action."""
        super().notify_observation(obs)
        if self._prepare is not None and self._latest is not None:
            self._latest = Snapshot(self._prepare(obs), self._latest.seconds, self._latest.index)

    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """Return the next action [a] in the robot's units; predict where there is none."""
        if self._queue.left() == 0 and self._latest is not None:
            latest, index = self._latest, self._queue.index
            under_way = index - latest.index
            chunk, actions = self._predict(latest.observation, under_way, self._queue.since(latest.index))
            if under_way >= len(actions):
                raise ValueError(
                    f"{under_way} commands are under way, but a chunk has only {len(actions)} actions; lower "
                    "robot.fps"
                )
            end = None if self._action_steps is None else under_way + self._action_steps
            self._queue.join(chunk[:end], actions[:end], latest.index)
        return self._queue.pop()


class RealTimeEngine(AlignedEngine):
    """Predicts the next chunk in its own thread while the last one is executed; see `AlignedEngine`.

    The next chunk is predicted when at most `threshold` actions are left. A failed prediction is followed by
    a pause; `MAX_FAILURES` in a row set `shutdown`.
    """

    def __init__(
        self,
        predict: Predict,
        reset_policy: Callable[[], None],
        safety: SafetyFilter,
        under_way: CommandsUnderWay,
        displacements: Sequence[int] = (),
        *,
        threshold: int,
        shutdown: threading.Event,
        retry_seconds: float = 0.5,
    ) -> None:
        super().__init__(predict, reset_policy, safety, under_way, displacements)
        self._threshold, self._shutdown = threshold, shutdown
        self._retry_seconds = retry_seconds
        self._delays: deque[int] = deque(maxlen=REMEMBERED_DELAYS)
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

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Set the observation before the next action."""
        super().notify_observation(obs)
        self._has_news.set()

    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """Return the next action [a] in the robot's units, or None."""
        return self._queue.pop()

    def predict_if_due(self) -> None:
        """Predict once, if there is a new observation and at most `threshold` actions are left."""
        with self._lock:
            latest, episode = self._latest, self._episode
            if latest is None or self._queue.left() > self._threshold:
                return
            since = self._queue.since(latest.index)
            self._latest = None
        chunk, actions = self._predict(latest.observation, max(self._delays, default=0), since)
        with self._lock:
            if episode != self._episode or not self._safety.accept_chunk(latest.seconds):
                return
            delay = self._queue.join(chunk, actions, latest.index)
        if since is not None:  # while nothing is executed, no delay can be counted
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
