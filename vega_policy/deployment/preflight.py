"""Checks before a robot moves: cameras, joints, units, limits and latency against those of the policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.processor import NormalizerProcessorStep
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from vega_policy.deployment.control_loop import StepClock, predict_from_observation
from vega_policy.deployment.rtc import LAST_COMMAND
from vega_policy.deployment.safety import JointLimits, SafetyFilter

OK, WARNING, FAILED = "ok", "warning", "FAILED"

MOTION_STEPS = 20
"""Steps of the motion that measures the latency of observations, each way."""

NO_STATISTICS = "the checkpoint has no statistics to compare with"


@dataclass(frozen=True)
class Check:
    """Result of one check: its status is `ok`, `warning` or `FAILED`."""

    name: str
    status: str
    message: str


@dataclass(frozen=True)
class PolicySpec:
    """Robot that the policy was trained on, as far as its checkpoint contains it."""

    cameras: Mapping[str, tuple[int, int]]  # key -> (height, width); (0, 0) where unknown
    state_names: Sequence[str] | None  # entries of the state in order; None where the dataset named none
    action_names: Sequence[str] | None
    state_size: int | None  # None if it reads no state
    action_size: int
    state_range: np.ndarray | None  # smallest and largest value [2 s] of the training data
    action_range: np.ndarray | None  # the same of the actions [2 a]
    chunk_size: int | None  # None where unknown
    fps: float | None = None  # control steps a second of the training data; None where unknown


@dataclass(frozen=True)
class RobotSpec:
    """The connected robot."""

    cameras: Mapping[str, tuple[int, int]]  # key -> (height, width)
    state: Mapping[str, float]  # entries in order, with their present values
    action_names: Sequence[str]  # in the order in which the policy's values are assigned to them


@dataclass(frozen=True)
class Timing:
    """Required and measured speed of the policy."""

    fps: float  # control steps a second
    latencies: Sequence[float]  # measured seconds of some predictions
    real_time_chunking: bool  # whether chunks are predicted while others are executed
    queue_threshold: int  # actions left at which real-time chunking predicts the next chunk
    observing: Sequence[float] = (0.0,)  # measured seconds of some observations
    latency_steps: int = 0  # commands under way when the robot is observed


def run_preflight(
    context: RolloutContext, limits: Sequence[JointLimits], *, calls: int, latency_steps: int = 0
) -> list[Check]:
    """Observe the robot, time observations and predictions, and check all; nothing is sent to the robot.

    `context` is LeRobot's rollout with the robot connected. `calls` observations and predictions are timed,
    after one that is not; `latency_steps` commands are under way when the robot is observed.
    """
    observe = context.hardware.robot_wrapper.get_observation
    observation, observing = observe(), [_seconds(observe) for _ in range(calls)]
    policy, robot = _policy_spec(context), _robot_spec(context, observation)
    if set(policy.cameras) - set(robot.cameras) or policy.state_size not in (None, len(robot.state)):
        chunk, latencies = np.zeros((1, policy.action_size)), [0.0]  # it cannot predict from this observation
    else:
        chunk = predict_from_observation(context, observation)
        latencies = [_seconds(lambda: predict_from_observation(context, observation)) for _ in range(calls)]
    inference = context.runtime.cfg.inference
    chunking = isinstance(inference, RTCInferenceConfig)
    threshold = inference.queue_threshold if chunking else 0
    timing = Timing(context.runtime.cfg.fps, latencies, chunking, threshold, observing, latency_steps)
    return check_robot(policy, robot, limits, chunk, timing)


def check_robot(
    policy: PolicySpec, robot: RobotSpec, limits: Sequence[JointLimits], chunk: np.ndarray, timing: Timing
) -> list[Check]:
    """Check robot, limits and timing against the policy.

    `chunk` [t a] is predicted from the robot's present observation, in its units.
    """
    return [
        *_check_cameras(policy, robot),
        _check_names("joints of the state", policy.state_names, list(robot.state), policy.state_size),
        _check_names("joints of the action", policy.action_names, robot.action_names, policy.action_size),
        _check_state_range(policy, robot),
        _check_limits(policy, limits, robot.action_names),
        _check_chunk(limits, chunk, robot.action_names),
        _check_rate(policy, timing),
        _check_latency(policy, timing),
    ]


def format_checks(checks: Sequence[Check]) -> str:
    """Return the checks as lines, one each."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.status:8}{check.name:{width}}  {check.message}" for check in checks)


