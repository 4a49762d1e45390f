"""VegaRemotePolicy: a served policy in LeRobot's rollout, `sync` or `rtc`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.processor import DeviceProcessorStep, PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.processor.factory import make_policy_processor_pipelines
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from vega_policy.deployment.client import RemotePolicy, ServerAddress
from vega_policy.deployment.protocol import RTCContext, ServedDescription
from vega_policy.evaluation.policies import ObservationBatch
from vega_policy.model.rtc import RTCQueueAdapter, left_over


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


class VegaRemotePolicy(PreTrainedPolicy):
    """Asks a policy server for chunks; observations go there raw, actions come back in the robot's units.

    With `rtc` inference LeRobot asks for the next chunk in a thread of its own, while the robot executes the
    last one, and counts the time on the wire into the delay that is compensated.

    Args:
        config: Where the server is; its features are filled in from what the server says.
        **kwargs: Taken for LeRobot's sake.

    Raises:
        PolicyUnavailableError: If the server cannot be reached.
        ValueError: If the served policy reads histories of frames.
    """

    config_class = VegaRemoteConfig  # pyright: ignore[reportAssignmentType]
    name = "vega_remote"  # pyright: ignore[reportAssignmentType]
    config: VegaRemoteConfig

    def __init__(self, config: VegaRemoteConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.remote = RemotePolicy(config.address, patience_seconds=config.patience_seconds)
        if self.remote.description.history != 1:
            raise ValueError(
                f"the policy at {config.url} reads the last {self.remote.description.history} frames of each "
                "camera; a rollout sends single ones to a server: deploy the checkpoint itself"
            )
        config.take_features(self.remote.served)
        self._queue: deque[Tensor] = deque()
        self._rng = np.random.default_rng(config.seed)
        self._rtc: RTCConfig | None = None
        self._clock: RTCQueueAdapter | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None, *, config: Any, **kwargs: Any
    ) -> Self:
        """Connect as the config says; there are no weights here."""
        return cls(config)

    def get_optim_params(self) -> Iterator[nn.Parameter]:
        """Nothing learns here."""
        return iter(())

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Not trained here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a policy on a server is not trained from here; train its checkpoint")

    def reset(self) -> None:
        """Forget the rest of the last chunk."""
        self._queue.clear()

    def supports_rtc(self) -> bool:
        """Whether the served policy can continue a chunk."""
        return self.remote.served.supports_rtc

    def init_rtc_processor(self) -> None:
        """LeRobot's rollout calls this after it has set `config.rtc_config`; see `RTCQueueAdapter`."""
        self.use_rtc(self.config.rtc_config)
        self._clock = RTCQueueAdapter() if self._rtc is not None and self._rtc.enabled else None

    def use_rtc(self, config: RTCConfig | None) -> None:
        """Let chunks go on from what is left of the last one, joined by what was executed."""
        self._rtc, self._clock = config, None

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action [1 a]; a new chunk when those to be executed of the last are spent."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch)
            self._queue.extend(chunk[:, : self.remote.description.action_steps].unbind(dim=1))
        return self._queue.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A chunk of actions [1 t a] in the robot's units.

        Args:
            batch: One observation: frames [1 3 h w] in [0, 1], state [1 s], task.
            inference_delay: How many actions will have been executed when the chunk is there; None without
                real-time chunking.
            prev_chunk_left_over: What is left of the last chunk [t a]; None for the first.
            **kwargs: Taken for LeRobot's sake.
        """
        going_on = {"inference_delay": inference_delay or 0, "prev_chunk_left_over": prev_chunk_left_over}
        if self._clock is not None and inference_delay is not None:
            return self._clock.answer(partial(self._chunk, batch), **going_on)
        return self._chunk(batch, **going_on)

    def _chunk(
        self, batch: dict[str, Any], inference_delay: int, prev_chunk_left_over: Tensor | None
    ) -> Tensor:
        noise = None
        if self.remote.noise_shape is not None:
            noise = self._rng.standard_normal((1, *self.remote.noise_shape), dtype=np.float32)
        continuation = None
        if self._rtc is not None and self._rtc.enabled and prev_chunk_left_over is not None:
            continuation = self._continuation(prev_chunk_left_over, inference_delay)
        return torch.from_numpy(self.remote.chunk(self._observation(batch), noise, continuation))

    def _continuation(self, left: Tensor, delay: int) -> RTCContext | None:
        rest = left_over(left, len(left))
        if rest is None:
            return None
        assert self._rtc is not None
        actions = rest[0].cpu().numpy().astype(np.float32)
        guidance = float(self._rtc.max_guidance_weight)
        return RTCContext(actions, delay, self._rtc.execution_horizon, guidance)

    def _observation(self, batch: dict[str, Any]) -> ObservationBatch:
        frames = {}
        for camera in self.remote.description.cameras:
            if camera not in batch:
                raise ValueError(f"the served policy reads {camera}; the robot offers {sorted(batch)}")
            pixels = (batch[camera] * 255).round().to(torch.uint8)
            frames[camera] = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
        state = batch[OBS_STATE].float().cpu().numpy() if OBS_STATE in batch else np.zeros((1, 0), np.float32)
        task = batch.get("task", "")
        return ObservationBatch(frames, state, [task] if isinstance(task, str) else list(task))


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
