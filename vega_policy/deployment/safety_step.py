"""The safety layer as a step of LeRobot's robot action processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.configs.types import PipelineFeatureType, PolicyFeature
from lerobot.processor import (
    RobotAction,
    RobotActionProcessorStep,
    RobotObservation,
    RobotProcessorPipeline,
    TransitionKey,
)
from lerobot.processor.converters import robot_action_observation_to_transition, transition_to_robot_action

from vega_policy.deployment.safety import SafetyFilter


@dataclass
class SafetyStep(RobotActionProcessorStep):
    """Passes each robot action through a `SafetyFilter`; must be the pipeline's last step.

    Attributes:
        safety: The filter; it keeps what the robot was last told.
    """

    safety: SafetyFilter

    def action(self, action: RobotAction) -> RobotAction:
        """Return what the robot is told."""
        observation: dict[str, Any] | None = self.transition.get(TransitionKey.OBSERVATION)
        return self.safety.command(action, observation or {})

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Actions keep their names."""
        return features


def safe_action_pipeline(
    safety: SafetyFilter,
) -> RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction]:
    """Return LeRobot's `robot_action_processor` with the safety layer as its only step."""
    return RobotProcessorPipeline[tuple[RobotAction, RobotObservation], RobotAction](
        steps=[SafetyStep(safety)],
        to_transition=robot_action_observation_to_transition,
        to_output=transition_to_robot_action,
    )