def _check_cameras(policy: PolicySpec, robot: RobotSpec) -> list[Check]:
    missing, unused = (
        sorted(set(policy.cameras) - set(robot.cameras)),
        sorted(set(robot.cameras) - set(policy.cameras)),
    )
    if missing:
        message = (
            f"the policy reads {missing}, the robot has {sorted(robot.cameras)}; name them alike, or set "
            "rename_map"
        )
        return [Check("cameras", FAILED, message)]
    message = f"{sorted(policy.cameras)}" + (f"; not read: {unused}" if unused else "")
    checks = [Check("cameras", OK, message)]
    for camera, (height, width) in policy.cameras.items():
        size = robot.cameras[camera]
        if not height:
            result = WARNING, f"{size}; the server does not report the size of its training data"
        elif abs(size[0] * width - size[1] * height) > 0.02 * size[1] * height:
            result = FAILED, f"{size} (height, width) has another shape than {(height, width)}"
        elif size != (height, width):
            result = WARNING, f"{size} instead of {(height, width)}; frames are resized"
        else:
            result = OK, f"{size}"
        checks.append(Check(camera, *result))
    return checks


def _check_names(name: str, trained: Sequence[str] | None, actual: Sequence[str], size: int | None) -> Check:
    actual = list(actual)
    if size is not None and size != len(actual):
        return Check(name, FAILED, f"the policy has {size}, the robot {len(actual)}: {actual}")
    if trained is None:
        return Check(name, WARNING, f"the checkpoint names none, so the order is not checked: {actual}")
    if list(trained) == actual:
        return Check(name, OK, f"{actual}")
    reason = "another order: " if set(trained) == set(actual) else ""
    return Check(name, FAILED, f"{reason}trained on {list(trained)}, the robot has {actual}")


def _check_state_range(policy: PolicySpec, robot: RobotSpec) -> Check:
    name = "state within the training range"
    if policy.state_range is None or len(robot.state) != policy.state_range.shape[1]:
        return Check(name, WARNING, NO_STATISTICS)
    low, high = policy.state_range
    values = np.array(list(robot.state.values()))
    margin = 0.25 * np.maximum(high - low, 1e-3)
    outside = [
        f"{key} is {value:.4g}, was in [{low[entry]:.4g}, {high[entry]:.4g}]"
        for entry, (key, value) in enumerate(zip(robot.state, values, strict=True))
        if not low[entry] - margin[entry] <= value <= high[entry] + margin[entry]
    ]
    if not outside:
        return Check(name, OK, "every entry, with a margin of a quarter of its range")
    scale = float(np.median(np.abs(values) / np.maximum(np.abs(policy.state_range).max(axis=0), 1e-6)))
    hint = ""
    for factor, mistake in ((180 / math.pi, "degrees for radians"), (math.pi / 180, "radians for degrees")):
        if 1 / 3 < scale / factor < 3 and not 1 / 5 < scale < 5:
            hint = f" All are about {factor:.3g} times their training values: {mistake}?"
    return Check(name, FAILED, "; ".join(outside) + "." + hint + " Check units, order and start pose.")


def _check_limits(policy: PolicySpec, limits: Sequence[JointLimits], names: Sequence[str]) -> Check:
    name = "limits against the training data"
    by_name = {limit.name: limit for limit in limits}
    if set(by_name) != set(names):
        return Check(name, FAILED, f"limits are for {list(by_name)}, the robot takes {list(names)}")
    if policy.action_range is None:
        return Check(name, WARNING, NO_STATISTICS)
    low, high = policy.action_range
    wide, narrow = [], []
    for entry, joint in enumerate(names):
        limit, span = by_name[joint], max(float(high[entry] - low[entry]), 1e-6)
        if limit.high - limit.low > 3 * span:
            wide.append(joint)
        if limit.low > low[entry] + 0.1 * span or limit.high < high[entry] - 0.1 * span:
            narrow.append(joint)
    if narrow:
        return Check(name, WARNING, f"narrower than the demonstrations: {narrow}; commands will be cut")
    if wide:
        return Check(name, WARNING, f"more than three times as wide as the demonstrations: {wide}")
    return Check(name, OK, "they contain the demonstrations, and at most three times their range")


