"""Control loop of a deployment: LeRobot's rollout with takeover by a person and recording."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.rollout.configs import BaseStrategyConfig
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.strategies.core import RolloutStrategy, send_next_action
from lerobot.utils.constants import ACTION, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame
from lerobot.utils.robot_utils import precise_sleep

from vega_policy.deployment.recording import INTERVENTION, POLICY_ACTION, EpisodeRecorder
from vega_policy.deployment.rtc import AlignedEngine
from vega_policy.deployment.safety import SafetyFilter
from vega_policy.modeling_vega import VegaPolicy

logger = logging.getLogger(__name__)

CHANGES = ("range", "speed", "workspace", "keys", "finite", "jump", "stale")
"""Safety events after which the command differs from the policy's action."""

MAX_BRAKING_SECONDS = 3.0


class StepClock:
    """Deadlines of control steps, one `period` (s) apart since the start, so that no delay accumulates."""

    def __init__(
        self,
        period: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = precise_sleep,
    ) -> None:
        self._period, self._now, self._sleep = period, now, sleep
        self._due = now()

    def wait(self) -> int:
        """Wait for the next deadline and return the number of deadlines that were missed.

        A step that ends up to half a period late is followed at once, a later one at the next deadline:
        otherwise the robot would get two commands within one of its own steps.
        """
        self._due += self._period
        missed = max(round((self._now() - self._due) / self._period), 0)
        self._due += missed * self._period
        self._sleep(max(self._due - self._now(), 0.0))
        return missed


class SafeRollout(RolloutStrategy):
    """Runs a policy episode by episode through the safety layer, with takeover by a person.

    Without a number of `episodes` it continues until it is stopped. The `recorder`, if any, receives every
    step. With `new_scenes` the robot creates a new scene when sent to its initial pose, as `vega_sim` does;
    hardware would jump there.
    """

    def __init__(
        self,
        safety: SafetyFilter,
        *,
        episodes: int | None,
        episode_seconds: float,
        recorder: EpisodeRecorder | None = None,
        new_scenes: bool = False,
    ) -> None:
        super().__init__(BaseStrategyConfig())
        self.human = self._was_human = False
        self.steps = self.late_steps = 0
        self._safety = safety
        self._episodes, self._episode_seconds = episodes, episode_seconds
        self._recorder, self._new_scenes = recorder, new_scenes

    def toggle_human(self) -> None:
        """Give control to the person with the teleoperator, or back to the policy."""
        self.human = not self.human
        logger.warning("control: %s", "the teleoperator" if self.human else "the policy")

    def setup(self, ctx: RolloutContext) -> None:
        """Start the inference engine."""
        self._init_engine(ctx)

    def run(self, ctx: RolloutContext) -> None:
        """Run the episodes."""
        episode, shutdown = 0, ctx.runtime.shutdown_event
        while not shutdown.is_set() and episode != self._episodes:
            self.reset()
            end, clock = time.perf_counter() + self._episode_seconds, StepClock(1 / ctx.runtime.cfg.fps)
            while time.perf_counter() < end and not shutdown.is_set():
                self.step(ctx)
                self.steps += 1
                self.late_steps += clock.wait()
            if self._recorder is not None:
                self._recorder.end_episode()
            if self._new_scenes and not shutdown.is_set():
                self._safety.reset()  # until the first action the watchdog has nothing to hold
                ctx.hardware.robot_wrapper.send_action(dict(ctx.hardware.initial_position or {}))
            episode += 1
        assert self._engine is not None
        if self._engine.failed:  # LeRobot's engine has stopped, and the rollout with it
            self._safety.stop("inference failed repeatedly; see the log above")

    def come_to_rest(self, ctx: RolloutContext) -> None:
        """Stop inference, then brake the robot; call it while the watchdog still runs."""
        if self._engine is not None:
            self._engine.stop()
        last: dict[str, float] | None = None
        deadline = time.monotonic() + MAX_BRAKING_SECONDS
        while time.monotonic() < deadline:
            command = self._safety.hold("the end")
            if command is None or command == last:
                return
            ctx.hardware.robot_wrapper.send_action(command)
            last = command
            precise_sleep(self._safety.period)
        logger.error("the robot was still moving after %.0f s of braking", MAX_BRAKING_SECONDS)

    def teardown(self, ctx: RolloutContext) -> None:
        """Stop inference and release the hardware in its present position."""
        self._teardown_hardware(ctx.hardware, return_to_initial_position=False)

    def reset(self) -> None:
        """Discard all predictions from earlier observations."""
        assert self._engine is not None
        assert self._interpolator is not None
        self._engine.reset()
        self._interpolator.reset()
        self._engine.resume()

    def step(self, ctx: RolloutContext) -> None:
        """Observe, act and record once."""
        observed_at = time.monotonic()
        observation = ctx.hardware.robot_wrapper.get_observation()
        self._safety.set_observation_time(observed_at)
        before = dict(self._safety.counts)
        processed = self._process_observation_and_notify(ctx.processors, observation)
        if self.human != self._was_human:
            self._was_human = self.human
            self.reset()
        if self.human and ctx.hardware.teleop is not None:
            action = self._send_teleop_action(ctx, observation)
        else:
            assert self._interpolator is not None
            action = send_next_action(processed, observation, ctx, self._interpolator)
            if action is not None and isinstance(self._engine, AlignedEngine):
                robot: Any = ctx.hardware.robot_wrapper.inner
                self._engine.command_sent(getattr(robot, "commands_sent", None))
        if action is None:
            return  # nothing predicted yet: the watchdog holds the robot
        changed = [kind for kind in CHANGES if self._safety.counts[kind] > before.get(kind, 0)]
        if "stale" in changed:
            self.reset()
        if self._recorder is not None:
            self._recorder.add(self._frame(ctx, processed, action, bool(changed) or self.human))

    def _send_teleop_action(self, ctx: RolloutContext, observation: dict[str, Any]) -> dict[str, float]:
        teleop, processors = ctx.hardware.teleop, ctx.processors
        assert teleop is not None
        action = processors.teleop_action_processor((teleop.get_action(), observation))
        ctx.hardware.robot_wrapper.send_action(processors.robot_action_processor((action, observation)))
        return action

    def _frame(
        self, ctx: RolloutContext, processed: dict[str, Any], action: dict[str, float], intervention: bool
    ) -> dict[str, Any]:
        features, command = ctx.data.dataset_features, self._safety.last_command
        policy_action = build_dataset_frame(features, action, prefix=ACTION)[ACTION]
        return {
            **build_dataset_frame(features, processed, prefix=OBS_STR),
            **build_dataset_frame(features, command, prefix=ACTION),
            POLICY_ACTION: np.nan_to_num(policy_action),  # NaN would spoil the dataset's statistics
            INTERVENTION: np.array([intervention]),
            "task": ctx.runtime.cfg.task,
        }


