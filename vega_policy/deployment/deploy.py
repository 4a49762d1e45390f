"""From a composed configuration to a moving robot: what scripts/deploy_policy.py calls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import lerobot.scripts.lerobot_rollout  # noqa: F401 registers the robots and teleoperators that LeRobot brings
import numpy as np
import rerun
from lerobot.configs.policies import PreTrainedConfig
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.robots.config import RobotConfig
from lerobot.rollout import RolloutConfig, build_rollout_context
from lerobot.rollout.configs import BaseStrategyConfig
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.inference.factory import InferenceEngineConfig, RTCInferenceConfig
from lerobot.teleoperators.config import TeleoperatorConfig
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.robot_utils import precise_sleep
from torch import Tensor

from vega_policy.deployment.control_loop import SafeRollout, delayed, lays_out_scenes
from vega_policy.deployment.preflight import FAILED, look_before_moving, predict, predict_once, report
from vega_policy.deployment.recording import EpisodeRecorder, RecordingFormat, merge_episodes
from vega_policy.deployment.remote_policy import VegaRemoteConfig, VegaRemotePolicy
from vega_policy.deployment.rtc import RealTimeEngine
from vega_policy.deployment.safety import (
    EmergencyStop,
    JointLimits,
    SafetyFilter,
    Watchdog,
    Workspace,
    limits_from_episodes,
    read_limits,
    safe_action_pipeline,
)
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.evaluate import choose_device
from vega_policy.evaluation.policies import find_checkpoint
from vega_policy.modeling_vega import VegaPolicy

logger = logging.getLogger(__name__)


FILE = "dry_run.rrd"


def dry_run(context: RolloutContext, safety: SafetyFilter, seconds: float, folder: Path) -> int:
    """Predict from what the robot sees and write both, and what the safety layer would say, to a file.

    Args:
        context: LeRobot's rollout; nothing is sent to its robot.
        safety: The safety layer; it believes that its commands were sent.
        seconds: How long.
        folder: Where `dry_run.rrd` is written; look at it with `rerun FOLDER/dry_run.rrd`.

    Returns:
        The number of control steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = rerun.RecordingStream("vega_policy_dry_run")
    stream.save(folder / FILE)
    keys, robot, fps = (
        context.data.ordered_action_keys,
        context.hardware.robot_wrapper,
        context.runtime.cfg.fps,
    )
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        start = time.perf_counter()
        observation = robot.get_observation()
        safety.observed(time.monotonic())
        chunk = predict_once(context, observation)
        wanted = dict(zip(keys, chunk[0].tolist(), strict=True))
        told = safety.command(wanted, observation)
        stream.set_time("step", sequence=steps)
        _show(stream, observation, chunk, keys, told)
        steps += 1
        precise_sleep(max(1 / fps - (time.perf_counter() - start), 0.0))
    stream.disconnect()
    logger.info("%d steps, nothing was sent; interventions: %s", steps, dict(safety.counts) or "none")
    logger.info("look at it with: rerun %s", folder / FILE)
    return steps


def _show(
    stream: rerun.RecordingStream,
    observation: dict[str, Any],
    chunk: np.ndarray,
    keys: list[str],
    told: dict[str, float],
) -> None:
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and value.ndim == 3:
            stream.log(f"cameras/{key}", rerun.Image(value).compress())
        else:
            stream.log(f"state/{key}", rerun.Scalars(float(value)))
    for entry, key in enumerate(keys):
        stream.log(f"wanted/{key}", rerun.Scalars(float(chunk[0, entry])))
        stream.log(f"would_be_told/{key}", rerun.Scalars(told[key]))
    stream.log("chunk", rerun.Tensor(chunk, dim_names=("step", "joint")))


class PreflightError(ValueError):
    """The robot is not the one that the policy was trained on, as far as can be seen; nothing moved."""


@dataclass(frozen=True)
class Deployment:
    """How a deployment ended.

    Attributes:
        steps: Control steps.
        interventions: Count of each kind of intervention of the safety layer.
        stopped: Why the robot was stopped for good, or None.
        episodes: Folders of recorded episodes.
    """

    steps: int
    interventions: dict[str, int]
    stopped: str | None
    episodes: list[Path]