def _check_chunk(limits: Sequence[JointLimits], chunk: np.ndarray, names: Sequence[str]) -> Check:
    name = "first actions within limits"
    if not np.isfinite(chunk).all():
        return Check(name, FAILED, "the policy predicts numbers that are not finite")
    by_name = {limit.name: limit for limit in limits}
    outside = []
    for entry, joint in enumerate(names):
        if joint in by_name:
            limit, values = by_name[joint], chunk[:, entry]
            slack = 0.1 * (limit.high - limit.low)  # less is cut, more is another unit or order
            if ((values < limit.low - slack) | (values > limit.high + slack)).mean() > 0.5:
                outside.append(f"{joint} up to {np.abs(values).max():.4g}")
    if outside:
        return Check(name, FAILED, f"most of the first chunk is outside: {outside}; check units and order")
    return Check(name, OK, f"{len(chunk)} actions")


def _check_rate(policy: PolicySpec, timing: Timing) -> Check:
    name = "control rate against the training data"
    if policy.fps is None:
        return Check(name, WARNING, "the checkpoint does not name the rate of its training data")
    if abs(policy.fps - timing.fps) > 0.02 * policy.fps:
        message = f"trained at {policy.fps:g} steps a second, the robot runs at {timing.fps:g}"
        return Check(name, WARNING, f"{message}; set fps={policy.fps:g}")
    return Check(name, OK, f"{timing.fps:g} a second")


def _check_latency(policy: PolicySpec, timing: Timing) -> Check:
    name = "latency against the control rate"
    step, size = 1 / timing.fps, policy.chunk_size
    observing, slow = (float(np.percentile(part, 95)) for part in (timing.observing, timing.latencies))
    if observing > step:
        message = (
            f"an observation takes {1000 * observing:.0f} ms, a step {1000 * step:.0f} ms; lower robot.fps"
        )
        return Check(name, FAILED, message)
    measured = (
        f"a chunk takes {1000 * slow:.0f} ms (p95 of {len(timing.latencies)}), a step {1000 * step:.0f} ms"
    )
    if not timing.real_time_chunking:
        if size is not None and slow > size * step:
            message = f"{measured}: the robot would wait longer than a chunk of {size} lasts; lower robot.fps"
            return Check(name, FAILED, message)
        if slow > step:
            return Check(name, WARNING, measured + "; the robot waits at each chunk: try inference=async")
        return Check(name, OK, measured)
    delay, threshold = math.ceil(slow * timing.fps), timing.queue_threshold
    if size is not None and threshold >= size:
        return Check(name, FAILED, f"queue_threshold {threshold} must be below the chunk of {size}")
    if delay > threshold:
        message = f"{measured}: {delay} steps, but the next chunk is predicted at {threshold} actions left"
        return Check(name, FAILED, message)
    if size is not None and 2 * delay + timing.latency_steps > size:
        message = f"{delay} steps; a chunk of {size} ends before the next one arrives; lower robot.fps"
        return Check(name, FAILED, f"{measured}: {message}")
    return Check(name, OK, f"{measured}: {delay} steps of {threshold}")


def measure_latency(robot: Any, safety: SafetyFilter, motion: float) -> tuple[int, Check]:
    """Move the first joint a little, three times; return the number of steps by which observations are late.

    0 stands for an observation after a command that shows it. The check fails if no motion shows within
    `MOTION_STEPS`. `motion` is the part of the joint's range that is moved, in (0, 0.1]; `safety` limits it
    and is reset afterwards.
    """
    name = "latency of observations"
    if not 0 < motion <= 0.1:
        raise ValueError(f"preflight.motion: expected a part of the joint's range in (0, 0.1], got {motion}")
    if LAST_COMMAND in robot.get_observation():
        return 0, Check(name, OK, "the robot reports which command each observation reflects")
    probe, found = _MotionProbe(robot, safety, motion), []
    for _ in range(3):
        shown = probe.run()
        if shown is None:
            message = f"no motion of {safety.names[0]} within {MOTION_STEPS} steps; set robot.latency_steps"
            return 0, Check(name, FAILED, message)
        found.append(shown - 1)
    safety.reset()
    steps = sorted(found)[1]
    return steps, Check(name, OK, f"{steps} steps (median of {found}); set robot.latency_steps to skip this")


