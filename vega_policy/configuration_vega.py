"""VegaConfig: the policy's configuration as LeRobot needs it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from vega_policy.config import check_choices, check_numbers
from vega_policy.model.config import (
    RESIZES,
    ActionHeadConfig,
    BackboneConfig,
    BaseConfig,
    DisplacementConfig,
    ForecastConfig,
    FusionConfig,
    ModelConfig,
    PriorConfig,
)
from vega_policy.run_dir import read_json


def read_rendering(root: Path) -> str | None:
    """Return the rendering profile of a dataset that this package's simulators made, None of another one."""
    origin = root / "meta" / "vega.json"
    return read_json(origin, "settings")["settings"].get("rendering") if origin.is_file() else None


@PreTrainedConfig.register_subclass("vega")
@dataclass
class VegaConfig(PreTrainedConfig):
    """Configuration of `VegaPolicy`; defaults come from the dataclasses of `model/config.py`."""

    rtc_config: ClassVar[Any] = None  # LeRobot's rollout sets it on the instance; in no checkpoint

    chunk_size: int = ModelConfig.chunk_size  # actions predicted at once
    n_action_steps: int = 8  # actions of a chunk that are executed before the next one is predicted
    latency_steps: int = 0  # commands that are under way when a robot is observed; see docs/deploy.md
    frame_size: int = ModelConfig.frame_size  # side in pixels to which every camera's frames are resized
    resize: str = ModelConfig.resize  # `stretch` to the square, or `pad`: keep the aspect ratio, add black
    # On a GPU, with the compact backbone: replay a control step as one CUDA graph. The first step of a kind
    # runs uncaptured and later ones agree up to rounding, so keep it off where results must be repeatable.
    capture: bool = False
    prior: PriorConfig = field(default_factory=PriorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    displacement: DisplacementConfig = field(default_factory=DisplacementConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    optimizer_lr: float = 3e-4  # peak learning rate of AdamW
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 500  # linear
    scheduler_decay_steps: int = 30_000  # until the cosine ends, at `scheduler_decay_lr`
    scheduler_decay_lr: float = 1e-6
    action_feature_names: list[str] | None = None  # of the dataset, filled in by training
    state_feature_names: list[str] | None = None
    # Actions relative to the state at the start of their chunk, as pi0's, except joints with one of these
    # names (`gripper`). The state must begin with the action's entries, in their order.
    use_relative_actions: bool = False
    relative_exclude_joints: list[str] = field(default_factory=list)
    dataset_fps: float | None = None  # control steps a second of the dataset, filled in by training
    dataset_rendering: str | None = None  # the same of its simulator's profile; None where that is unknown

    def __post_init__(self) -> None:
        if self.device is None:  # LeRobot would choose the same one, with two warnings
            self.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must lie between 1 and chunk_size ({self.chunk_size}); got "
                f"{self.n_action_steps}."
            )
        if not 0 <= self.latency_steps <= self.chunk_size - self.n_action_steps:
            raise ValueError(
                f"latency_steps must lie between 0 and chunk_size - n_action_steps "
                f"({self.chunk_size - self.n_action_steps}); got {self.latency_steps}."
            )
        self._check_choices()
        if self.base.name != "none" and not self.backbone.sight:
            raise ValueError(
                f"backbone.sight=false removes the vision of this package's own backbones; base="
                f"{self.base.name} replaces them. Take base=none."
            )

    def _check_choices(self) -> None:
        rates = ("optimizer_lr", "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_decay_lr")
        check_numbers(self, "policy.", **dict.fromkeys((*rates, "scheduler_warmup_steps"), "[0, inf)"))
        check_choices(self, "policy.", resize=RESIZES)
        check_numbers(self, "policy.", frame_size="[1, inf)")
        if self.base.name != "none" and self.forecast.is_on:
            raise ValueError("policy.forecast is for the compact backbone, not for a base. Take base=none.")
        if self.base.name != "none" and self.displacement.weight:
            raise ValueError(
                "policy.displacement is for this package's own action heads, not for a base. Take base=none."
            )
        if self.base.name != "none" and self.head.prefix_actions != "clean":
            raise ValueError(
                "head.prefix_actions is for this package's own action heads, not for a base. Take base=none."
            )
        if self.base.name != "none" and self.use_relative_actions:
            raise ValueError(
                "policy.use_relative_actions is for this package's own backbones; a base has its own "
                "processors. Take base=none."
            )

    @property
    def model(self) -> ModelConfig:
        """The configuration of `VegaModel`."""
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
            resize=self.resize,
            prior=self.prior,
            fusion=self.fusion,
            backbone=self.backbone,
            head=self.head,
            forecast=self.forecast,
            displacement=self.displacement,
        )

    def validate_features(self) -> None:
        """Check that there are a camera, a state and an action.

        Raises:
            ValueError: If one is missing; lists the features.
        """
        required = {
            "a camera (observation.image or observation.images.<name>)": self.image_features,
            "observation.state": self.robot_state_feature,
            "action": self.action_feature,
        }
        missing = [name for name, found in required.items() if not found]
        if missing:
            features = [*(self.input_features or {}), *(self.output_features or {})]
            raise ValueError(f"The policy needs {', '.join(missing)}; the features are {features or 'none'}.")

    def set_dataset_feature_metadata(self, features: dict[str, Any]) -> None:
        """Take the names of state and action from a dataset; preflight checks a robot against them."""
        for key, field_name in (
            ("action", "action_feature_names"),
            ("observation.state", "state_feature_names"),
        ):
            names = features.get(key, {}).get("names")
            if isinstance(names, list):
                setattr(self, field_name, list(names))

    def set_dataset_rendering(self, root: Path) -> None:
        """Take the rendering profile of a dataset in a local folder; evaluations render alike."""
        self.dataset_rendering = read_rendering(root)

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """The frames of a history; None for single frames, without a time axis."""
        return list(range(1 - self.prior.clip_frames, 1)) if self.prior.clip == "history" else None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk that starts at the current step."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """None: no rewards."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return AdamW."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Return a linear warm-up, then a cosine."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )
