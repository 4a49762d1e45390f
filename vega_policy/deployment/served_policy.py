"""A LeRobot checkpoint as a server offers it: whole chunks, and chunks that go on from the last one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION

from vega_policy.deployment.servable import Continuation
from vega_policy.evaluation.lerobot_policy import (
    LeRobotChunkPolicy,
    checkpoint_fingerprint,
    find_checkpoint,
    load_lerobot_policy,
    to_lerobot,
)
from vega_policy.evaluation.policies import ObservationBatch
from vega_policy.modeling_vega import VegaPolicy


class ServedPolicy:
    """A chunk policy with its checkpoint's fingerprint and, for VEGA, real-time chunking.

    Args:
        chunks: The policy as the evaluation harness runs it.
        fingerprint: Hash over the checkpoint's files.
    """

    def __init__(self, chunks: LeRobotChunkPolicy, fingerprint: str) -> None:
        self._chunks = chunks
        self.fingerprint = fingerprint
        self.description = chunks.description
        self.noise_shape = chunks.noise_shape
        self.reads_frames = chunks.reads_frames
        policy = chunks.policy
        self.continues = isinstance(policy, VegaPolicy) and policy.supports_rtc()

    def reset(self) -> None:
        """Forget everything."""
        self._chunks.reset()

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the robot's units; see `ChunkPolicy.chunk`."""
        return self._chunks.chunk(batch, noise)

    @torch.no_grad()
    def continue_chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, continuation: Continuation
    ) -> np.ndarray:
        """Predict a chunk for one row that goes on from the last one, float32 [1 t a], in the robot's units.

        Raises:
            ValueError: If the policy cannot (see `continues`).
        """
        policy = self._chunks.policy
        if not isinstance(policy, VegaPolicy) or not self.continues:
            raise ValueError(f"policy {self.description.name!r} cannot continue a chunk (real-time chunking)")
        policy.use_rtc(
            RTCConfig(execution_horizon=continuation.horizon, max_guidance_weight=continuation.guidance)
        )
        # With the observation, the pre-processor brings the chunk into the policy's units.
        left = torch.from_numpy(continuation.actions)[None]
        inputs = self._chunks.preprocessor(to_lerobot(batch, self.description) | {ACTION: left})
        actions = policy.predict_action_chunk(
            inputs,
            noise=None if noise is None else torch.from_numpy(noise).to(policy.config.device),
            inference_delay=continuation.delay,
            prev_chunk_left_over=inputs[ACTION],
        )
        return self._chunks.postprocessor(actions).float().cpu().numpy()


def load_served_policy(path: Path, *, device: str, action_steps: int | None = None) -> ServedPolicy:
    """Load a checkpoint to be served.

    Args:
        path: A checkpoint of a training run, or its `pretrained_model` folder.
        device: Torch device such as `cpu` or `cuda`.
        action_steps: Actions executed of each chunk; None takes the policy's own `n_action_steps`.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the policy cannot be asked for chunks.
    """
    folder = find_checkpoint(path)
    chunks = load_lerobot_policy(folder, device=device, action_steps=action_steps)
    return ServedPolicy(chunks, checkpoint_fingerprint(folder))
