"""The last word on what a robot is told: every command is finite, inside its limits, and reachable smoothly.

A command that is not finite, names other joints, jumps or rests on an old observation is refused whole: the
robot is brought to rest instead. Any other command is approached as fast as the limits allow. Neither can
raise an error in mid-motion; the numbers and names of what was done are kept.
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
from types import TracebackType
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


class UnsafeStartError(ValueError):
    """The robot stands, or is seen, where its limits do not allow it to be; nothing was commanded."""


@dataclass(frozen=True)
class Intervention:
    """One deed of the safety layer.

    Attributes:
        seconds: When, on the monotonic clock.
        kind: `range`, `speed`, `workspace` (altered), `keys`, `finite`, `jump`, `stale`,
            `stale plan` (refused),
            `watchdog` (held), `stop` (for good).
        detail: What was wrong, in words.
    """

    seconds: float
    kind: str
    detail: str


@dataclass(frozen=True)
class JointLimits:
    """What may be commanded to one entry of the robot's action, in that entry's own unit u.

    For a robot that takes absolute positions these are positions, speeds and accelerations. For one that
    takes displacements a step, `low` and `high` bound the speed, `speed` the acceleration.

    Attributes:
        name: Key of the action, such as `shoulder_pan.pos`.
        low: Smallest command.
        high: Largest command.
        speed: Largest change of the command, u/s.
        acceleration: Largest change of that change, u/s^2.
        jump: A command farther than this from where the robot was sent, and from what was last wanted, is
            refused, not approached.
        rest: The command that lets the robot stand still (0 for displacements); None: stay where it is.
        start: Command taken as given before the first one; None takes `rest`, else the measured position.
    """

    name: str
    low: float
    high: float
    speed: float = math.inf
    acceleration: float = math.inf
    jump: float = math.inf
    rest: float | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that nothing can keep.

        Raises:
            ValueError: If a bound is not finite, a limit not positive, or rest or start out of bounds.
        """
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
    """A box that the hand may not leave, for robots whose action moves the hand by a displacement a step.

    Robots that take absolute hand positions need none: their `JointLimits` are the box. For joint commands it
    would take the arm's kinematics, which this package does not know.

    Attributes:
        low: Smallest x, y, z of the hand in metres.
        high: Largest x, y, z in metres.
        position: Observation keys of the hand's x, y, z in metres.
        action: Action keys that move it along x, y, z.
        metres_per_unit: How far a command of 1 moves the hand.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    position: tuple[str, str, str]
    action: tuple[str, str, str]
    metres_per_unit: float

    def __post_init__(self) -> None:
        """Refuse an empty box.

        Raises:
            ValueError: If low is not below high, or the scale is not positive.
        """
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"workspace: expected low < high in x, y, z; got {self.low} and {self.high}")
        if not self.metres_per_unit > 0:
            raise ValueError(f"workspace: metres_per_unit must be positive, got {self.metres_per_unit}")


def read_limits(joints: Mapping[str, Mapping[str, Any]]) -> tuple[JointLimits, ...]:
    """Read limits from a config, by joint name; a value of null means no such limit.

    Raises:
        ValueError: If a field is unknown or missing, or a limit is impossible.
    """
    known = {field.name for field in fields(JointLimits)} - {"name"}
    limits = []
    for name, values in joints.items():
        unknown, missing = sorted(set(values) - known), sorted({"low", "high"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"limits of {name}: unknown fields {unknown}, missing fields {missing}; there are "
                f"{sorted(known)}"
            )
        given = {key: float(value) for key, value in values.items() if value is not None}
        limits.append(JointLimits(name, **given))
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
    """Measure limits on demonstrations: what was done there, and a margin more.

    Args:
        names: Action keys, in the order of the columns.
        episodes: Actions of each episode, [t a], in the robot's units.
        fps: Control steps a second.
        percentile: Share of the demonstrated values that must lie inside, in percent; the rest is outliers.
        margin: How far beyond, as a share of the range, speed, acceleration or jump.
        rest: See `JointLimits.rest`, for all joints.

    Raises:
        ValueError: If there are fewer than three steps in every episode, or the columns do not match.
    """
    long_enough = [np.asarray(episode, np.float64) for episode in episodes if len(episode) >= 3]
    if not long_enough or any(episode.shape[1] != len(names) for episode in long_enough):
        shapes = sorted({np.shape(episode) for episode in episodes})[:3]
        raise ValueError(
            f"expected episodes of at least 3 steps with {len(names)} actions {list(names)}, got {shapes}"
        )
    values = np.concatenate(long_enough)
    steps = np.abs(np.concatenate([np.diff(episode, axis=0) for episode in long_enough]))
    bends = np.abs(np.concatenate([np.diff(episode, n=2, axis=0) for episode in long_enough]))
    low, high = np.percentile(values, [100 - percentile, percentile], axis=0)
    room = margin * np.maximum(high - low, 1e-6)
    largest_step = np.percentile(steps, percentile, axis=0) * (1 + margin)
    largest_bend = np.percentile(bends, percentile, axis=0) * (1 + margin)
    return tuple(
        JointLimits(
            name,
            low=float(low[joint] - room[joint]),
            high=float(high[joint] + room[joint]),
            speed=max(float(largest_step[joint]) * fps, 1e-6),
            acceleration=max(float(largest_bend[joint]) * fps**2, 1e-6),
            jump=max(2 * float(largest_step[joint]), 1e-6),
            rest=rest,
        )
        for joint, name in enumerate(names)
    )


def braking_speed(room: np.ndarray, acceleration: np.ndarray, dt: float) -> np.ndarray:
    """Largest speed [a] from which a joint comes to rest within some room.

    Braking from v at rate a needs v^2 / 2a. A step at v leaves d - v dt of the room d, so v is at most the
    root of v^2 / 2a + v dt = d; without a limit of a, it is d / dt.

    Args:
        room: Distance d [a] to where it must rest, at least 0.
        acceleration: Largest rate of braking [a], which may be infinite.
        dt: Seconds of the step.
    """
    with np.errstate(invalid="ignore"):
        braked = 2 * room / (np.sqrt(dt**2 + 2 * room / acceleration) + dt)
    return np.where(np.isinf(acceleration), room / dt, braked)


TOLERANCE = 1e-6
"""A command that is altered by less than this is not counted as altered."""


class SafetyFilter:
    """Turns what a policy wants into what the robot is told; safe to use from several threads.

    Args:
        limits: Limits of every entry of the robot's action.
        period: Seconds of a control step. Commands that come later than that get no larger step for it.
        workspace: Box for the hand, or None.
        max_observation_age: Seconds after which an observation is too old to act on.
        refusals_to_stop: So many refusals in a row stop the robot for good.
        on_intervention: Called with each intervention, from the thread that caused it: be quick.
    """

    def __init__(
        self,
        limits: Sequence[JointLimits],
        *,
        period: float,
        workspace: Workspace | None = None,
        max_observation_age: float = 1.0,
        refusals_to_stop: int = 10,
        on_intervention: Callable[[Intervention], None] | None = None,
    ) -> None:
        self.limits = tuple(limits)
        driving = [limit.name for limit in limits if limit.name.endswith(".vel") and limit.rest is None]
        if driving:
            raise ValueError(
                f"{', '.join(driving)}: a velocity that is held goes on driving; give its limits rest: 0.0"
            )
        self.names = tuple(limit.name for limit in limits)
        self.period = period
        self.counts: Counter[str] = Counter()
        self._workspace = workspace
        self._max_age = max_observation_age
        self._refusals_to_stop = refusals_to_stop
        self._on_intervention = on_intervention
        self._low, self._high, self._speed, self._acceleration, self._jump = (
            np.array([vars(limit)[field] for limit in limits])
            for field in ("low", "high", "speed", "acceleration", "jump")
        )
        self._lock = threading.RLock()
        self._stopped: str | None = None
        self.forget()

    def forget(self) -> None:
        """Measure the robot's position anew with the next command, as with the first; a stop stays a stop."""
        with self._lock:
            self.last_action: float | None = None
            self._command: np.ndarray | None = None
            self._wanted = np.full(len(self.limits), np.inf)  # nothing yet: far from everything
            self._velocity = np.zeros(len(self.limits))
            self._commanded_at = self.observed_at = -np.inf
            self._refusals = 0

    @property
    def stopped(self) -> str | None:
        """Why the robot was stopped for good, or None."""
        return self._stopped

    @property
    def last_command(self) -> dict[str, float]:
        """What the robot was told last; empty before the first command."""
        with self._lock:
            return {} if self._command is None else self._named(self._command)

    def stop(self, reason: str) -> None:
        """Stop for good: from now on every command is a rest. Takes no lock, so that nothing can delay it."""
        if self._stopped is None:
            self._stopped = reason
            self._note("stop", reason, time.monotonic())

    def restart(self) -> None:
        """Allow motion again, after a person has looked; the robot's position is measured anew."""
        with self._lock:
            self._stopped = None
            self.forget()

    def observed(self, seconds: float) -> None:
        """Say when the observation was taken (monotonic clock) that the next command rests on."""
        self.observed_at = seconds

    def accepts_view(self, seconds: float) -> bool:
        """Say whether a plan just made from a view of then may be executed; count it, if not."""
        now = time.monotonic()
        with self._lock:
            if now - seconds <= self._max_age:
                return True
            self._refuse("stale plan", f"it rests on an observation {now - seconds:.3f} s old", now)
            return False

    def command(
        self, action: Mapping[str, float], observation: Mapping[str, Any], now: float | None = None
    ) -> dict[str, float]:
        """Return what the robot is told.

        Args:
            action: What the policy wants, by action key.
            observation: What the robot reports of itself; read for the first command and the workspace.
            now: Monotonic clock in seconds; None reads it.

        Raises:
            UnsafeStartError: At the first command, if the robot stands outside its limits or does not say
                where it stands.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._command is None:
                self._command = self._measure(observation)
            self.last_action = now
            if self._stopped is not None:
                return self._approach(self._rest(), now, observation)
            refusal = self._refusal(action, now)
            if refusal is not None:
                self._refuse(*refusal, now)
                return self._approach(self._rest(), now, observation)
            self._refusals = 0
            target = np.array([float(action[name]) for name in self.names])
            clipped = np.clip(target, self._low, self._high)
            self._compare("range", target, clipped, now)
            shift = np.where(np.isfinite(self._wanted), clipped - self._wanted, 0.0)
            self._wanted = clipped
            return self._approach(clipped, now, observation, shift=shift)

    def hold(self, reason: str, now: float | None = None) -> dict[str, float] | None:
        """Return a command that brings the robot to rest; None if it was never told anything."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._command is None:
                return None
            self._note("watchdog", reason, now)
            return self._approach(self._rest(), now)

    def _measure(self, observation: Mapping[str, Any]) -> np.ndarray:
        start = np.empty(len(self.limits))
        for joint, limit in enumerate(self.limits):
            known = limit.start if limit.start is not None else limit.rest
            if known is None and limit.name not in observation:
                raise UnsafeStartError(
                    f"the robot does not report {limit.name}, so it is unknown where it stands; give its "
                    f"limits a start or a rest. It reports {sorted(observation)}"
                )
            value = float(observation[limit.name]) if known is None else known
            room = 0.01 * (limit.high - limit.low)  # a measured position may miss the bound by its noise
            if not limit.low - room <= value <= limit.high + room:
                raise UnsafeStartError(
                    f"{limit.name} stands at {value:.4g}, outside its limits [{limit.low:.4g}, "
                    f"{limit.high:.4g}]; move it there by hand, or check units and limits"
                )
            start[joint] = min(max(value, limit.low), limit.high)
        return start

    def _refusal(self, action: Mapping[str, float], now: float) -> tuple[str, str] | None:
        """Say why an action is refused; None if it is not."""
        if set(action) != set(self.names):
            return "keys", f"expected the joints {list(self.names)}, got {list(action)}"
        values = np.array([float(action[name]) for name in self.names])
        if not np.isfinite(values).all():
            return "finite", f"not finite: {dict(action)}"
        if self.observed_at > -np.inf and now - self.observed_at > self._max_age:
            return "stale", f"it rests on an observation {now - self.observed_at:.3f} s old"
        assert self._command is not None
        # From what was last wanted, too: a robot that lags behind a smooth policy is no jump of the policy.
        far = np.minimum(np.abs(values - self._command), np.abs(values - self._wanted)) > self._jump
        if far.any():
            jumps = {
                name: f"{self._command[joint]:.4g} -> {values[joint]:.4g} (allowed {self._jump[joint]:.4g})"
                for joint, name in enumerate(self.names)
                if far[joint]
            }
            return "jump", f"too far from the last command: {jumps}"
        return None

    def _refuse(self, kind: str, detail: str, now: float) -> None:
        self._refusals += 1
        self._note(kind, detail, now)
        if self._refusals >= self._refusals_to_stop:
            self.stop(f"{self._refusals} refused commands in a row, the last one because of: {detail}")

    def _rest(self) -> np.ndarray:
        assert self._command is not None
        stays = zip(self._command, self.limits, strict=True)
        return np.array([here if limit.rest is None else limit.rest for here, limit in stays])

    def _approach(
        self,
        target: np.ndarray,
        now: float,
        observation: Mapping[str, Any] | None = None,
        *,
        shift: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Take one step towards a target [a], no larger than speed, acceleration and braking allow.

        `shift` [a] is how far the policy moved its target since the last step; None for a target that is not
        a policy's. A lag is caught up no faster than it can be braked, so that nothing overshoots.
        """
        assert self._command is not None
        dt = float(min(max(now - self._commanded_at, 0.0), self.period))
        if dt == 0.0:
            return self._named(self._command)
        self._commanded_at = now
        along = np.zeros_like(target) if shift is None else shift
        lag = target - along - self._command
        wanted = along / dt + np.sign(lag) * braking_speed(np.abs(lag), self._acceleration, dt)
        slowest, fastest = self._velocity_bounds(dt)
        velocity = np.clip(wanted, slowest, fastest)
        command = np.clip(self._command + velocity * dt, self._low, self._high)
        if shift is not None:
            self._compare("speed", target, command, now)
        kept = command if observation is None else self._keep_inside(command, observation, now)
        # Where the box cut a command, it starts anew from there: the cut was no braking.
        self._velocity = np.where(kept == command, (kept - self._command) / dt, 0.0)
        self._command = kept
        return self._named(kept)

    def _velocity_bounds(self, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """Velocities [a] that keep speed and acceleration, and from which it can still brake at the bounds.

        The velocity before met the last of these, too, so there always is one.
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

    def _keep_inside(self, command: np.ndarray, observation: Mapping[str, Any], now: float) -> np.ndarray:
        """Cut what would move the hand out of its box; this wins over smoothness."""
        box = self._workspace
        if box is None:
            return command
        kept = command.copy()
        for axis, name in enumerate(box.action):
            here, joint = float(observation[box.position[axis]]), self.names.index(name)
            least = min((box.low[axis] - here) / box.metres_per_unit, 0.0)
            most = max((box.high[axis] - here) / box.metres_per_unit, 0.0)
            kept[joint] = min(max(command[joint], least), most) if np.isfinite(here) else 0.0
        self._compare("workspace", command, kept, now)
        return kept

    def _compare(self, kind: str, wanted: np.ndarray, allowed: np.ndarray, now: float) -> None:
        changed = np.abs(wanted - allowed) > TOLERANCE
        if changed.any():
            parts = {
                name: f"{wanted[joint]:.4g} -> {allowed[joint]:.4g}"
                for joint, name in enumerate(self.names)
                if changed[joint]
            }
            self._note(kind, str(parts), now)

    def _note(self, kind: str, detail: str, now: float) -> None:
        self.counts[kind] += 1
        logger.log(
            logging.WARNING if kind not in ("range", "speed") else logging.INFO, "%s: %s", kind, detail
        )
        if self._on_intervention is not None:
            self._on_intervention(Intervention(now, kind, detail))

    def _named(self, command: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, command.tolist(), strict=True))


