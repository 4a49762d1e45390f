"""What stops a robot when nobody else does: a watchdog on the policy, an emergency stop by key and signal."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from vega_policy.deployment.safety import SafetyFilter

logger = logging.getLogger(__name__)

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
