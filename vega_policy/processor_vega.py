"""Pre- and post-processing in LeRobot's own steps, under the names that its command lines override."""

from typing import Any

from lerobot.configs.types import PolicyFeature
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

from vega_policy.configuration_vega import VegaConfig


def make_vega_pre_post_processors(
    config: VegaConfig,
    dataset_stats: dict[str, dict[str, Tensor]] | None = None,
    dataset_meta: Any = None,
) -> tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[Any, Any]]:
    """Pipelines around the policy; the statistics they hold travel with the checkpoint.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics of the training data by key; None for a policy without normalisation yet.
        dataset_meta: Taken for LeRobot's sake.

    Returns:
        Pre-processor (rename, batch axis, device, normalise) and post-processor (un-normalise, to the CPU);
        with a base, its own.
    """
    if config.base.name != "none":
        from vega_policy.backbones.pretrained_vla import (
            base_processors,  # LeRobot's other policies are heavy to import
        )

        return base_processors(config, dataset_stats)
    inputs: dict[str, PolicyFeature] = config.input_features or {}
    outputs: dict[str, PolicyFeature] = config.output_features or {}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device or "cpu"),
        NormalizerProcessorStep(
            features={**inputs, **outputs}, norm_map=config.normalization_mapping, stats=dataset_stats
        ),
    ]
    after = [
        UnnormalizerProcessorStep(
            features=outputs, norm_map=config.normalization_mapping, stats=dataset_stats
        ),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
            steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME
        ),
        PolicyProcessorPipeline[PolicyAction, PolicyAction](
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