def predict_from_observation(context: RolloutContext, observation: dict[str, Any]) -> np.ndarray:
    """Return a chunk [t a] in the robot's units, predicted from a robot's observation.

    A policy that reads histories stores the observation until it is reset.
    """
    processed = context.processors.robot_observation_processor(observation)
    return predict_chunk(context, prepare_batch(context, processed))[1].numpy()


def prepare_batch(context: RolloutContext, processed: dict[str, Any]) -> dict[str, Any]:
    """Return a policy's batch from an observation after LeRobot's observation processor.

    A policy that reads histories stores the observation until it is reset.
    """
    cfg, policy = context.runtime.cfg, context.policy
    frame = build_dataset_frame(context.data.dataset_features, processed, prefix=OBS_STR)
    robot_type = context.hardware.robot_wrapper.robot_type
    batch = prepare_observation_for_inference(frame, torch.device(cfg.device or "cpu"), cfg.task, robot_type)
    batch["task"] = [cfg.task]
    with torch.no_grad():
        batch = policy.preprocessor(batch)
        return policy.policy.remember(batch) if isinstance(policy.policy, VegaPolicy) else batch


def predict_chunk(
    context: RolloutContext, batch: dict[str, Any], **rtc: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk [t a] in the policy's units and on its device, and in the robot's units on the CPU.

    `batch` is one of `prepare_batch`; `rtc` has `inference_delay` and `prev_chunk_left_over` for real-time
    chunking.
    """
    policy = context.policy
    with torch.no_grad():
        chunk = policy.policy.predict_action_chunk(batch, **rtc)
        actions = policy.postprocessor(chunk)
    return chunk[0], actions[0].float().cpu()


def creates_scenes(robot: Mapping[str, Any]) -> bool:
    """Return whether a robot creates a new scene when sent to its initial pose; an arm would jump there.

    `robot` holds the fields of a file in configs/robot; only `vega_sim` may set `new_scenes`.

    Raises:
        ValueError: If `new_scenes` is missing, or true for another robot than `vega_sim`.
    """
    value = robot.get("new_scenes")
    if not isinstance(value, bool):
        raise ValueError(
            f"robot.new_scenes: expected true or false, got {value!r}; false for every real robot"
        )
    if value and robot["device"]["type"] != "vega_sim":
        raise ValueError(
            f"robot.new_scenes: only vega_sim creates scenes; {robot['device']['type']} would jump to its "
            "initial pose. Set it to false."
        )
    return value


def delayed(predict: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return a prediction function that takes some seconds more, to measure a slow policy."""

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return predict(*arguments, **options)

    return slow
