"""LeRobot's own processing steps around the policy."""

from typing import Any

from lerobot.configs.types import PolicyFeature
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

from vega_policy.configuration_vega import VegaConfig


def make_vega_pre_post_processors(
    config: VegaConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None, dataset_meta: Any = None
) -> tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[Any, Any]]:
    """Return the pre-processor (rename, batch axis, device, normalise) and the post-processor (restore, CPU).

    The statistics that they hold are saved with the checkpoint; None stands for a policy without
    normalisation yet. With a base, they are the base's own. LeRobot passes `dataset_meta`, which is not used.
    """
    if config.base.name != "none":
        from vega_policy.backbones.pretrained_vla import base_processors  # imports LeRobot's other policies

        return base_processors(config, dataset_stats)
    inputs: dict[str, PolicyFeature] = config.input_features or {}
    outputs: dict[str, PolicyFeature] = config.output_features or {}
    norm: dict[str, Any] = {"norm_map": config.normalization_mapping, "stats": dataset_stats}
    relative = RelativeActionsProcessorStep(
        enabled=True, exclude_joints=config.relative_exclude_joints, action_names=config.action_feature_names
    )
    absolute = AbsoluteActionsProcessorStep(enabled=True, relative_step=relative)
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        *([relative] if config.use_relative_actions else []),
        DeviceProcessorStep(device=config.device or "cpu"),
        NormalizerProcessorStep(features={**inputs, **outputs}, **norm),
    ]
    after = [
        UnnormalizerProcessorStep(features=outputs, **norm),
        *([absolute] if config.use_relative_actions else []),
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
