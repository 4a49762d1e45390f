"""The last word on what a robot is told: every command is finite, inside its limits, and reachable smoothly.

A command that is not finite, names other joints, jumps or rests on an old observation is refused whole: the
robot is brought to rest instead. Any other command is approached as fast as the limits allow. Neither can
raise an error in mid-motion; the numbers and names of what was done are kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vega_policy.deployment.interventions import Intervention, UnsafeStartError
from vega_policy.deployment.limits import JointLimits, Workspace, braking_speed

logger = logging.getLogger(__name__)

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
