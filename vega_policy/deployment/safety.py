"""Safety layer between policy and robot: command limits, watchdog and emergency stop.

A command that is not finite, names other joints, jumps or rests on an old observation is refused whole, and
the robot is brought to rest. Any other command is approached as fast as the limits allow. Neither raises an
error during motion; each event is counted and logged.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from lerobot.configs.types import PipelineFeatureType, PolicyFeature
from lerobot.processor import (
    RobotAction,
    RobotActionProcessorStep,
    RobotObservation,
    RobotProcessorPipeline,
    TransitionKey,
)
from lerobot.processor.converters import robot_action_observation_to_transition, transition_to_robot_action

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6  # a command that changes by less does not count as changed
SHORTEST_STEP = 1e-9  # s; velocities over shorter times overflow


class UnsafeStartError(ValueError):
    """The robot stands outside its limits, or does not report where; nothing was commanded."""


class SafetyFilter:
    """Turns actions of a policy into commands within limits; safe to use from several threads.

    `counts` holds the number of events of each kind: `range`, `speed`, `workspace` (command changed), `keys`,
    `finite`, `jump`, `stale`, `stale chunk` (command or chunk refused), `watchdog` (robot held) and `stop`.

    Args:
        limits: Limits of every entry of the robot's action.
        period: Seconds of a control step; a later command gets no larger step.
        workspace: Box for the hand, or None.
        max_observation_age: Seconds after which an observation is too old to act on.
        refusals_to_stop: Number of refusals in a row that stop the robot for good.
    """

    def __init__(
        self,
        limits: Sequence[JointLimits],
        *,
        period: float,
        workspace: Workspace | None = None,
        max_observation_age: float = 1.0,
        refusals_to_stop: int = 10,
    ) -> None:
        self.limits = tuple(limits)
        moving = [limit.name for limit in limits if limit.name.endswith(".vel") and limit.rest is None]
        if moving:
            raise ValueError(
                f"{', '.join(moving)}: a velocity that is held keeps the robot moving; set rest: 0.0"
            )
        self.names = tuple(limit.name for limit in limits)
        if workspace is not None:
            bounds = {limit.name: (limit.low, limit.high) for limit in limits}
            ranges = {name: bounds.get(name, (1, 1)) for name in workspace.action}
            wrong = [name for name, (low, high) in ranges.items() if not low <= 0.0 <= high]
            if wrong:
                raise ValueError(
                    f"workspace: expected limits around 0, at which the hand stands still, of "
                    f"{', '.join(workspace.action)}; {', '.join(wrong)} has none. Known: {', '.join(bounds)}"
                )
        self.period = period
        self.counts: Counter[str] = Counter()
        self.stopped: str | None = None  # why the robot was stopped for good, or None
        self._workspace = workspace
        self._max_age = max_observation_age
        self._refusals_to_stop = refusals_to_stop
        self._low, self._high, self._speed, self._acceleration, self._jump = (
            np.array([vars(limit)[field] for limit in limits])
            for field in ("low", "high", "speed", "acceleration", "jump")
        )
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Read the robot's position again with the next command, as with the first; keep a stop."""
        with self._lock:
            self.last_action: float | None = None  # when the policy gave its last action (monotonic clock)
            self._command: np.ndarray | None = None
            self._target = np.full(len(self.limits), np.inf)  # none yet: far from everything
            self._velocity = np.zeros(len(self.limits))
            self._commanded_at = self.observed_at = -np.inf
            self._refusals = 0

    def restart(self) -> None:
        """Allow motion again after a stop, once a person has checked the robot."""
        with self._lock:
            self.stopped = None
            self.reset()

    def stop(self, reason: str) -> None:
        """Stop for good: every later command rests. Takes no lock, so that nothing can delay it."""
        if self.stopped is None:
            self.stopped = reason
            self._count("stop", reason)

    def set_observation_time(self, seconds: float) -> None:
        """Set when the observation of the next command was taken (monotonic clock)."""
        self.observed_at = seconds

    def accept_chunk(self, observed_at: float) -> bool:
        """Whether a chunk may be executed that was predicted from an observation of that time."""
        age = time.monotonic() - observed_at
        is_fresh = age <= self._max_age  # False for nan
        with self._lock:
            if not is_fresh:
                self._refuse("stale chunk", f"it rests on an observation {age:.3f} s old")
        return is_fresh

    @property
    def last_command(self) -> dict[str, float]:
        """The last command by action key; empty before the first one."""
        with self._lock:
            return {} if self._command is None else self._named(self._command)

    def command(
        self, action: Mapping[str, float], observation: Mapping[str, Any], now: float | None = None
    ) -> dict[str, float]:
        """Return the command for an action, both by action key.

        The robot's observation is read for the first command and the workspace. `now` is the monotonic clock
        in seconds; None reads it.

        Raises:
            UnsafeStartError: At the first command, if the robot stands outside its limits or does not report
                where it stands.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._command is None:
                self._command = self._start_position(observation)
            self.last_action = now
            if self.stopped is not None:
                return self._approach(self._rest(), now, observation)
            refusal = self._find_refusal(action, now)
            if refusal is not None:
                self._refuse(*refusal)
                return self._approach(self._rest(), now, observation)
            self._refusals = 0
            requested = np.array([float(action[name]) for name in self.names])
            target = np.clip(requested, self._low, self._high)
            self._count_changes("range", requested, target)
            shift = np.where(np.isfinite(self._target), target - self._target, 0.0)
            self._target = target
            return self._approach(target, now, observation, shift=shift)

    def hold(self, reason: str, now: float | None = None) -> dict[str, float] | None:
        """Return a command that brings the robot to rest; None before the first command."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._command is None:
                return None
            self._count("watchdog", reason)
            return self._approach(self._rest(), now)

    def _start_position(self, observation: Mapping[str, Any]) -> np.ndarray:
        start = np.empty(len(self.limits))
        for joint, limit in enumerate(self.limits):
            known = limit.start if limit.start is not None else limit.rest
            if known is None and limit.name not in observation:
                raise UnsafeStartError(
                    f"the robot does not report {limit.name}, so its position is unknown; give its limits a "
                    f"start or a rest. It reports {sorted(observation)}"
                )
            value = float(observation[limit.name]) if known is None else known
            margin = 0.01 * (limit.high - limit.low)  # measurement noise at a bound is no error
            if not limit.low - margin <= value <= limit.high + margin:
                raise UnsafeStartError(
                    f"{limit.name} stands at {value:.4g}, outside its limits [{limit.low:.4g}, "
                    f"{limit.high:.4g}]; move it there by hand, or check units and limits"
                )
            start[joint] = min(max(value, limit.low), limit.high)
        return start

    def _find_refusal(self, action: Mapping[str, float], now: float) -> tuple[str, str] | None:
        """Return kind and detail of why an action is refused; None if it is not."""
        if set(action) != set(self.names):
            return "keys", f"expected the joints {list(self.names)}, got {list(action)}"
        values = np.array([float(action[name]) for name in self.names])
        if not np.isfinite(values).all():
            return "finite", f"not finite: {dict(action)}"
        if self.observed_at != -np.inf and not now - self.observed_at <= self._max_age:  # also nan
            return "stale", f"it rests on an observation {now - self.observed_at:.3f} s old"
        assert self._command is not None
        # Also from the last target: a robot that lags behind a smooth policy is no jump of the policy.
        far = np.minimum(np.abs(values - self._command), np.abs(values - self._target)) > self._jump
        if far.any():
            jumps = {
                name: f"{self._command[joint]:.4g} -> {values[joint]:.4g} (allowed {self._jump[joint]:.4g})"
                for joint, name in enumerate(self.names)
                if far[joint]
            }
            return "jump", f"too far from the last command: {jumps}"
        return None

    def _refuse(self, kind: str, detail: str) -> None:
        self._refusals += 1
        self._count(kind, detail)
        if self._refusals >= self._refusals_to_stop:
            self.stop(f"{self._refusals} refused commands in a row, the last one because of: {detail}")

    def _rest(self) -> np.ndarray:
        assert self._command is not None
        pairs = zip(self._command, self.limits, strict=True)
        return np.array([present if limit.rest is None else limit.rest for present, limit in pairs])

    def _approach(
        self,
        target: np.ndarray,
        now: float,
        observation: Mapping[str, Any] | None = None,
        *,
        shift: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Return the next command towards a target [a], within speed, acceleration and braking limits.

        `shift` [a] is the policy's change of its target since the last step; None for a target that is not a
        policy's. A lag is reduced no faster than the robot can brake, so that nothing overshoots.
        """
        assert self._command is not None
        elapsed = now - self._commanded_at
        if not elapsed >= SHORTEST_STEP:  # also nan, and a clock that stands still or runs backwards
            return self._named(self._command)
        dt = float(min(elapsed, self.period))
        self._commanded_at = now
        along = np.zeros_like(target) if shift is None else shift
        lag = target - along - self._command
        desired = along / dt + np.sign(lag) * braking_speed(np.abs(lag), self._acceleration, dt)
        slowest, fastest = self._velocity_bounds(dt)
        velocity = np.clip(desired, slowest, fastest)
        command = np.clip(self._command + velocity * dt, self._low, self._high)
        if shift is not None:
            self._count_changes("speed", target, command)
        kept = command if observation is None else self._keep_inside(command, observation)
        # Where the box cut a command, the velocity restarts at zero: the cut was no braking.
        self._velocity = np.where(kept == command, (kept - self._command) / dt, 0.0)
        self._command = kept
        return self._named(kept)

    def _velocity_bounds(self, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the velocities [a] that keep speed and acceleration, and allow braking before the bounds.

        The previous velocity was within the last of these too, so the interval is never empty.
        """
        assert self._command is not None
        up, down = (
            braking_speed(room, self._acceleration, dt)
            for room in (self._high - self._command, self._command - self._low)
        )
        change = self._acceleration * dt
        fastest = np.minimum(np.minimum(self._velocity + change, self._speed), up)
        slowest = np.maximum(np.maximum(self._velocity - change, -self._speed), -down)
        return np.minimum(slowest, fastest), fastest  # rounding alone can cross them

    def _keep_inside(self, command: np.ndarray, observation: Mapping[str, Any]) -> np.ndarray:
        """Return the command [a], cut so that the hand stays in its box; this outranks smoothness."""
        box = self._workspace
        if box is None:
            return command
        kept = command.copy()
        for axis, name in enumerate(box.action):
            position, joint = float(observation[box.position[axis]]), self.names.index(name)
            low = min((box.low[axis] - position) / box.metres_per_unit, 0.0)
            high = max((box.high[axis] - position) / box.metres_per_unit, 0.0)
            kept[joint] = min(max(command[joint], low), high) if np.isfinite(position) else 0.0
        self._count_changes("workspace", command, kept)
        return kept

    def _count_changes(self, kind: str, requested: np.ndarray, allowed: np.ndarray) -> None:
        changed = np.abs(requested - allowed) > TOLERANCE
        if changed.any():
            parts = {
                name: f"{requested[joint]:.4g} -> {allowed[joint]:.4g}"
                for joint, name in enumerate(self.names)
                if changed[joint]
            }
            self._count(kind, str(parts))

    def _count(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        level = logging.INFO if kind in ("range", "speed") else logging.WARNING
        logger.log(level, "%s: %s", kind, detail)

    def _named(self, command: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, command.tolist(), strict=True))


@dataclass(frozen=True)
class JointLimits:
    """Limits of one entry of the robot's action, in that entry's own unit u.

    For absolute positions, `low` and `high` bound the position. For displacements a step, they bound the
    speed, and `speed` bounds the acceleration.
    """

    name: str  # key of the action, such as `shoulder_pan.pos`
    low: float
    high: float
    speed: float = math.inf  # largest change of the command, u/s
    acceleration: float = math.inf  # largest change of that change, u/s^2
    jump: float = math.inf  # distance from last command and last target beyond which a command is refused
    rest: float | None = None  # command at which the robot stands still (0 for displacements); None: the last
    start: float | None = None  # command before the first one; None takes `rest`, else the measured position

    def __post_init__(self) -> None:
        """Refuse bounds that are not finite, limits that are not positive, and values outside the bounds."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"limits of {self.name}: expected finite low < high, got {self.low} and {self.high}"
            )
        for field in ("speed", "acceleration", "jump"):
            if not vars(self)[field] > 0:
                raise ValueError(f"limits of {self.name}: {field} must be positive, got {vars(self)[field]}")
        for field in ("rest", "start"):
            value = vars(self)[field]
            if value is not None and not self.low <= value <= self.high:
                raise ValueError(
                    f"limits of {self.name}: {field} must lie in [{self.low}, {self.high}], got {value}"
                )


@dataclass(frozen=True)
class Workspace:
    """A box for the hand of a robot whose action is a displacement of the hand.

    For absolute hand positions `JointLimits` are the box. For joint commands a box would need the arm's
    kinematics, which this package does not have.
    """

    low: tuple[float, float, float]  # smallest x, y, z of the hand in metres
    high: tuple[float, float, float]
    position: tuple[str, str, str]  # observation keys of the hand's x, y, z in metres
    action: tuple[str, str, str]  # action keys that move the hand along x, y, z
    metres_per_unit: float  # displacement of the hand by a command of 1

    def __post_init__(self) -> None:
        """Refuse an empty box and a scale that is not positive."""
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"workspace: expected low < high in x, y, z; got {self.low} and {self.high}")
        if not self.metres_per_unit > 0:
            raise ValueError(f"workspace: metres_per_unit must be positive, got {self.metres_per_unit}")


def read_limits(joints: Mapping[str, Mapping[str, Any]]) -> tuple[JointLimits, ...]:
    """Read limits from a config, by joint name; null means no such limit.

    Raises:
        ValueError: If a field is unknown or missing, or a limit is impossible.
    """
    known = {field.name for field in fields(JointLimits)} - {"name"}
    limits = []
    for name, values in joints.items():
        unknown, missing = sorted(set(values) - known), sorted({"low", "high"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"limits of {name}: unknown fields {unknown}, missing {missing}; known: {sorted(known)}"
            )
        set_values = {key: float(value) for key, value in values.items() if value is not None}
        limits.append(JointLimits(name, **set_values))
    return tuple(limits)


def limits_from_episodes(
    names: Sequence[str],
    episodes: Sequence[np.ndarray],
    *,
    fps: float,
    percentile: float = 99.9,
    margin: float = 0.25,
    rest: float | None = None,
) -> tuple[JointLimits, ...]:
    """Return limits that contain `percentile` percent of demonstrated actions, and a margin.

    `names` are the action keys of the columns of `episodes`, each [t a] in the robot's units. `margin` is the
    fraction of each range, speed, acceleration and jump that is added.

    Raises:
        ValueError: If every episode has fewer than three steps, or the columns do not match.
    """
    long_enough = [np.asarray(episode, np.float64) for episode in episodes if len(episode) >= 3]
    if not long_enough or any(episode.shape[1] != len(names) for episode in long_enough):
        shapes = sorted({np.shape(episode) for episode in episodes})[:3]
        raise ValueError(
            f"expected episodes of at least 3 steps with {len(names)} actions {list(names)}, got {shapes}"
        )
    values = np.concatenate(long_enough)
    first, second = (
        np.abs(np.concatenate([np.diff(episode, n=order, axis=0) for episode in long_enough]))
        for order in (1, 2)
    )
    low, high = np.percentile(values, [100 - percentile, percentile], axis=0)
    room = margin * np.maximum(high - low, 1e-6)
    speed = np.percentile(first, percentile, axis=0) * (1 + margin)  # a step
    acceleration = np.percentile(second, percentile, axis=0) * (1 + margin)
    return tuple(
        JointLimits(
            name,
            low=float(low[joint] - room[joint]),
            high=float(high[joint] + room[joint]),
            speed=max(float(speed[joint]) * fps, 1e-6),
            acceleration=max(float(acceleration[joint]) * fps**2, 1e-6),
            jump=max(2 * float(speed[joint]), 1e-6),
            rest=rest,
        )
        for joint, name in enumerate(names)
    )


def braking_speed(room: np.ndarray, acceleration: np.ndarray, dt: float) -> np.ndarray:
    """Return the largest speed [a] from which a joint can stop within a distance `room` [a] (at least 0).

    Braking from v at rate a needs v^2 / 2a. A step at v leaves d - v dt of the distance d, so v is at most
    the root of v^2 / 2a + v dt = d; for infinite `acceleration` [a] it is d / dt.
    """
    with np.errstate(invalid="ignore"):
        braked = 2 * room / (np.sqrt(dt**2 + 2 * room / acceleration) + dt)
    return np.where(np.isinf(acceleration), room / dt, braked)


class Watchdog:
    """Holds the robot when no action comes in time, and stops it for good when none comes for long.

    It runs in its own thread, so a policy that hangs cannot delay it, and begins with the first command. Use
    it as a context manager.

    Args:
        safety: The filter that all commands pass.
        send: Sends a command to the robot; must be safe to call from another thread.
        hold_after: Seconds without a command after which the robot is brought to rest.
        stop_after: Seconds without a command after which it is stopped for good.
        on_stop: Called once, with the reason, when the filter has stopped for any reason.
    """

    def __init__(
        self,
        safety: SafetyFilter,
        send: Callable[[dict[str, float]], Any],
        *,
        hold_after: float,
        stop_after: float,
        on_stop: Callable[[str], None],
    ) -> None:
        if not 0 < hold_after < stop_after:
            raise ValueError(f"expected 0 < hold_after < stop_after, got {hold_after} and {stop_after}")
        self.holds = 0
        self._held_at = float("-inf")
        self._safety, self._send, self._on_stop = safety, send, on_stop
        self._hold_after, self._stop_after = hold_after, stop_after
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        reported = False
        while not self._ended.wait(self._safety.period / 2):
            if self._safety.stopped is not None and not reported:
                reported = True
                self._on_stop(self._safety.stopped)
            last = self._safety.last_action
            if last is None:
                continue
            idle = time.monotonic() - last
            if idle > self._stop_after:
                self._safety.stop(f"no action for {self._stop_after} s")
            is_stopped = self._safety.stopped is not None
            late = idle > self._hold_after or (is_stopped and idle > self._safety.period)
            # One hold a control step, as commands come: faster ones would queue up before the next action.
            if late and time.monotonic() - self._held_at > 0.75 * self._safety.period:
                self._hold(f"no action for {idle:.2f} s")

    def _hold(self, reason: str) -> None:
        command = self._safety.hold(reason)
        if command is None:
            return
        self._held_at = time.monotonic()
        self.holds += 1
        try:
            self._send(command)
        except (OSError, RuntimeError) as error:  # a bus or connection error must not end the watchdog
            logger.error("the watchdog cannot reach the robot: %s", error)


class EmergencyStop:
    """Stops the robot for good at a signal (SIGUSR1: `kill -USR1 <process>`, or SIGTERM) or a key.

    Signals and keys are read by threads, so they do not wait for a policy that computes. Use it as a context
    manager, in the main thread. `stop` is called with the reason. `key` is LeRobot's name of a key (`space`,
    `esc`, `enter`, or one character) of the terminal; `others` are actions of other keys, since a terminal
    has one reader only.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
    NAMED_KEYS = ("space", "esc", "enter")

    def __init__(
        self,
        stop: Callable[[str], None],
        *,
        key: str = "space",
        others: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        others = others or {}
        self._stop = stop
        self._key = key.lower()
        self._others = {name.lower(): action for name, action in others.items()}
        names = [self._key, *self._others]
        wrong = [name for name in names if len(name) != 1 and name not in self.NAMED_KEYS]
        if wrong or len(set(names)) < 1 + len(others):
            raise ValueError(
                "keys: expected different ones, each a single character or one of "
                f"{', '.join(self.NAMED_KEYS)}; got {', '.join([key, *others])}"
            )
        self._listener: Any = None

    def __enter__(self) -> Self:
        # Python's own handlers run between bytecodes of the main thread, which a policy may block. The
        # wake-up socket is written at once.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {name: signal.signal(name, lambda *_: None) for name in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen_to_signals, name="emergency stop", daemon=True)
        self._thread.start()
        self._listener = self._listen_to_keys()
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join(timeout=5.0)
        self._reader.close()
        if self._listener is not None:
            self._listener.stop()

    def press(self, key: str) -> None:
        """Handle a key of the terminal."""
        if key.lower() == self._key:
            self._stop(f"emergency stop by key {self._key!r}")
        elif key.lower() in self._others:
            self._others[key.lower()]()

    def _listen_to_signals(self) -> None:
        while received := self._reader.recv(64):
            for name in self.SIGNALS:
                if name in received:
                    self._stop(f"emergency stop by signal {name.name}")

    def _listen_to_keys(self) -> Any:
        from lerobot.utils.keyboard_input import TerminalKeyListener

        if not sys.stdin.isatty():
            logger.warning("no terminal: the emergency stop listens to %s only", self.SIGNALS[0].name)
            return None
        listener = TerminalKeyListener(self.press)
        listener.start()
        return listener


@dataclass
class SafetyStep(RobotActionProcessorStep):
    """Passes each robot action through a `SafetyFilter`; must be the last step of a pipeline."""

    safety: SafetyFilter

    def action(self, action: RobotAction) -> RobotAction:
        """Return the command for an action."""
        observation: dict[str, Any] | None = self.transition.get(TransitionKey.OBSERVATION)
        return self.safety.command(action, observation or {})

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Return the features unchanged."""
        return features


def safe_action_pipeline(
    safety: SafetyFilter,
) -> RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction]:
    """Return a `robot_action_processor` for LeRobot with the safety layer as its only step."""
    return RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction](
        steps=[SafetyStep(safety)],
        to_transition=robot_action_observation_to_transition,
        to_output=transition_to_robot_action,
    )
