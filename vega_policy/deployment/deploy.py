"""Assembles a deployment from a composed configuration: policy, safety layer, preflight and control loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import draccus
import lerobot.scripts.lerobot_rollout  # noqa: F401 registers LeRobot's own robots and teleoperators
import numpy as np
import rerun
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep
from lerobot.robots.config import RobotConfig
from lerobot.rollout import RolloutConfig, build_rollout_context
from lerobot.rollout.configs import BaseStrategyConfig
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.inference.factory import InferenceEngineConfig, RTCInferenceConfig
from lerobot.teleoperators.config import TeleoperatorConfig
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.robot_utils import precise_sleep
from torch import Tensor

from vega_policy.checkpoints import check_checkpoint, find_checkpoint
from vega_policy.deployment.control_loop import (
    SafeRollout,
    creates_scenes,
    delayed,
    predict_chunk,
    predict_from_observation,
    prepare_batch,
)
from vega_policy.deployment.preflight import FAILED, format_checks, measure_latency, run_preflight
from vega_policy.deployment.recording import EpisodeRecorder, RecordingFormat, merge_episodes
from vega_policy.deployment.remote_policy import VegaRemoteConfig, VegaRemotePolicy
from vega_policy.deployment.rtc import (
    AlignedEngine,
    CommandsUnderWay,
    RealTimeEngine,
    SyncEngine,
    check_displacements,
)
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
from vega_policy.evaluation.policies import choose_device
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import use_available_cores

logger = logging.getLogger(__name__)

DRY_RUN_FILE = "dry_run.rrd"


class PreflightError(ValueError):
    """A preflight check failed; nothing moved."""


@dataclass(frozen=True)
class Deployment:
    """Result of a deployment."""

    steps: int  # control steps
    late_steps: int  # deadlines of control steps that were missed
    interventions: dict[str, int]  # number of events of the safety layer, by kind
    stopped: str | None  # why the robot was stopped for good
    episodes: list[Path]  # folders of recorded episodes


def deploy(config: Mapping[str, Any]) -> Deployment:
    """Check a robot, then let a policy control it as the composed configs/deploy.yaml describes it.

    PreflightError if a check failed: nothing moved. ConnectionError if robot or policy server are
    unreachable.

    Raises:
        PreflightError: If a check failed; nothing moved.
        ValueError: If a setting is wrong.
        FileNotFoundError: If the checkpoint does not exist.
        ConnectionError: If the robot or the policy server is unreachable.
    """
    use_available_cores(spare=1)  # for cameras and the control loop
    rollout = read_rollout(config)
    safety = read_safety(config)
    creates_scenes(config["robot"])
    shutdown = threading.Event()
    context = _connect(rollout, shutdown, safety)
    try:
        if config["extra_latency_seconds"]:
            policy: Any = context.policy.policy
            policy.predict_action_chunk = delayed(
                policy.predict_action_chunk, config["extra_latency_seconds"]
            )
        catch_up = read_catch_up(config, context, safety)
        latency_steps = _require_preflight(config, context, safety)
        context.policy.inference = make_engine(context, safety, latency_steps, catch_up)
        if config["dry_run"]:
            steps = dry_run(context, safety, config["dry_run_seconds"], Path(config["output_dir"]))
            return Deployment(steps, 0, dict(safety.counts), safety.stopped, [])
        return _run(config, context, safety)
    finally:
        if context.hardware.robot_wrapper.is_connected:
            context.hardware.robot_wrapper.inner.disconnect()


def _connect(rollout: RolloutConfig, shutdown: threading.Event, safety: SafetyFilter) -> RolloutContext:
    """Return LeRobot's rollout with the robot connected."""
    inference = rollout.inference
    if vars(rollout.policy).get("use_relative_actions") and not isinstance(inference, RTCInferenceConfig):
        # LeRobot refuses relative actions for its engine `sync`, which `make_engine` replaces.
        rollout.inference = RTCInferenceConfig(rtc=RTCConfig(enabled=False))
    try:
        return build_rollout_context(rollout, shutdown, robot_action_processor=safe_action_pipeline(safety))
    except ImportError as error:
        kind = rollout.robot.type if rollout.robot is not None else "none"
        raise ImportError(
            f"robot {kind}: {str(error).splitlines()[0]} Install it: pip install "
            f"'lerobot_policy_vega[{'so101' if kind.startswith('so10') else 'robot'}]'"
        ) from error
    finally:
        rollout.inference = inference