class _MotionProbe:
    """A small motion of one joint and back, at the control rate."""

    def __init__(self, robot: Any, safety: SafetyFilter, motion: float) -> None:
        self._robot, self._safety, self._clock = robot, safety, StepClock(safety.period)
        observation, self._home = robot.get_observation(), {}
        for limit in safety.limits:
            known = limit.start if limit.start is not None else limit.rest
            self._home[limit.name] = float(observation[limit.name]) if known is None else known
        first = safety.limits[0]
        step = motion * (first.high - first.low)
        room = first.high - self._home[first.name] > step
        self._away = self._home | {first.name: self._home[first.name] + (step if room else -step)}
        self._is_velocity = first.name.endswith(".vel")

    def run(self) -> int | None:
        """Return the number of steps until the motion shows, None if it does not; return to the start."""
        still = np.array([self._step(self._home) for _ in range(MOTION_STEPS)])
        noise = 4 * np.ptp(still[MOTION_STEPS // 2 :], axis=0) + 1e-6
        shown = None
        for step in range(MOTION_STEPS):
            moves = step == 0 or not self._is_velocity
            state = self._step(self._away if moves else self._home)
            if shown is None and step > 0 and (np.abs(state - still[-1]) > noise).any():
                shown = step
        return shown

    def _step(self, action: Mapping[str, float]) -> np.ndarray:
        """Observe, send a command within limits, wait for the next step; return the state observed."""
        self._safety.set_observation_time(time.monotonic())
        observation = self._robot.get_observation()
        self._robot.send_action(self._safety.command(action, observation))
        self._clock.wait()
        return np.array([value for value in observation.values() if np.isscalar(value)], np.float64)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _policy_spec(context: RolloutContext) -> PolicySpec:
    config = context.policy.policy.config
    fields = vars(config)
    state, action = config.robot_state_feature, config.action_feature
    assert action is not None
    steps: list[Any] = list(context.policy.preprocessor.steps)  # the registry hides the classes' types
    normalizers = [step for step in steps if isinstance(step, NormalizerProcessorStep) and step.stats]
    statistics = normalizers[0].stats if normalizers else {}  # none for a policy on a server
    return PolicySpec(
        cameras={key: (feature.shape[1], feature.shape[2]) for key, feature in config.image_features.items()},
        state_names=fields.get("state_feature_names"),
        action_names=fields.get("action_feature_names"),
        state_size=None if state is None else state.shape[0],
        action_size=action.shape[0],
        state_range=_range(statistics, OBS_STATE),
        action_range=None if fields.get("use_relative_actions") else _range(statistics, ACTION),
        chunk_size=fields.get("chunk_size"),
        fps=fields.get("dataset_fps"),
    )


def _robot_spec(context: RolloutContext, observation: dict[str, Any]) -> RobotSpec:
    features, rename = context.data.dataset_features, context.runtime.cfg.rename_map
    cameras = {}
    for key in features:
        if key.startswith(f"{OBS_IMAGES}."):
            frame = observation[key.removeprefix(f"{OBS_IMAGES}.")]
            cameras[rename.get(key, key)] = tuple(np.shape(frame)[:2])
    names = features[OBS_STATE]["names"] if OBS_STATE in features else []
    state = {name: float(observation[name]) for name in names}
    # The robot's own order: LeRobot permutes names silently for `rtc` but not for `sync`.
    return RobotSpec(cameras, state, features[ACTION]["names"])


def _range(statistics: dict[str, Any], key: str) -> np.ndarray | None:
    if key not in statistics or not {"min", "max"} <= set(statistics[key]):
        return None
    return np.stack([np.asarray(statistics[key][bound], np.float64).reshape(-1) for bound in ("min", "max")])