@dataclass
class SafetyStep(RobotActionProcessorStep):
    """Passes each robot action through a `SafetyFilter`; must be the pipeline's last step.

    Attributes:
        safety: The filter; it keeps what the robot was last told.
    """

    safety: SafetyFilter

    def action(self, action: RobotAction) -> RobotAction:
        """Return what the robot is told."""
        observation: dict[str, Any] | None = self.transition.get(TransitionKey.OBSERVATION)
        return self.safety.command(action, observation or {})

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Actions keep their names."""
        return features


def safe_action_pipeline(
    safety: SafetyFilter,
) -> RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction]:
    """Return LeRobot's `robot_action_processor` with the safety layer as its only step."""
    return RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction](
        steps=[SafetyStep(safety)],
        to_transition=robot_action_observation_to_transition,
        to_output=transition_to_robot_action,
    )


NAMED_KEYS = ("space", "esc", "enter")
"""Names that LeRobot gives to keys of the terminal that are no single character."""


class Watchdog:
    """Holds the robot when no action comes in time, and stops it for good when none comes for long.

    It lives in a thread of its own, so a policy that hangs cannot hold it up. It begins with the first
    command: a robot that was never told anything is left alone. Use it as a context manager.

    Args:
        safety: The filter that all commands pass.
        send: Gives a command to the robot; must be safe to call from another thread.
        hold_after: Seconds without a command after which the robot is brought to rest.
        stop_after: Seconds without a command after which it is stopped for good.
        on_stop: Called once when the robot was stopped, by this watchdog or by anybody else.
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
        self._safety = safety
        self._send = send
        self._hold_after, self._stop_after = hold_after, stop_after
        self._on_stop = on_stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        told = False
        while not self._ended.wait(self._safety.period / 2):
            if self._safety.stopped is not None and not told:
                told = True
                self._on_stop(self._safety.stopped)
            last = self._safety.last_action
            if last is None:
                continue
            idle = time.monotonic() - last
            if idle > self._stop_after:
                self._safety.stop(f"no action for {self._stop_after} s")
            late = idle > self._hold_after or (
                self._safety.stopped is not None and idle > self._safety.period
            )
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
        except (OSError, RuntimeError) as error:  # a bus or a connection that fails must not end the watch
            logger.error("the watchdog cannot reach the robot: %s", error)


class EmergencyStop:
    """Stops the robot for good when a signal comes or a key is pressed.

    The signals (SIGUSR1: `kill -USR1 <process>`, and SIGTERM) and the key are each read by a thread: neither
    waits for a policy that computes. Use it as a context manager, in the main thread.

    Args:
        stop: Called with the reason.
        key: Name of the key (LeRobot's names: `space`, `esc`, or one character); read from the terminal, if
            there is one.
        others: What other keys do; the terminal has one reader only.

    Raises:
        ValueError: If a key has a name that no terminal sends, or two meanings.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

    def __init__(
        self,
        stop: Callable[[str], None],
        *,
        key: str = "space",
        others: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self._stop = stop
        self._key = key.lower()
        self._others = {name.lower(): action for name, action in (others or {}).items()}
        names = [self._key, *self._others]
        wrong = [name for name in names if len(name) != 1 and name not in NAMED_KEYS]
        if wrong or len(set(names)) < 1 + len(others or {}):
            raise ValueError(
                f"keys: expected different ones, each a single character or one of {', '.join(NAMED_KEYS)}; "
                f"got {', '.join([key, *(others or {})])}"
            )
        self._listener: Any = None

    def __enter__(self) -> Self:
        # Python's own handlers run between bytecodes of the main thread, which may be deep in a policy. The
        # wake-up socket is written to at once.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {name: signal.signal(name, lambda *_: None) for name in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="emergency stop", daemon=True)
        self._thread.start()
        self._listener = self._listen_to_keys()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join(timeout=5.0)
        self._reader.close()
        if self._listener is not None:
            self._listener.stop()

    def _listen(self) -> None:
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

    def press(self, key: str) -> None:
        """Take a key from the terminal."""
        if key.lower() == self._key:
            self._stop(f"emergency stop by key {self._key!r}")
        elif key.lower() in self._others:
            self._others[key.lower()]()