def read_rollout(config: Mapping[str, Any]) -> RolloutConfig:
    """Return LeRobot's configuration of a rollout.

    Raises:
        ValueError: If neither or both of checkpoint and server are set.
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
        check_checkpoint(folder)
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
    workspace = None
    if box is not None:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in box.items()
        }
        workspace = Workspace(**values)
    return SafetyFilter(
        _read_or_measure_limits(settings, fps),
        period=1 / fps,
        workspace=workspace,
        max_observation_age=settings["max_observation_age"],
        refusals_to_stop=settings["refusals_to_stop"],
    )


def dry_run(context: RolloutContext, safety: SafetyFilter, seconds: float, folder: Path) -> int:
    """Write observations, predictions and the safety layer's commands to a file; return the number of steps.

    Nothing is sent to the robot; the safety layer assumes that its commands were. The file is `dry_run.rrd`
    in `folder`; open it with `rerun FOLDER/dry_run.rrd`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = rerun.RecordingStream("vega_policy_dry_run")
    stream.save(folder / DRY_RUN_FILE)
    keys, fps = context.data.ordered_action_keys, context.runtime.cfg.fps
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        start = time.perf_counter()
        observation = context.hardware.robot_wrapper.get_observation()
        safety.set_observation_time(time.monotonic())
        chunk = predict_from_observation(context, observation)
        action = dict(zip(keys, chunk[0].tolist(), strict=True))
        command = safety.command(action, observation)
        stream.set_time("step", sequence=steps)
        for key, value in observation.items():
            if isinstance(value, np.ndarray) and value.ndim == 3:
                stream.log(f"cameras/{key}", rerun.Image(value).compress())
            else:
                stream.log(f"state/{key}", rerun.Scalars(float(value)))
        for key in keys:
            stream.log(f"action/{key}", rerun.Scalars(action[key]))
            stream.log(f"command/{key}", rerun.Scalars(command[key]))
        stream.log("chunk", rerun.Tensor(chunk, dim_names=("step", "joint")))
        steps += 1
        precise_sleep(max(1 / fps - (time.perf_counter() - start), 0.0))
    stream.disconnect()
    logger.info("%d steps, nothing was sent; interventions: %s", steps, dict(safety.counts) or "none")
    logger.info("open it with: rerun %s", folder / DRY_RUN_FILE)
    return steps


