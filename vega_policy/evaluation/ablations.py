"""Ablations of a trained policy: the same checkpoint evaluated with one part of its input removed.

To add one, write a function `(policy, checkpoint) -> policy` and give it a line in `ABLATIONS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vega_policy.evaluation.policies import (
    ChunkPolicy,
    LeRobotChunkPolicy,
    ObservationBatch,
    PolicyDescription,
)
from vega_policy.modeling_vega import VegaPolicy

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
            f"the blind ablation needs the dataset's mean frames, but {path} does not exist; train with "
            "scripts/train_policy.py, which writes it, or evaluate with ablation=none"
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
    def ablation(policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
        from vega_policy.evaluation import ablations as features

        changes = {
            "tokens_shuffled": lambda: features.Change(features.shuffle_tokens),
            "prior_zero": lambda: features.Change(features.zero_prior),
            "prior_noise": features.NoisePrior,
            "prior_batch": lambda: features.NeighboursPrior(first_frames=False),
            "prior_episode": lambda: features.NeighboursPrior(first_frames=True),
        }
        return features.FeatureAblation(policy, name, changes[name](), needs_prior=needs_prior)

    return ablation


@dataclass(frozen=True)
class Ablation:
    """What is taken away.

    Attributes:
        apply: Changes a policy, given the folder of its checkpoint.
        meaning: In words, for the report.
        rows_apart: Whether a row of the batch is played without a look at the others. Where it is not, an
            interrupted evaluation plays the ablation from its beginning, and shards are refused.
    """

    apply: Callable[[ChunkPolicy, Path], ChunkPolicy]
    meaning: str
    rows_apart: bool = True


ABLATIONS = {
    "none": Ablation(_unchanged, "the policy as it is"),
    "blind": Ablation(_blind, "every frame replaced by the dataset's mean frame"),
    "tokens_shuffled": Ablation(
        _features("tokens_shuffled", needs_prior=False), "image tokens in another order, always the same"
    ),
    "prior_zero": Ablation(_features("prior_zero"), "the prior's features set to zero"),
    "prior_noise": Ablation(
        _features("prior_noise"),
        "the prior's features replaced by noise of their statistics",
        rows_apart=False,
    ),
    "prior_batch": Ablation(
        _features("prior_batch"), "the prior's features of another episode at the same time", rows_apart=False
    ),
    "prior_episode": Ablation(
        _features("prior_episode"),
        "the prior's features of the first frames of another episode",
        rows_apart=False,
    ),
}
"""Every ablation by name."""


def check_ablations(names: Sequence[str]) -> None:
    """Refuse unknown, repeated or no ablations.

    Raises:
        ValueError: With the near and all known names.
    """
    for name in names:
        if name not in ABLATIONS:
            near = difflib.get_close_matches(name, ABLATIONS, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown ablation {name!r}; {hint}Known ablations: {', '.join(ABLATIONS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more different ablations, got {list(names)}")


def apply_ablation(name: str, policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
    """Return the policy under an ablation.

    Args:
        name: A key of `ABLATIONS`.
        policy: The policy.
        checkpoint: Folder of the checkpoint's `config.json`.

    Raises:
        ValueError: If there is no such ablation.
        FileNotFoundError: If the checkpoint lacks a file that the ablation needs.
    """
    check_ablations([name])
    return ABLATIONS[name].apply(policy, checkpoint)


SEED = 0  # of permutations and noise


@dataclass
class Features:
    """What both encoders made of a batch.

    Attributes:
        semantic: Image features of the backbone, [b v c gh gw].
        prior: Features of the prior, [b v d gh gw]; None without a prior.
        active: Rows in which an episode is running.
    """

    semantic: Tensor
    prior: Tensor | None
    active: list[int]


class FeatureAblation:
    """A policy whose features are changed between its eyes and its fusion."""

    reads_frames = True

    def __init__(self, policy: ChunkPolicy, name: str, change: Change, *, needs_prior: bool) -> None:
        """Change a policy.

        Args:
            policy: The policy.
            name: Name of the ablation, for messages.
            change: What is done to the features; called once a chunk.
            needs_prior: Whether a policy without a prior is refused.

        Raises:
            ValueError: If the policy is no VEGA policy, or lacks the prior.
        """
        if not isinstance(policy, LeRobotChunkPolicy) or not isinstance(policy.policy, VegaPolicy):
            raise ValueError(
                f"ablation {name!r} reaches into the features of a vega policy; this one is "
                f"{policy.description.name!r}. Evaluate it with none or blind."
            )
        if needs_prior and policy.policy.model.prior is None:
            raise ValueError(
                f"ablation {name!r} changes the prior's features, but the checkpoint has no prior"
            )
        self._policy, self._vega, self._change = policy, policy.policy, change

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
        self._change.reset()

    @torch.no_grad()
    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict from changed features; see `ChunkPolicy.chunk`."""
        inputs = self._policy.inputs(batch)
        observation, model = self._vega.observe(inputs), self._vega.model
        prior = None if model.prior is None else model.prior_features(observation)
        features = Features(model.semantic_features(observation), prior, batch.active_rows())
        self._change(features)
        inputs["vega.semantic"] = features.semantic
        if features.prior is not None:
            inputs["vega.prior"] = features.prior
        return self._policy.predict(inputs, noise)


