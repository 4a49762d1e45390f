"""Controls: the same checkpoint with something taken away, to learn what its success rests on.

A control turns a policy into a policy. To add one, write a function `(policy, checkpoint) -> policy` and give
it a line in `CONTROLS`. Those that reach into the features are in `feature_controls.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vega_policy.evaluation.policies import ChunkPolicy, ObservationBatch, PolicyDescription

MEAN_FRAMES_FILE = "mean_frames.safetensors"
"""File of a checkpoint with the mean frame of each camera of its dataset, float [3 h w] in [0, 1]."""


class BlindPolicy:
    """A policy that sees the mean frame of its dataset instead of every frame."""

    reads_frames = False

    def __init__(self, policy: ChunkPolicy, mean_frames: dict[str, np.ndarray]) -> None:
        """Blind a policy.

        Args:
            policy: The policy.
            mean_frames: Camera key -> uint8 [h w 3].

        Raises:
            ValueError: If a camera of the policy has no mean frame.
        """
        cameras = policy.description.cameras
        missing = sorted(set(cameras) - set(mean_frames))
        if missing:
            raise ValueError(
                f"no mean frame for {missing}: the policy reads {sorted(cameras)}, mean frames exist for "
                f"{sorted(mean_frames)}"
            )
        self._policy = policy
        self._mean_frames = {camera: mean_frames[camera] for camera in cameras}

    @property
    def description(self) -> PolicyDescription:
        """What the policy was trained on."""
        return self._policy.description

    @property
    def noise_shape(self) -> tuple[int, int] | None:
        """Shape [t a] of the policy's noise."""
        return self._policy.noise_shape

    def reset(self) -> None:
        """Forget everything."""
        self._policy.reset()

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict from state, instruction and mean frames; see `ChunkPolicy.chunk`."""
        rows = len(batch.instructions)
        axes = self.description.frame_axes(rows)
        frames = {
            camera: np.broadcast_to(mean, (*axes, *mean.shape)) for camera, mean in self._mean_frames.items()
        }
        return self._policy.chunk(batch.with_constant_frames(frames), noise)


def read_mean_frames(checkpoint: Path) -> dict[str, np.ndarray]:
    """Read the mean frames that training left in a checkpoint.

    Args:
        checkpoint: Folder of the checkpoint's `config.json`.

    Returns:
        Camera key -> uint8 [h w 3].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a mean frame has another shape or range.
    """
    from safetensors.numpy import load_file

    path = checkpoint / MEAN_FRAMES_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the blind control needs the dataset's mean frames, but {path} does not exist; train with "
            "scripts/train_policy.py, which writes it, or evaluate with control=none"
        )
    return {camera: _as_picture(camera, mean) for camera, mean in load_file(path).items()}


def _as_picture(camera: str, mean: np.ndarray) -> np.ndarray:
    if mean.ndim != 3 or mean.shape[0] != 3 or not 0 <= mean.min() <= mean.max() <= 1:
        raise ValueError(
            f"expected the mean frame of {camera} as [3 h w] in [0, 1], got shape {mean.shape} in "
            f"[{mean.min()}, {mean.max()}]"
        )
    return np.round(mean.transpose(1, 2, 0) * 255).astype(np.uint8)


def _unchanged(policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
    return policy


def _blind(policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
    return BlindPolicy(policy, read_mean_frames(checkpoint))


def _features(name: str, *, needs_prior: bool = True) -> Callable[[ChunkPolicy, Path], ChunkPolicy]:
    def control(policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
        from vega_policy.evaluation import feature_controls as features

        changes = {
            "tokens_shuffled": lambda: features.Change(features.shuffle_tokens),
            "prior_zero": lambda: features.Change(features.zero_prior),
            "prior_noise": features.NoisePrior,
            "prior_batch": lambda: features.NeighboursPrior(first_frames=False),
            "prior_episode": lambda: features.NeighboursPrior(first_frames=True),
        }
        return features.FeatureControl(policy, name, changes[name](), needs_prior=needs_prior)

    return control


@dataclass(frozen=True)
class Control:
    """What is taken away.

    Attributes:
        apply: Changes a policy, given the folder of its checkpoint.
        meaning: In words, for the report.
        rows_apart: Whether a row of the batch is played without a look at the others. Where it is not, an
            interrupted evaluation plays the control from its beginning, and shards are refused.
    """

    apply: Callable[[ChunkPolicy, Path], ChunkPolicy]
    meaning: str
    rows_apart: bool = True


CONTROLS = {
    "none": Control(_unchanged, "the policy as it is"),
    "blind": Control(_blind, "every frame replaced by the dataset's mean frame"),
    "tokens_shuffled": Control(
        _features("tokens_shuffled", needs_prior=False), "image tokens in another order, always the same"
    ),
    "prior_zero": Control(_features("prior_zero"), "the prior's features set to zero"),
    "prior_noise": Control(
        _features("prior_noise"),
        "the prior's features replaced by noise of their statistics",
        rows_apart=False,
    ),
    "prior_batch": Control(
        _features("prior_batch"), "the prior's features of another episode at the same time", rows_apart=False
    ),
    "prior_episode": Control(
        _features("prior_episode"),
        "the prior's features of the first frames of another episode",
        rows_apart=False,
    ),
}
"""Every control by name."""


def check_controls(names: Sequence[str]) -> None:
    """Refuse unknown, repeated or no controls.

    Raises:
        ValueError: With the near and all known names.
    """
    for name in names:
        if name not in CONTROLS:
            near = difflib.get_close_matches(name, CONTROLS, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown control {name!r}; {hint}Known controls: {', '.join(CONTROLS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more different controls, got {list(names)}")


def apply_control(name: str, policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
    """Return the policy under a control.

    Args:
        name: A key of `CONTROLS`.
        policy: The policy.
        checkpoint: Folder of the checkpoint's `config.json`.

    Raises:
        ValueError: If there is no such control.
        FileNotFoundError: If the checkpoint lacks a file that the control needs.
    """
    check_controls([name])
    return CONTROLS[name].apply(policy, checkpoint)
