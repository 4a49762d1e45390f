"""VegaConfig: LeRobot's view of the policy's configuration. Its defaults are the method of VEGA-3D."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from vega_policy.model.config import (
    ActionHeadConfig,
    BackboneConfig,
    BaseConfig,
    FusionConfig,
    ModelConfig,
    PriorConfig,
)


@PreTrainedConfig.register_subclass("vega")
@dataclass
class VegaConfig(PreTrainedConfig):
    """Configuration of `VegaPolicy`.

    Attributes:
        chunk_size: Actions predicted at once.
        n_action_steps: Actions of a chunk that are executed before a new one is predicted.
        capture: On a GPU, with the compact backbone, replay whole control steps as one CUDA graph each. The
            first step of a kind runs as it is and the others agree up to rounding, so that a chunk depends on
            what was asked before: for robots, not for evaluations that are to be repeated.
        frame_size: Side in pixels of the square to which every camera's frames are brought.
        prior: The latent world simulator.
        fusion: How its tokens are mixed with the semantic ones.
        backbone: The vision-language backbone.
        head: The action head.
        base: A pre-trained policy of LeRobot to build upon, in the place of backbone and head.
        normalization_mapping: How LeRobot's processors scale each kind of feature.
        optimizer_lr: Peak learning rate of AdamW.
        optimizer_weight_decay: Weight decay of AdamW.
        optimizer_grad_clip_norm: Gradients are clipped to this norm.
        scheduler_warmup_steps: Steps of linear warm-up.
        scheduler_decay_steps: Steps until the cosine reaches its end.
        scheduler_decay_lr: Learning rate at the end of the cosine.
        action_feature_names: What each entry of an action is, as the dataset says; LeRobot fills it in.
        state_feature_names: The same of the state.
    """

    rtc_config: ClassVar[Any] = (
        None  # LeRobot's rollout sets it on the instance; it is no part of a checkpoint
    )

    chunk_size: int = 16
    n_action_steps: int = 8
    frame_size: int = 224
    capture: bool = False
    prior: PriorConfig = field(default_factory=PriorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    optimizer_lr: float = 3e-4
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 500
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 1e-6
    action_feature_names: list[str] | None = None
    state_feature_names: list[str] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without data.

        Raises:
            ValueError: If more actions are executed than predicted, or a base is to be without sight.
        """
        if self.device is None:  # LeRobot would take the same one, with two warnings
            self.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must lie between 1 and chunk_size ({self.chunk_size}); got "
                f"{self.n_action_steps}."
            )
        if self.base.name != "none" and not self.backbone.sight:
            raise ValueError(
                f"backbone.sight=false blinds this package's own backbones; base={self.base.name} stands in "
                "their place and sees. Take base=none."
            )

    @property
    def model(self) -> ModelConfig:
        """Sizes and parts as `VegaModel` wants them."""
        self.validate_features()
        state, action = self.robot_state_feature, self.action_feature
        assert state is not None  # validate_features refuses the rest
        assert action is not None
        return ModelConfig(
            views=len(self.image_features),
            state_dim=state.shape[0],
            action_dim=action.shape[0],
            chunk_size=self.chunk_size,
            frame_size=self.frame_size,
            prior=self.prior,
            fusion=self.fusion,
            backbone=self.backbone,
            head=self.head,
        )

    def validate_features(self) -> None:
        """Refuse features that the policy cannot work with.

        Raises:
            ValueError: If there is no camera, no state or no action; lists what there is.
        """
        missing = [
            name
            for name, found in (
                ("a camera (observation.image or observation.images.<name>)", self.image_features),
                ("observation.state", self.robot_state_feature),
                ("action", self.action_feature),
            )
            if not found
        ]
        if missing:
            there = [*(self.input_features or {}), *(self.output_features or {})]
            raise ValueError(f"The policy needs {', '.join(missing)}; the features are {there or 'none'}.")

    def set_dataset_feature_metadata(self, features: dict[str, Any]) -> None:
        """Take the names of state and action from a dataset's features; a robot is checked against them."""
        for key, field_name in (
            ("action", "action_feature_names"),
            ("observation.state", "state_feature_names"),
        ):
            names = features.get(key, {}).get("names")
            if isinstance(names, list):
                setattr(self, field_name, list(names))

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """One instant, or the frames of a history; None keeps LeRobot from adding a time axis in training."""
        return list(range(1 - self.prior.clip_frames, 1)) if self.prior.clip == "history" else None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk that starts at the present step."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW with the config's rates."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Linear warm-up, then a cosine."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )
