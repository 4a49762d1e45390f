"""The control loop of a deployment: LeRobot's rollout with a person, a recorder and stale views in mind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lerobot.rollout.configs import BaseStrategyConfig
from lerobot.rollout.context import RolloutContext
from lerobot.rollout.strategies.core import RolloutStrategy, send_next_action
from lerobot.utils.constants import ACTION, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame
from lerobot.utils.robot_utils import precise_sleep

from vega_policy.deployment.recording import INTERVENTION, POLICY_ACTION, EpisodeRecorder
from vega_policy.deployment.safety import SafetyFilter

logger = logging.getLogger(__name__)

ALTERING = ("range", "speed", "workspace", "keys", "finite", "jump", "stale")
"""Kinds of intervention after which what the robot was told is not what the policy wanted."""

LONGEST_BRAKING = 3.0
"""Seconds within which a robot has come to rest, or something is wrong."""


def lays_out_scenes(robot: Mapping[str, Any]) -> bool:
    """Whether a robot begins anew when sent to its initial pose; an arm would leap there.

    Args:
        robot: The fields of a file in configs/robot.

    Raises:
        ValueError: If that is not said, or said of another robot than `vega_sim`.
    """
    told = robot.get("new_scenes")
    if not isinstance(told, bool):
        raise ValueError(
            f"robot.new_scenes: expected true or false, got {told!r}; false for every real robot"
        )
    if told and robot["device"]["type"] != "vega_sim":
        raise ValueError(
            f"robot.new_scenes: only vega_sim lays out scenes; {robot['device']['type']} would leap to its "
            "initial pose. Set it to false."
        )
    return told


class SafeRollout(RolloutStrategy):
    """Runs a policy episode by episode, through the safety layer, with a person in reach.

    Args:
        safety: The filter in the robot action processor.
        episodes: So many episodes; None goes on until it is stopped.
        episode_seconds: Length of an episode.
        recorder: Takes every step, or None.
        new_scenes: Whether the robot, sent to its initial pose at once, lays out a new scene, as `vega_sim`
            does. Hardware would leap there.
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
        self.steps = 0
        self._safety = safety
        self._episodes, self._episode_seconds = episodes, episode_seconds
        self._recorder, self._new_scenes = recorder, new_scenes

    def toggle_human(self) -> None:
        """Let the person with the teleoperator take over, or give back."""
        self.human = not self.human
        logger.warning("control: %s", "the teleoperator" if self.human else "the policy")

    def setup(self, ctx: RolloutContext) -> None:
        """Start the inference engine."""
        self._init_engine(ctx)

    def run(self, ctx: RolloutContext) -> None:
        """Play the episodes."""
        played = 0
        while not ctx.runtime.shutdown_event.is_set() and played != self._episodes:
            self._forget()
            end = time.perf_counter() + self._episode_seconds
            while time.perf_counter() < end and not ctx.runtime.shutdown_event.is_set():
                self._paced(ctx)
            if self._recorder is not None:
                self._recorder.end_episode()
            if self._new_scenes and not ctx.runtime.shutdown_event.is_set():
                self._lay_out(ctx)
            played += 1
        assert self._engine is not None
        if self._engine.failed:  # LeRobot's engine has ended itself, and the rollout with it
            self._safety.stop("inference failed again and again; see the log above")

    def come_to_rest(self, ctx: RolloutContext) -> None:
        """Stop inference, then brake the robot; called while a watchdog still looks after it."""
        if self._engine is not None:
            self._engine.stop()
        before: dict[str, float] | None = None
        deadline = time.monotonic() + LONGEST_BRAKING
        while time.monotonic() < deadline:
            told = self._safety.hold("the end")
            if told is None or told == before:
                return
            ctx.hardware.robot_wrapper.send_action(told)
            before = told
            precise_sleep(self._safety.period)
        logger.error("the robot was still being braked after %.0f s", LONGEST_BRAKING)

    def teardown(self, ctx: RolloutContext) -> None:
        """Stop inference and let go of the hardware, where it is."""
        self._teardown_hardware(ctx.hardware, return_to_initial_position=False)

    def _lay_out(self, ctx: RolloutContext) -> None:
        """Let a simulated robot begin anew; until its first action the watchdog has nothing to watch."""
        self._safety.forget()
        ctx.hardware.robot_wrapper.send_action(dict(ctx.hardware.initial_position or {}))

    def _forget(self) -> None:
        """Drop what was predicted from views that are of no use any more."""
        assert self._engine is not None
        assert self._interpolator is not None
        self._engine.reset()
        self._interpolator.reset()
        self._engine.resume()

    def _paced(self, ctx: RolloutContext) -> None:
        start = time.perf_counter()
        self._step(ctx)
        self.steps += 1
        precise_sleep(max(1 / ctx.runtime.cfg.fps - (time.perf_counter() - start), 0.0))

    def _step(self, ctx: RolloutContext) -> None:
        seen_at = time.monotonic()
        observation = ctx.hardware.robot_wrapper.get_observation()
        self._safety.observed(seen_at)
        before = dict(self._safety.counts)
        processed = self._process_observation_and_notify(ctx.processors, observation)
        if self.human != self._was_human:
            self._was_human = self.human
            self._forget()
        if self.human and ctx.hardware.teleop is not None:
            wanted = self._let_human(ctx, observation)
        else:
            assert self._interpolator is not None
            wanted = send_next_action(processed, observation, ctx, self._interpolator)
        if wanted is None:
            return  # nothing predicted yet: the watchdog looks after the robot
        altered = [kind for kind in ALTERING if self._safety.counts[kind] > before.get(kind, 0)]
        if "stale" in altered:
            self._forget()
        if self._recorder is not None:
            self._recorder.add(self._frame(ctx, processed, wanted, bool(altered) or self.human))

    def _let_human(self, ctx: RolloutContext, observation: dict[str, Any]) -> dict[str, float]:
        teleop, processors = ctx.hardware.teleop, ctx.processors
        assert teleop is not None
        wanted = processors.teleop_action_processor((teleop.get_action(), observation))
        ctx.hardware.robot_wrapper.send_action(processors.robot_action_processor((wanted, observation)))
        return wanted

    def _frame(
        self, ctx: RolloutContext, processed: dict[str, Any], wanted: dict[str, float], intervention: bool
    ) -> dict[str, Any]:
        features, told = ctx.data.dataset_features, self._safety.last_command
        policy_action = build_dataset_frame(features, wanted, prefix=ACTION)[ACTION]
        return {
            **build_dataset_frame(features, processed, prefix=OBS_STR),
            **build_dataset_frame(features, told, prefix=ACTION),
            POLICY_ACTION: np.nan_to_num(policy_action),  # what is no number has no place in statistics
            INTERVENTION: np.array([intervention]),
            "task": ctx.runtime.cfg.task,
        }


def delayed(predict: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return a prediction that takes so much longer, to see what a slow policy would do."""

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return predict(*arguments, **options)

    return slow
