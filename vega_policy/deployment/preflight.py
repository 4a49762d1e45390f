"""Before a robot moves: does it look, feel and count as the robot that the policy was trained on?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vega_policy.deployment.limits import JointLimits

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Check:
    """One line of the preflight.

    Attributes:
        name: What was looked at.
        status: `ok`, `warning` or `FAILED`.
        message: What was found, and what to do.
    """

    name: str
    status: str
    message: str


@dataclass(frozen=True)
class Trained:
    """What the policy was trained on, as far as its checkpoint says.

    Attributes:
        cameras: Camera key -> (height, width) of its frames; (0, 0) where unknown.
        state_names: Entries of the state in order; None where the dataset named none.
        action_names: Entries of the action in order; None where the dataset named none.
        state_size: Number of state entries, or None if it reads none.
        action_size: Number of action entries.
        state_range: Least and largest value [2 s] of the training data, or None.
        action_range: The same of the actions [2 a], or None.
        chunk_size: Actions of a chunk, or None where unknown.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_names: Sequence[str] | None
    action_names: Sequence[str] | None
    state_size: int | None
    action_size: int
    state_range: np.ndarray | None
    action_range: np.ndarray | None
    chunk_size: int | None


@dataclass(frozen=True)
class Present:
    """What the robot is and reports now.

    Attributes:
        cameras: Camera key -> (height, width).
        state: Entries of its state in order, with their present values.
        action_names: Entries of its action, in the order in which the policy's values are given to them.
    """

    cameras: Mapping[str, tuple[int, int]]
    state: Mapping[str, float]
    action_names: Sequence[str]


@dataclass(frozen=True)
class Pace:
    """How fast the policy must be, and is.

    Attributes:
        fps: Control steps a second.
        latencies: Measured seconds of some predictions.
        real_time_chunking: Whether chunks are predicted while others are executed.
        queue_threshold: So many actions left let real-time chunking ask for the next chunk.
    """

    fps: float
    latencies: Sequence[float]
    real_time_chunking: bool
    queue_threshold: int


def preflight(
    trained: Trained, present: Present, limits: Sequence[JointLimits], chunk: np.ndarray, pace: Pace
) -> list[Check]:
    """Compare robot and policy.

    Args:
        trained: What the policy knows.
        present: What the robot is.
        limits: What the safety layer allows.
        chunk: A chunk [t a] predicted from the robot's present observation, in its units.
        pace: Timing.
    """
    return [
        *_cameras(trained, present),
        _names("joints of the state", trained.state_names, list(present.state), trained.state_size),
        _names("joints of the action", trained.action_names, present.action_names, trained.action_size),
        _state_range(trained, present),
        _limits_cover(trained, limits, present.action_names),
        _chunk_within(limits, chunk, present.action_names),
        _latency(trained, pace),
    ]


