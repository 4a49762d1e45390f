"""What the safety layer tells others: its deeds, and why it does not begin."""

from __future__ import annotations

from dataclasses import dataclass


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
