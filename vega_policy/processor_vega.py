"""From LeRobot's batches to observations, and LeRobot's own processing steps around the policy."""

from typing import Any

import torch
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
from lerobot.utils.constants import (
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from torch import Tensor

from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.observation import Observation, stack_views


def to_observation(batch: dict[str, Any], config: VegaConfig) -> Observation:
    """Return the observation of a normalised LeRobot batch.

    Args:
        batch: Frames [b 3 h w] or [b t 3 h w], uint8 or in [0, 1], under the camera keys; `observation.state`
            [b s] or [b t s], of which the last is read; `task`, a sentence or b of them. Frames may be
            replaced by cached ones, `vega.frames` uint8 [b v 3 h w], or by features, `vega.semantic`
            [b v c gh gw] and `vega.prior` [b v d gh gw]; the task by `vega.words`, encoded text.
        config: The policy's configuration.
    """
    semantic, prior, cached = (batch.get(f"vega.{name}") for name in ("semantic", "prior", "frames"))
    is_encoded = semantic is not None and (config.prior.name == "none" or prior is not None)
    cameras = [] if is_encoded or cached is not None else list(config.image_features)
    missing = [key for key in (*cameras, OBS_STATE) if key not in batch]
    if missing:
        held = sorted(key for key in batch if key.startswith("observation"))
        raise ValueError(f"The batch lacks {missing}; it holds {held}. Rename the keys to match.")
    if cached is not None and cached.dtype != torch.uint8:
        raise TypeError(f"vega.frames: expected uint8 frames of a cache, got {cached.dtype}.")
    frames = None if cached is None else cached[:, :, None]
    if cameras:
        frames = stack_views({key: batch[key] for key in cameras}, config.frame_size, config.resize)
    state = batch[OBS_STATE]
    state = state[:, -1] if state.ndim == 3 else state
    task = batch.get("task")
    if task is None:
        if "vega.words" not in batch:
            raise ValueError(
                "The batch has no 'task': expected an instruction, or one for each row. Give task='' to a "
                "policy that was trained without."
            )
        task = ""
    instruction = [task] * len(state) if isinstance(task, str) else list(task)
    return Observation(frames, state, instruction, semantic, prior, batch.get("vega.words"))


def make_vega_pre_post_processors(
    config: VegaConfig,
    dataset_stats: dict[str, dict[str, Tensor]] | None = None,
    dataset_meta: Any = None,
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
        enabled=True,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
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
