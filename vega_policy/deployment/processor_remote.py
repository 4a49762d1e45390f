"""Processors around a served policy: none, the server has its own."""

from __future__ import annotations

from typing import Any

from lerobot.processor import DeviceProcessorStep, PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.processor.factory import make_policy_processor_pipelines

from vega_policy.deployment.configuration_remote import VegaRemoteConfig


def make_vega_remote_pre_post_processors(
    config: VegaRemoteConfig, dataset_stats: Any = None, dataset_meta: Any = None
) -> tuple[PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """Pipelines that leave observations and actions in the robot's units.

    Args:
        config: Where the policy is.
        dataset_stats: Taken for LeRobot's sake.
        dataset_meta: Taken for LeRobot's sake.
    """
    return make_policy_processor_pipelines(
        [RenameObservationsProcessorStep(rename_map={})], [DeviceProcessorStep(device="cpu")]
    )