def deploy(config: Mapping[str, Any]) -> Deployment:
    """Check a robot, then let a policy drive it as configs/deploy.yaml describes it.

    Args:
        config: The composed configuration as plain values; configs/deploy.yaml explains each field.

    Raises:
        PreflightError: If a check failed; nothing moved.
        ValueError: If a setting is wrong.
        FileNotFoundError: If the checkpoint does not exist.
        ConnectionError: If the robot or the policy server cannot be reached.
    """
    rollout = read_rollout(config)
    safety = read_safety(config)
    lays_out_scenes(config["robot"])
    shutdown = threading.Event()
    context = build_rollout_context(rollout, shutdown, robot_action_processor=safe_action_pipeline(safety))
    try:
        if config["extra_latency_seconds"]:
            policy: Any = context.policy.policy
            policy.predict_action_chunk = delayed(
                policy.predict_action_chunk, config["extra_latency_seconds"]
            )
        if isinstance(rollout.inference, RTCInferenceConfig):
            context.policy.inference = _real_time(context, safety, rollout.inference.queue_threshold)
        _check(config, context, safety)
        if config["dry_run"]:
            steps = dry_run(context, safety, config["dry_run_seconds"], Path(config["output_dir"]))
            return Deployment(steps, dict(safety.counts), safety.stopped, [])
        return _drive(config, context, safety)
    finally:
        if context.hardware.robot_wrapper.is_connected:
            context.hardware.robot_wrapper.inner.disconnect()


def _real_time(context: RolloutContext, safety: SafetyFilter, threshold: int) -> RealTimeEngine:
    steps: list[Any] = list(context.policy.preprocessor.steps)
    if any(isinstance(step, RelativeActionsProcessorStep) and step.enabled for step in steps):
        raise ValueError(
            "real-time chunking joins chunks of actions that mean the same whenever they are executed; this "
            "policy's are relative to the state that each chunk began with. Use lerobot-rollout for it"
        )

    policy: Any = context.policy.policy
    if isinstance(policy, VegaPolicy | VegaRemotePolicy):
        policy.use_rtc(policy.config.rtc_config)  # chunks are joined by what was executed, not by the clock

    def ask(observation: dict[str, Any], delay: int, left: Tensor | None) -> tuple[Tensor, Tensor]:
        return predict(context, observation, inference_delay=delay, prev_chunk_left_over=left)

    def reset() -> None:
        for part in (policy, context.policy.preprocessor, context.policy.postprocessor):
            part.reset()

    shutdown = context.runtime.shutdown_event
    return RealTimeEngine(ask, reset, safety, threshold=threshold, shutdown=shutdown)


def read_rollout(config: Mapping[str, Any]) -> RolloutConfig:
    """Return LeRobot's configuration of a rollout.

    Raises:
        ValueError: If neither or both of checkpoint and server are given.
        FileNotFoundError: If the checkpoint does not exist.
    """
    checkpoint, server = config["checkpoint"], config["server"]
    if (checkpoint is None) == (server["url"] is None):
        raise ValueError(
            f"expected either a checkpoint or server.url, got checkpoint={checkpoint} and "
            f"server.url={server['url']}"
        )
    register_third_party_plugins()  # robots of other distributions, and `vega_sim` of this one
    device = choose_device(config["device"])
    if checkpoint is None:
        policy: PreTrainedConfig = draccus.decode(
            PreTrainedConfig,
            {"type": VegaRemoteConfig.get_choice_name(VegaRemoteConfig), **server, "device": "cpu"},
        )
    else:
        folder = find_checkpoint(Path(checkpoint))
        policy = PreTrainedConfig.from_pretrained(folder)
        policy.pretrained_path, policy.device = folder, device
    robot, teleop = dict(config["robot"]["device"]), config["teleop"]
    return RolloutConfig(
        robot=draccus.decode(RobotConfig, robot),
        teleop=None if teleop is None else draccus.decode(TeleoperatorConfig, dict(teleop)),
        policy=policy,
        strategy=BaseStrategyConfig(),
        inference=draccus.decode(InferenceEngineConfig, dict(config["inference"])),
        fps=config["robot"]["fps"],
        task=config["task"],
        device=policy.device,
        rename_map=dict(config["rename_map"] or {}),
        return_to_initial_position=False,
        play_sounds=False,
    )


def read_safety(config: Mapping[str, Any]) -> SafetyFilter:
    """Return the safety layer that the robot's config describes.

    Raises:
        ValueError: If there are neither limits nor a dataset to measure them on, or limits are impossible.
    """
    settings, fps = config["robot"]["safety"], config["robot"]["fps"]
    box = settings["workspace"]
    return SafetyFilter(
        _limits(settings, fps),
        period=1 / fps,
        workspace=None if box is None else _workspace(box),
        max_observation_age=settings["max_observation_age"],
        refusals_to_stop=settings["refusals_to_stop"],
    )


