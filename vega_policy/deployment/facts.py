"""What the preflight compares, read from LeRobot's rollout: the checkpoint's side and the robot's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import NormalizerProcessorStep
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame

from vega_policy.deployment.limits import JointLimits
from vega_policy.deployment.preflight import Check, Pace, Present, Trained, preflight
from vega_policy.modeling_vega import VegaPolicy


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