def make_engine(
    context: RolloutContext, safety: SafetyFilter, latency_steps: int, catch_up: Sequence[int] = ()
) -> AlignedEngine:
    """Return the engine that replaces LeRobot's; see `vega_policy.deployment.rtc`.

    `catch_up` are the indices of the actions that are displacements, for which a late chunk makes up.
    """
    policy: Any = context.policy.policy
    inference, shutdown = context.runtime.cfg.inference, context.runtime.shutdown_event
    under_way = CommandsUnderWay(1 / context.runtime.cfg.fps, latency_steps)

    def predict(observation: Any, delay: int, since: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = observation if reads_history else prepare_batch(context, observation)
        if not continues:
            chunk, actions = predict_chunk(context, batch)
            return (chunk, actions) if relative is None else (actions, actions)
        if relative is None:
            return predict_chunk(context, batch, inference_delay=delay, prev_chunk_left_over=since)
        if since is not None:
            since = _relative_to_present(since, relative, steps)
        actions = predict_chunk(context, batch, inference_delay=delay, prev_chunk_left_over=since)[1]
        return actions, actions  # the plan is absolute: the next chunk has another state to be relative to

    def reset() -> None:
        for part in (policy, context.policy.preprocessor, context.policy.postprocessor):
            part.reset()

    steps: list[Any] = list(context.policy.preprocessor.steps)
    relative = _relative_step(steps)
    is_vega = isinstance(policy, VegaPolicy | VegaRemotePolicy)
    # With rtc, and with sync for our own policies, a chunk is predicted with the actions under way.
    continues = inference.rtc.enabled if isinstance(inference, RTCInferenceConfig) else is_vega
    reads_history = isinstance(policy, VegaPolicy) and policy.config.prior.clip == "history"
    if not isinstance(inference, RTCInferenceConfig):
        remote = isinstance(policy, VegaRemotePolicy)
        executed = (
            policy.remote.description.action_steps if remote else vars(policy.config).get("n_action_steps")
        )
        prepare = partial(prepare_batch, context) if reads_history else None
        options = {"action_steps": executed, "prepare": prepare}
        return SyncEngine(predict, reset, safety, under_way, catch_up, **options)
    if is_vega and continues:
        # without the adapter to LeRobot's queue
        policy.use_rtc(replace(policy.config.rtc_config, enabled=True))
    threshold = inference.queue_threshold
    options = {"threshold": threshold, "shutdown": shutdown}
    return RealTimeEngine(predict, reset, safety, under_way, catch_up, **options)


def _relative_step(steps: Sequence[Any]) -> Any:
    """Return the pre-processor's step that makes actions relative to the state, if there is one."""
    return next((s for s in steps if isinstance(s, RelativeActionsProcessorStep) and s.enabled), None)


def read_catch_up(
    config: Mapping[str, Any], context: RolloutContext, safety: SafetyFilter
) -> tuple[int, ...]:
    """Return the indices of the actions for which a late chunk makes up.

    Raises:
        ValueError: If one is not the index of an action, or the action is a position, which loses nothing.
    """
    check_displacements("catch_up", config["catch_up"], len(safety.limits))
    indices = tuple(config["catch_up"])
    names = [context.data.ordered_action_keys[index] for index in indices]
    if positions := [name for name in names if name.endswith(".pos")]:
        raise ValueError(
            f"catch_up={list(indices)}: expected indices of actions that are displacements, got positions: "
            f"{', '.join(positions)}. Leave them out: a late chunk of positions has lost nothing."
        )
    if indices and _relative_step(context.policy.preprocessor.steps) is not None:
        raise ValueError(
            f"catch_up={list(indices)}: expected [], since the policy's actions are positions relative to "
            "the state. Leave it out."
        )
    return indices


def _relative_to_present(
    actions: Tensor, relative: RelativeActionsProcessorStep, steps: Sequence[Any]
) -> Tensor:
    """Return actions [t a] of the robot in the units of a policy whose actions are relative.

    They are relative to the state of the observation that the `steps` of its pre-processor got last.
    """
    state = relative.get_cached_state()
    assert state is not None  # `prepare_batch` pre-processed an observation
    normalizer = next((step for step in steps if isinstance(step, NormalizerProcessorStep)), None)
    return reanchor_relative_rtc_prefix(actions, state, relative, normalizer, "cpu")


def _require_preflight(config: Mapping[str, Any], context: RolloutContext, safety: SafetyFilter) -> int:
    """Raise a PreflightError unless all checks pass; return the latency of observations in steps."""
    latency_steps, settings = config["robot"].get("latency_steps"), config["preflight"]
    checks = run_preflight(context, safety.limits, calls=settings["calls"], latency_steps=latency_steps or 0)
    may_move = not config["dry_run"] and all(check.status != FAILED for check in checks)
    if latency_steps is None and may_move:
        with EmergencyStop(safety.stop, key=config["emergency_key"]):
            latency_steps, check = measure_latency(context.hardware.robot_wrapper, safety, settings["motion"])
        if safety.stopped is not None:
            raise PreflightError(f"the preflight was stopped: {safety.stopped}")
        checks.append(check)
    logger.info("preflight\n%s", format_checks(checks))
    failed = [check for check in checks if check.status == FAILED]
    if failed and not settings["ignore_failures"]:
        raise PreflightError("the preflight failed, nothing moved:\n" + format_checks(failed))
    return latency_steps or 0


def _run(config: Mapping[str, Any], context: RolloutContext, safety: SafetyFilter) -> Deployment:
    settings, recording = config["robot"]["safety"], config["recording"]
    folder = Path(recording["folder"])

    def on_stop(reason: str) -> None:
        logger.error("stopped: %s", reason)
        context.runtime.shutdown_event.set()

    with ExitStack() as stack:
        recorder = None
        if recording["enabled"]:
            recorder = stack.enter_context(EpisodeRecorder(folder, _recording_format(config, context)))
        strategy = SafeRollout(
            safety,
            episodes=config["episodes"],
            episode_seconds=config["episode_seconds"],
            recorder=recorder,
            new_scenes=creates_scenes(config["robot"]),
        )
        has_teleop = context.hardware.teleop is not None
        others = {config["takeover_key"]: strategy.toggle_human} if has_teleop else {}
        stack.callback(strategy.teardown, context)  # after the watchdog, which also sends commands, has ended
        stack.enter_context(EmergencyStop(safety.stop, key=config["emergency_key"], others=others))
        stack.enter_context(
            Watchdog(
                safety,
                context.hardware.robot_wrapper.send_action,
                hold_after=settings["hold_after"],
                stop_after=settings["stop_after"],
                on_stop=on_stop,
            )
        )
        stack.callback(strategy.come_to_rest, context)  # while the watchdog still runs
        strategy.setup(context)
        try:
            strategy.run(context)
        except KeyboardInterrupt:
            safety.stop("interrupted from the keyboard")
    counts = strategy.steps, strategy.late_steps, dict(safety.counts)
    logger.info("%d steps, %d deadlines missed; interventions: %s", *counts)
    saved = [] if recorder is None else recorder.saved
    if saved and recording["merge_into"] is not None:
        merge_episodes(folder, Path(recording["merge_into"]), recording["repo_id"])
    return Deployment(*counts, safety.stopped, saved)


def _recording_format(config: Mapping[str, Any], context: RolloutContext) -> RecordingFormat:
    recording, fps = config["recording"], config["robot"]["fps"]
    codecs: Any = resolve(recording["codecs"])
    if recording["video"] not in codecs:
        raise ValueError(f"unknown recording.video {recording['video']!r}; known: {', '.join(codecs)}")
    return RecordingFormat(
        recording["repo_id"],
        round(fps),
        context.data.dataset_features,
        context.hardware.robot_wrapper.name,
        codecs[recording["video"]],
        longest_episode=int(2 * config["episode_seconds"] * fps),
    )


def _read_or_measure_limits(settings: Mapping[str, Any], fps: float) -> tuple[JointLimits, ...]:
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
            jump=limit.jump * dataset.fps / fps,  # a jump is a change a step, and steps differ
            rest=0.0 if limit.name.endswith(".vel") else None,
            start=measured["start"].get(limit.name),
        )
        for limit in limits
    )