def _workspace(box: Mapping[str, Any]) -> Workspace:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in box.items()
    }
    return Workspace(**fields)


def _limits(settings: Mapping[str, Any], fps: float) -> tuple[JointLimits, ...]:
    joints, measured = settings["joints"], settings["dataset"]
    if (joints is None) == (measured["root"] is None):
        raise ValueError(
            "the safety layer needs limits: give either robot.safety.joints, or robot.safety.dataset.root to "
            "measure them on"
        )
    if joints is not None:
        return read_limits(joints)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(measured["repo_id"], root=measured["root"], video_backend="pyav")
    table = dataset.hf_dataset.select_columns(["action", "episode_index"]).with_format("numpy")
    actions, episodes = np.stack(table["action"]), np.asarray(table["episode_index"]).ravel()
    names = dataset.features["action"]["names"]
    if names is None:
        raise ValueError(f"{measured['root']} names no joints; give robot.safety.joints instead")
    limits = limits_from_episodes(
        names,
        [actions[episodes == episode] for episode in np.unique(episodes)],
        fps=dataset.fps,
        margin=measured["margin"],
    )
    return tuple(
        replace(
            limit,
            jump=limit.jump * dataset.fps / fps,  # from one step to the next, and these are the robot's steps
            rest=0.0 if limit.name.endswith(".vel") else None,
            start=measured["start"].get(limit.name),
        )
        for limit in limits
    )


def _check(config: Mapping[str, Any], context: RolloutContext, safety: SafetyFilter) -> None:
    checks = look_before_moving(context, safety.limits, calls=config["preflight"]["calls"])
    logger.info("preflight\n%s", report(checks))
    failed = [check for check in checks if check.status == FAILED]
    if failed and not config["preflight"]["ignore_failures"]:
        raise PreflightError("the preflight failed, nothing moved:\n" + report(failed))


def _drive(config: Mapping[str, Any], context: RolloutContext, safety: SafetyFilter) -> Deployment:
    settings, recording = config["robot"]["safety"], config["recording"]
    shutdown = context.runtime.shutdown_event

    def stopped(reason: str) -> None:
        logger.error("stopped: %s", reason)
        shutdown.set()

    with ExitStack() as stack:
        recorder = None
        if recording["enabled"]:
            recorder = stack.enter_context(EpisodeRecorder(Path(recording["folder"]), _form(config, context)))
        strategy = SafeRollout(
            safety,
            episodes=config["episodes"],
            episode_seconds=config["episode_seconds"],
            recorder=recorder,
            new_scenes=lays_out_scenes(config["robot"]),
        )
        others = {}
        if context.hardware.teleop is not None:
            others[config["takeover_key"]] = strategy.toggle_human
        stack.callback(strategy.teardown, context)  # once the watchdog, which commands too, has ended
        stack.enter_context(EmergencyStop(safety.stop, key=config["emergency_key"], others=others))
        send = context.hardware.robot_wrapper.send_action
        stack.enter_context(
            Watchdog(
                safety,
                send,
                hold_after=settings["hold_after"],
                stop_after=settings["stop_after"],
                on_stop=stopped,
            )
        )
        stack.callback(strategy.come_to_rest, context)  # while the watchdog still looks after the robot
        strategy.setup(context)
        try:
            strategy.run(context)
        except KeyboardInterrupt:
            safety.stop("interrupted from the keyboard")
    logger.info("%d steps; interventions: %s", strategy.steps, dict(safety.counts) or "none")
    saved = [] if recorder is None else recorder.saved
    if saved and recording["merge_into"] is not None:
        merge_episodes(Path(recording["folder"]), Path(recording["merge_into"]), recording["repo_id"])
    return Deployment(strategy.steps, dict(safety.counts), safety.stopped, saved)


def _codec(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    codecs: Any = resolve(settings["codecs"])
    if settings["video"] not in codecs:
        raise ValueError(f"unknown recording.video {settings['video']!r}; known: {', '.join(codecs)}")
    return codecs[settings["video"]]


def _form(config: Mapping[str, Any], context: RolloutContext) -> RecordingFormat:
    return RecordingFormat(
        config["recording"]["repo_id"],
        round(config["robot"]["fps"]),
        context.data.dataset_features,
        context.hardware.robot_wrapper.name,
        _codec(config["recording"]),
        longest_episode=int(2 * config["episode_seconds"] * config["robot"]["fps"]),
    )
