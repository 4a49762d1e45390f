"""`VegaRemotePolicy`: a policy on a server as a LeRobot policy of type `vega_remote`.

LeRobot finds policy and processors by name in the module of the config, since its name has no
`configuration_`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

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

from vega_policy.checkpoints import UnsafeCheckpointError
from vega_policy.config import check_numbers
from vega_policy.deployment.client import RemotePolicy, ServerAddress
from vega_policy.deployment.protocol import RTCContext, ServedDescription
from vega_policy.evaluation.policies import ObservationBatch
from vega_policy.model.rtc import RTCQueueAdapter

NOT_TRAINABLE = "a policy on a server cannot be trained from here; train its checkpoint"


@PreTrainedConfig.register_subclass("vega_remote")
@dataclass
class VegaRemoteConfig(PreTrainedConfig):
    """Address of a policy on a server."""

    url: str = "ws://127.0.0.1:8765"  # `ws://host:port` or `wss://host:port` of a policy server
    token_file: Path | None = None  # readable by its owner only
    ca_file: Path | None = None  # PEM file with the certificate to trust
    timeout_seconds: float = 10.0  # for an answer
    patience_seconds: float = 30.0  # time to retry an unavailable server; the robot is held meanwhile
    seed: int = 0  # of the noise that chunks start from
    latency_steps: int = 0  # commands that are under way when a robot is observed; see docs/deploy.md
    rtc_config: ClassVar[Any] = None  # LeRobot's rollout sets it on the instance

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "server.", timeout_seconds="(0, inf)", patience_seconds="[0, inf)")
        check_numbers(self, "policy.", latency_steps="[0, inf)")

    def set_features(self, served: ServedDescription) -> None:
        """Fill in inputs and outputs of the served policy; the size of its frames is unknown."""
        self.input_features = {
            camera: PolicyFeature(FeatureType.VISUAL, (3, 0, 0)) for camera in served.cameras
        }
        if served.state_size is not None:
            self.input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (served.state_size,))
        self.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (served.action_size,))}

    def validate_features(self) -> None:
        """Accept all features: the server checks each request."""

    @property
    def observation_delta_indices(self) -> None:
        """None: the policy reads one observation."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """None: the policy is not trained here."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """None: there are no rewards."""
        return None

    def get_optimizer_preset(self) -> NoReturn:
        """Raise NotImplementedError."""
        raise NotImplementedError(NOT_TRAINABLE)

    def get_scheduler_preset(self) -> None:
        """None: the policy is not trained here."""
        return


class VegaRemotePolicy(PreTrainedPolicy):
    """Requests chunks from a policy server; observations are sent raw, actions are in the robot's units.

    With `rtc` inference the next chunk is requested in a thread of its own while the robot executes the last
    one. PolicyUnavailableError if the server is unreachable.

    Raises:
        PolicyUnavailableError: If the server is unreachable.
        ValueError: If the served policy reads histories of frames.
    """

    config_class = VegaRemoteConfig  # pyright: ignore[reportAssignmentType]
    name = "vega_remote"  # pyright: ignore[reportAssignmentType]
    config: VegaRemoteConfig

    def __init__(self, config: VegaRemoteConfig, **kwargs: Any) -> None:
        super().__init__(config)
        address = ServerAddress(config.url, config.token_file, config.ca_file, config.timeout_seconds)
        self.remote = RemotePolicy(address, patience_seconds=config.patience_seconds)
        if self.remote.description.history != 1:
            raise ValueError(
                f"the policy at {config.url} reads the last {self.remote.description.history} frames of each "
                "camera, but a rollout sends single ones to a server: deploy the checkpoint itself"
            )
        config.set_features(self.remote.served)
        self._queue: deque[Tensor] = deque()
        self._is_moving = False  # a chunk of this episode has been executed
        self._rng = np.random.default_rng(config.seed)
        self._rtc: RTCConfig | None = None
        self._adapter: RTCQueueAdapter | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None, *, config: Any, **kwargs: Any
    ) -> Self:
        """Connect to the server of the user's own config; there are no weights here.

        A config from a checkpoint is refused: it would choose the address and the token file.

        Raises:
            UnsafeCheckpointError: If the config comes from a checkpoint, which would choose the address and
                the token file.
        """
        if pretrained_name_or_path is not None:
            raise UnsafeCheckpointError(
                f"{pretrained_name_or_path}: a checkpoint must not choose the address and the token file of "
                "a policy server; expected no path, and your own --policy.url and --policy.token_file."
            )
        return cls(config)

    def get_optim_params(self) -> Iterator[nn.Parameter]:
        """Return no parameters."""
        return iter(())

    def forward(self, batch: dict[str, Any]) -> NoReturn:
        """Raise NotImplementedError."""
        raise NotImplementedError(NOT_TRAINABLE)

    def reset(self) -> None:
        """Discard the rest of the last chunk."""
        self._queue.clear()
        self._is_moving = False
        if self._adapter is not None:
            self._adapter.reset()

    def supports_rtc(self) -> bool:
        """Whether the served policy supports real-time chunking."""
        return self.remote.served.supports_rtc

    def init_rtc_processor(self) -> None:
        """Adapt to LeRobot's queue; its rollout calls this after setting `config.rtc_config`."""
        shared = self.config.rtc_config  # with the rollout's queue
        self.use_rtc(None if shared is None else replace(shared))
        if shared is not None and shared.enabled:
            action_steps = self.remote.description.action_steps
            self._adapter = RTCQueueAdapter(action_steps, self.config.latency_steps)
            shared.enabled = False

    def use_rtc(self, config: RTCConfig | None) -> None:
        """Let chunks continue the last one, joined by the number of executed actions."""
        self._rtc, self._adapter = config, None

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next action [1 a]; request a new chunk when none is left.

        Each chunk but the first of an episode begins after `latency_steps` actions, which are under way.
        """
        if not self._queue:
            chunk = self.predict_action_chunk(batch)
            first = self.config.latency_steps if self._is_moving else 0
            last = first + self.remote.description.action_steps
            if last > chunk.shape[1]:
                raise ValueError(
                    f"latency_steps: expected at most {chunk.shape[1] - last + first}, since a chunk has "
                    f"{chunk.shape[1]} actions of which {last - first} are executed; got {first}"
                )
            self._queue.extend(chunk[:, first:last].unbind(dim=1))
            self._is_moving = True
        return self._queue.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return a chunk of actions [1 t a] in the robot's units.

        `batch` is one observation: frames [1 3 h w] in [0, 1], state [1 s], task. With real-time chunking
        `inference_delay` is the number of actions executed before the chunk arrives, and
        `prev_chunk_left_over` the rest of the last chunk [t a].
        """
        rtc = {"inference_delay": inference_delay or 0, "prev_chunk_left_over": prev_chunk_left_over}
        if self._adapter is not None and inference_delay is not None:
            return self._adapter.answer(partial(self._predict, batch), **rtc)
        return self._predict(batch, **rtc)

    def _predict(
        self, batch: dict[str, Any], inference_delay: int, prev_chunk_left_over: Tensor | None
    ) -> Tensor:
        noise = None
        if self.remote.noise_shape is not None:
            noise = self._rng.standard_normal((1, *self.remote.noise_shape), dtype=np.float32)
        context = None
        rest = prev_chunk_left_over  # [t a] or [1 t a]
        if self._rtc is not None and self._rtc.enabled and rest is not None and rest.numel():
            context = RTCContext(
                rest.reshape(-1, rest.shape[-1]).cpu().numpy().astype(np.float32),
                inference_delay,
                self._rtc.execution_horizon,
                float(self._rtc.max_guidance_weight),
            )
        return torch.from_numpy(self.remote.chunk(self._observation(batch), noise, context))

    def _observation(self, batch: dict[str, Any]) -> ObservationBatch:
        frames = {}
        for camera in self.remote.description.cameras:
            if camera not in batch:
                raise ValueError(f"the served policy reads {camera}; the robot has {sorted(batch)}")
            pixels = (batch[camera] * 255).round().to(torch.uint8)
            frames[camera] = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
        state = batch[OBS_STATE].float().cpu().numpy() if OBS_STATE in batch else np.zeros((1, 0), np.float32)
        task = batch.get("task", "")
        return ObservationBatch(frames, state, [task] if isinstance(task, str) else list(task))


def make_vega_remote_pre_post_processors(
    config: VegaRemoteConfig, dataset_stats: Any = None, dataset_meta: Any = None
) -> tuple[PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """Return pipelines that keep observations and actions in the robot's units."""
    return make_policy_processor_pipelines(
        [RenameObservationsProcessorStep(rename_map={})], [DeviceProcessorStep(device="cpu")]
    )