def report(checks: Sequence[Check]) -> str:
    """Return the checks as lines, one each."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.status:8}{check.name:{width}}  {check.message}" for check in checks)


def _cameras(trained: Trained, present: Present) -> list[Check]:
    missing, extra = (
        sorted(set(trained.cameras) - set(present.cameras)),
        sorted(set(present.cameras) - set(trained.cameras)),
    )
    if missing:
        return [
            Check(
                "cameras",
                FAILED,
                f"the policy reads {missing}, the robot has {sorted(present.cameras)}; name them alike, or "
                "give rename_map",
            )
        ]
    checks = [Check("cameras", OK, f"{sorted(trained.cameras)}" + (f"; not read: {extra}" if extra else ""))]
    for camera, (height, width) in trained.cameras.items():
        here = present.cameras[camera]
        if not height:
            checks.append(Check(camera, WARNING, f"{here}; the server does not say what it was trained with"))
        elif abs(here[0] * width - here[1] * height) > 0.02 * here[1] * height:
            checks.append(
                Check(camera, FAILED, f"{here} (height, width) has another shape than {(height, width)}")
            )
        elif here != (height, width):
            checks.append(Check(camera, WARNING, f"{here} instead of {(height, width)}; frames are resized"))
        else:
            checks.append(Check(camera, OK, f"{here}"))
    return checks


def _names(name: str, trained: Sequence[str] | None, here: Sequence[str], size: int | None) -> Check:
    if size is not None and size != len(here):
        return Check(name, FAILED, f"the policy has {size}, the robot {len(here)}: {list(here)}")
    if trained is None:
        return Check(name, WARNING, f"the checkpoint names none, so the order is not checked: {list(here)}")
    if list(trained) == list(here):
        return Check(name, OK, f"{list(here)}")
    if set(trained) == set(here):
        return Check(name, FAILED, f"another order: trained on {list(trained)}, the robot has {list(here)}")
    return Check(name, FAILED, f"trained on {list(trained)}, the robot has {list(here)}")


def _state_range(trained: Trained, present: Present) -> Check:
    name = "state where it was in training"
    if trained.state_range is None or len(present.state) != trained.state_range.shape[1]:
        return Check(name, WARNING, "there are no statistics to compare with")
    low, high = trained.state_range
    values = np.array(list(present.state.values()))
    room = 0.25 * np.maximum(high - low, 1e-3)
    outside = [
        f"{key} is {value:.4g}, was in [{low[entry]:.4g}, {high[entry]:.4g}]"
        for entry, (key, value) in enumerate(zip(present.state, values, strict=True))
        if not low[entry] - room[entry] <= value <= high[entry] + room[entry]
    ]
    if not outside:
        return Check(name, OK, "every entry, with a quarter of its range more")
    scale = float(np.median(np.abs(values) / np.maximum(np.abs(trained.state_range).max(axis=0), 1e-6)))
    hint = ""
    for factor, words in ((180 / math.pi, "degrees for radians"), (math.pi / 180, "radians for degrees")):
        if 1 / 3 < scale / factor < 3 and not 1 / 5 < scale < 5:
            hint = f" All are about {factor:.3g} times what they were: {words}?"
    return Check(name, FAILED, "; ".join(outside) + "." + hint + " Check units, order and start pose.")


def _limits_cover(trained: Trained, limits: Sequence[JointLimits], names: Sequence[str]) -> Check:
    name = "limits against the training data"
    if {limit.name for limit in limits} != set(names):
        return Check(
            name, FAILED, f"limits are for {[limit.name for limit in limits]}, the robot takes {list(names)}"
        )
    if trained.action_range is None:
        return Check(name, WARNING, "there are no statistics to compare with")
    low, high = trained.action_range
    by_name = {limit.name: limit for limit in limits}
    wide, narrow = [], []
    for entry, joint in enumerate(names):
        limit, span = by_name[joint], max(float(high[entry] - low[entry]), 1e-6)
        if limit.high - limit.low > 3 * span:
            wide.append(joint)
        if limit.low > low[entry] + 0.1 * span or limit.high < high[entry] - 0.1 * span:
            narrow.append(joint)
    if narrow:
        return Check(
            name, WARNING, f"narrower than what was demonstrated: {narrow}; commands there will be cut"
        )
    if wide:
        return Check(name, WARNING, f"over three times as wide as what was demonstrated: {wide}")
    return Check(name, OK, "they hold what was demonstrated, and no more than three times that")


def _beyond(limit: JointLimits, values: np.ndarray) -> np.ndarray:
    """Which commands lie a tenth of the range or more outside: less is cut, more is another unit or order."""
    slack = 0.1 * (limit.high - limit.low)
    return (values < limit.low - slack) | (values > limit.high + slack)


def _chunk_within(limits: Sequence[JointLimits], chunk: np.ndarray, names: Sequence[str]) -> Check:
    name = "first actions within limits"
    if not np.isfinite(chunk).all():
        return Check(name, FAILED, "the policy predicts numbers that are not finite")
    by_name = {limit.name: limit for limit in limits}
    outside = [
        f"{joint} up to {np.abs(chunk[:, entry]).max():.4g}"
        for entry, joint in enumerate(names)
        if joint in by_name and _beyond(by_name[joint], chunk[:, entry]).mean() > 0.5
    ]
    if outside:
        return Check(name, FAILED, f"most of the first chunk is outside: {outside}; check units and order")
    return Check(name, OK, f"{len(chunk)} actions")


def _latency(trained: Trained, pace: Pace) -> Check:
    name = "latency against the control rate"
    slow = float(np.percentile(pace.latencies, 95))
    words = (
        f"a chunk takes {1000 * slow:.0f} ms (p95 of {len(pace.latencies)}), a step {1000 / pace.fps:.0f} ms"
    )
    if not pace.real_time_chunking:
        if slow > 1 / pace.fps:
            return Check(name, WARNING, words + "; the robot waits at each chunk: consider inference=rtc")
        return Check(name, OK, words)
    delay = math.ceil(slow * pace.fps)
    if trained.chunk_size is not None and pace.queue_threshold >= trained.chunk_size:
        return Check(
            name,
            FAILED,
            f"queue_threshold {pace.queue_threshold} must be below the chunk of {trained.chunk_size}",
        )
    if delay > pace.queue_threshold:
        return Check(
            name,
            FAILED,
            f"{words}: {delay} steps, but only {pace.queue_threshold} actions are left when it is asked",
        )
    if trained.chunk_size is not None and 2 * delay > trained.chunk_size:
        lasts = f"{delay} steps; a chunk of {trained.chunk_size} is spent before the next one is there"
        return Check(name, WARNING, f"{words}: {lasts}, and the robot waits")
    return Check(name, OK, f"{words}: {delay} steps of {pace.queue_threshold}")