class Change:
    """A change of features, in place; the plain one is a function without memory."""

    def __init__(self, function: Callable[[Features], None]) -> None:
        """Take the function."""
        self._function = function

    def reset(self) -> None:
        """Forget everything: an evaluation begins."""

    def __call__(self, features: Features) -> None:
        """Change the features of a batch."""
        self._function(features)


def shuffle_tokens(features: Features) -> None:
    """Put every image token into another place: one permutation for all views and both streams."""
    places = features.semantic.shape[-2] * features.semantic.shape[-1]
    order = torch.randperm(places, generator=torch.Generator().manual_seed(SEED))
    features.semantic = _in_order(features.semantic, order)
    if features.prior is not None:
        if features.prior.shape[-2:] != features.semantic.shape[-2:]:
            raise ValueError(
                f"tokens can be shuffled on one grid only; semantic features lie on "
                f"{tuple(features.semantic.shape[-2:])}, the prior's on {tuple(features.prior.shape[-2:])}"
            )
        features.prior = _in_order(features.prior, order)


def _in_order(features: Tensor, order: Tensor) -> Tensor:
    height = features.shape[-2]
    flat = rearrange(features, "b v c h w -> b v c (h w)")[..., order.to(features.device)]
    return rearrange(flat, "b v c (h w) -> b v c h w", h=height)


def zero_prior(features: Features) -> None:
    """Silence the prior."""
    features.prior = torch.zeros_like(_prior(features))


class NoisePrior(Change):
    """The prior's features replaced by noise with each channel's mean and deviation over the first batch.

    Statistics of the batch at hand would let the global content of the frames through.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget statistics and place in the noise."""
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, features: Features) -> None:
        """Replace the features."""
        prior = _prior(features)
        if self._statistics is None:
            first = prior[features.active].float()
            axes = (0, 1, 3, 4)
            self._statistics = first.mean(axes, keepdim=True), first.std(axes, keepdim=True)
        mean, deviation = self._statistics
        noise = torch.randn(prior.shape, generator=self._generator).to(prior.device)
        features.prior = (mean + deviation * noise).to(prior.dtype)


class NeighboursPrior(Change):
    """Each row is given the prior's features of another row: of the same instant, or of its first frames.

    A row whose episode is over keeps its last features, so that there is always another one.
    """

    def __init__(self, *, first_frames: bool) -> None:
        """Choose.

        Args:
            first_frames: Whether a row keeps the other's very first features for the whole evaluation.
        """
        self._first_frames = first_frames
        self.reset()

    def reset(self) -> None:
        """Forget all features."""
        self._memory: dict[int, Tensor] = {}

    def __call__(self, features: Features) -> None:
        """Exchange the features."""
        prior = _prior(features)
        for row in features.active:
            if row not in self._memory or not self._first_frames:
                self._memory[row] = prior[row].clone()
        known = sorted(self._memory)
        if len(known) < 2:
            raise ValueError("features of another episode need at least 2 slots with episodes; raise slots")
        following = dict(zip(known, [*known[1:], known[0]], strict=True))
        features.prior = prior.clone()
        for row in features.active:
            features.prior[row] = self._memory[following[row]]


def _prior(features: Features) -> Tensor:
    assert features.prior is not None  # FeatureAblation refuses policies without a prior
    return features.prior
