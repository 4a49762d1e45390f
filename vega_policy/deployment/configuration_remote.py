"""A policy on a server, as LeRobot's rollout sees it: type `vega_remote`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from vega_policy.deployment.client import ServerAddress
from vega_policy.deployment.protocol import ServedDescription


@PreTrainedConfig.register_subclass("vega_remote")
@dataclass
class VegaRemoteConfig(PreTrainedConfig):
    """Where the policy is.

    Attributes:
        url: `ws://host:port` or `wss://host:port` of a policy server (scripts/serve_policy.py).
        token_file: File with the token, readable by its owner only.
        ca_file: PEM file with the certificate to trust.
        timeout_seconds: How long to wait for an answer.
        patience_seconds: How long to look for a server that went away; the robot is held meanwhile.
        seed: Of the noise that chunks start from.
    """

    url: str = "ws://127.0.0.1:8765"
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_seconds: float = 10.0
    patience_seconds: float = 30.0
    seed: int = 0
    rtc_config: ClassVar[Any] = None  # LeRobot's rollout sets it on the instance

    @property
    def address(self) -> ServerAddress:
        """Where the server is."""
        return ServerAddress(self.url, self.token_file, self.ca_file, self.timeout_seconds)

    def take_features(self, served: ServedDescription) -> None:
        """Fill in what the served policy reads and gives; how large its frames were is not said."""
        policy = served.policy
        self.input_features = {
            camera: PolicyFeature(FeatureType.VISUAL, (3, 0, 0)) for camera in policy.cameras
        }
        if policy.state_size is not None:
            self.input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (policy.state_size,))
        self.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (policy.action_size,))}

    def validate_features(self) -> None:
        """Nothing to refuse: the server refuses."""

    @property
    def observation_delta_indices(self) -> None:
        """One instant."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """Not trained here."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None

    def get_optimizer_preset(self) -> Any:
        """Not trained here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a policy on a server is not trained from here; train its checkpoint")

    def get_scheduler_preset(self) -> None:
        """Not trained here."""
        return
