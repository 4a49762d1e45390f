"""Before a robot moves: does it look, feel and count as the robot that the policy was trained on?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import NormalizerProcessorStep
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame

from vega_policy.deployment.safety import JointLimits
from vega_policy.modeling_vega import VegaPolicy

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


def look_before_moving(context: RolloutContext, limits: Sequence[JointLimits], *, calls: int) -> list[Check]:
    """Observe the robot once, ask the policy some times, and compare; nothing is sent to the robot.

    Args:
        context: LeRobot's rollout, with the robot connected.
        limits: What the safety layer allows.
        calls: How many predictions are timed, after one that is not.
    """
    observation = context.hardware.robot_wrapper.get_observation()
    trained, present = _trained(context), _present(context, observation)
    if set(trained.cameras) - set(present.cameras) or trained.state_size not in (None, len(present.state)):
        chunk, latencies = np.zeros((1, trained.action_size)), [0.0]  # it cannot even be asked
    else:
        chunk, latencies = _ask(context, observation, calls)
    inference = context.runtime.cfg.inference
    chunking = isinstance(inference, RTCInferenceConfig)
    pace = Pace(context.runtime.cfg.fps, latencies, chunking, inference.queue_threshold if chunking else 0)
    return preflight(trained, present, limits, chunk, pace)


def predict_once(context: RolloutContext, observation: dict[str, Any]) -> np.ndarray:
    """Return a chunk [t a] in the robot's units, predicted from a robot's observation.

    A policy that reads histories remembers the observation, until it is reset.

    Args:
        context: LeRobot's rollout.
        observation: As the robot reports it.
    """
    return predict(context, context.processors.robot_observation_processor(observation))[1].numpy()


def predict(
    context: RolloutContext, processed: dict[str, Any], **continuation: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk [t a] as and where the policy has it, and in the robot's units, on the CPU.

    Args:
        context: LeRobot's rollout.
        processed: A robot's observation, after LeRobot's observation processor.
        **continuation: Of real-time chunking: `inference_delay`, `prev_chunk_left_over`.
    """
    cfg, policy = context.runtime.cfg, context.policy
    frame = build_dataset_frame(context.data.dataset_features, processed, prefix=OBS_STR)
    robot_type = context.hardware.robot_wrapper.robot_type
    batch = prepare_observation_for_inference(frame, torch.device(cfg.device or "cpu"), cfg.task, robot_type)
    batch["task"] = [cfg.task]
    with torch.no_grad():
        batch = policy.preprocessor(batch)
        if isinstance(policy.policy, VegaPolicy):
            batch = policy.policy.remember(batch)
        chunk = policy.policy.predict_action_chunk(batch, **continuation)
        actions = policy.postprocessor(chunk)
    return chunk[0], actions[0].float().cpu()


def _ask(context: RolloutContext, observation: dict[str, Any], calls: int) -> tuple[np.ndarray, list[float]]:
    chunk = predict_once(context, observation)
    latencies = []
    for _ in range(calls):
        start = time.perf_counter()
        predict_once(context, observation)
        latencies.append(time.perf_counter() - start)
    return chunk, latencies


def _trained(context: RolloutContext) -> Trained:
    config = context.policy.policy.config
    fields = vars(config)
    state, action = config.robot_state_feature, config.action_feature
    assert action is not None
    stats = _statistics(context)
    sizes = {key: (feature.shape[1], feature.shape[2]) for key, feature in config.image_features.items()}
    return Trained(
        cameras=sizes,
        state_names=fields.get("state_feature_names"),
        action_names=fields.get("action_feature_names"),
        state_size=None if state is None else state.shape[0],
        action_size=action.shape[0],
        state_range=_range(stats, OBS_STATE),
        action_range=_range(stats, ACTION),
        chunk_size=fields.get("chunk_size"),
    )


def _present(context: RolloutContext, observation: dict[str, Any]) -> Present:
    features, rename = context.data.dataset_features, context.runtime.cfg.rename_map
    cameras = {}
    for key in features:
        if key.startswith(f"{OBS_IMAGES}."):
            pixels = observation[key.removeprefix(f"{OBS_IMAGES}.")]
            cameras[rename.get(key, key)] = tuple(np.shape(pixels)[:2])
    names = features[OBS_STATE]["names"] if OBS_STATE in features else []
    state = {name: float(observation[name]) for name in names}
    # The robot's own order: LeRobot would quietly permute names for `rtc` but not for `sync`.
    return Present(cameras, state, features[ACTION]["names"])


def _statistics(context: RolloutContext) -> dict[str, Any]:
    """The training data's statistics, from the checkpoint's own normaliser; none for a policy on a server."""
    steps: list[Any] = list(context.policy.preprocessor.steps)  # the registry hides the classes' types
    found = [step.stats for step in steps if isinstance(step, NormalizerProcessorStep) and step.stats]
    return found[0] if found else {}


def _range(stats: dict[str, Any], key: str) -> np.ndarray | None:
    if key not in stats or not {"min", "max"} <= set(stats[key]):
        return None
    return np.stack([np.asarray(stats[key][bound], np.float64).reshape(-1) for bound in ("min", "max")])
