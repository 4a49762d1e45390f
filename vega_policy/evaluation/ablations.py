"""Ablations of a trained policy: the same checkpoint evaluated with part of its input removed or replaced.

An ablation is a function `(policy, checkpoint) -> policy`; to add one, give it a line in `ABLATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.numpy import load_file
from torch import Tensor

from vega_policy.config import unknown_name
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    LeRobotChunkPolicy,
    ObservationBatch,
    PolicyDescription,
)
from vega_policy.modeling_vega import VegaPolicy

MEAN_FRAMES_FILE = "mean_frames.safetensors"
"""File of a checkpoint with the mean frame of each camera of its dataset, float [3 h w] in [0, 1]."""

SEED = 0  # of permutations and noise


@dataclass(frozen=True)
class Ablation:
    """An entry of `ABLATIONS`."""

    apply: Callable[[ChunkPolicy, Path], ChunkPolicy]  # (policy, folder of the checkpoint's config.json)
    meaning: str  # for the report
    # else an interrupted evaluation runs it from the start, and shards refuse it
    rows_independent: bool = True


def check_ablations(names: Sequence[str]) -> None:
    """Refuse unknown, repeated or no ablations.

    Raises:
        ValueError: Lists close and all known names.
    """
    for name in names:
        if name not in ABLATIONS:
            raise unknown_name("ablation", name, ABLATIONS, near=3)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more different ablations, got {list(names)}")


def apply_ablation(name: str, policy: ChunkPolicy, checkpoint: Path) -> ChunkPolicy:
    """Return the policy under an ablation; `checkpoint` is the folder of its `config.json`.

    Raises:
        ValueError: If there is no such ablation, or the policy has not the part that it replaces.
        FileNotFoundError: If the checkpoint has no file that the ablation needs.
    """
    check_ablations([name])
    return ABLATIONS[name].apply(policy, checkpoint)


class BlindPolicy:
    """A policy that receives the mean frame of its dataset instead of every frame."""

    reads_frames = False

    def __init__(self, policy: ChunkPolicy, mean_frames: dict[str, np.ndarray]) -> None:
        """Wrap a policy; `mean_frames` are uint8 [h w 3] by camera key.

        Raises:
            ValueError: If a camera of the policy has no mean frame.
        """
        self.description, self.noise_shape = policy.description, policy.noise_shape
        cameras = self.description.cameras
        if missing := sorted(set(cameras) - set(mean_frames)):
            raise ValueError(
                f"no mean frame for {missing}: the policy reads {sorted(cameras)}, mean frames exist for "
                f"{sorted(mean_frames)}"
            )
        self._policy = policy
        self._mean_frames = {camera: mean_frames[camera] for camera in cameras}

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Reset the policy."""
        self._policy.reset(instructions)

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict from state, instruction and mean frames; see `ChunkPolicy.chunk`."""
        axes = self.description.frame_axes(len(batch.instructions))
        frames = {
            camera: np.broadcast_to(mean, (*axes, *mean.shape)) for camera, mean in self._mean_frames.items()
        }
        return self._policy.chunk(batch.with_constant_frames(frames), noise)


def read_mean_frames(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return the mean frames that training wrote into a checkpoint, uint8 [h w 3] by camera key.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a mean frame has another shape or range.
    """
    path = checkpoint / MEAN_FRAMES_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the blind ablation needs the dataset's mean frames, but {path} does not exist; train with "
            "scripts/train_policy.py, which writes it, or evaluate with ablations=none"
        )
    frames = load_file(path)
    for camera, mean in frames.items():
        if mean.ndim != 3 or mean.shape[0] != 3 or not 0 <= mean.min() <= mean.max() <= 1:
            raise ValueError(
                f"expected the mean frame of {camera} as [3 h w] in [0, 1], got shape {mean.shape} in "
                f"[{mean.min()}, {mean.max()}]; train again"
            )
    return {
        camera: np.round(mean.transpose(1, 2, 0) * 255).astype(np.uint8) for camera, mean in frames.items()
    }


@dataclass
class Features:
    """Features of a batch before fusion; an ablation replaces them."""

    semantic: Tensor  # [b v c gh gw], image features of the backbone
    prior: Tensor | None  # [b v d gh gw]; None without a prior
    active: list[int]  # rows in which an episode is running

    def require_prior(self) -> Tensor:
        """Return the prior's features; `FeatureAblation` has refused policies without a prior."""
        assert self.prior is not None
        return self.prior


class FeatureAblation:
    """A VEGA policy whose features are changed between its encoders and its fusion."""

    reads_frames = True

    def __init__(self, policy: ChunkPolicy, name: str, change: Change, *, needs_prior: bool = True) -> None:
        """Wrap a policy; `change` is called once a chunk, `name` is for messages.

        Raises:
            ValueError: If the policy is no VEGA policy, or has no prior although one is needed.
        """
        if not isinstance(policy, LeRobotChunkPolicy) or not isinstance(policy.policy, VegaPolicy):
            raise ValueError(
                f"ablation {name!r} changes the features of a vega policy; this one is "
                f"{policy.description.name!r}. Evaluate it with none or blind."
            )
        if needs_prior and policy.policy.model.prior is None:
            raise ValueError(
                f"ablation {name!r} changes the prior's features, but the checkpoint has no prior; evaluate "
                "it with none, blind or tokens_shuffled"
            )
        self.description: PolicyDescription = policy.description
        self.noise_shape = policy.noise_shape
        self._policy, self._vega, self._change = policy, policy.policy, change

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Reset the policy and the state of the change."""
        self._policy.reset(instructions)
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
    """A change of features in place, given by a function without state."""

    def __init__(self, function: Callable[[Features], None]) -> None:
        self._function = function

    def reset(self) -> None:
        """Forget everything: an evaluation begins."""

    def __call__(self, features: Features) -> None:
        """Change the features of a batch."""
        self._function(features)


def shuffle_tokens(features: Features) -> None:
    """Permute the image tokens, with one permutation for all views and both streams."""
    *_, height, width = features.semantic.shape
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(SEED))

    def permute(stream: Tensor) -> Tensor:
        flat = rearrange(stream, "b v c h w -> b v c (h w)")[..., order.to(stream.device)]
        return rearrange(flat, "b v c (h w) -> b v c h w", h=height)

    if features.prior is not None:
        if features.prior.shape[-2:] != (height, width):
            raise ValueError(
                "expected both streams on one token grid to shuffle them, got semantic features on "
                f"{(height, width)} and the prior's on {tuple(features.prior.shape[-2:])}"
            )
        features.prior = permute(features.prior)
    features.semantic = permute(features.semantic)


def zero_prior(features: Features) -> None:
    """Replace the prior's features by zeros."""
    features.prior = torch.zeros_like(features.require_prior())


class NoisePrior(Change):
    """Replaces the prior's features by noise with each channel's mean and deviation over the first batch.

    Statistics of every batch would pass on the global content of its frames.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the statistics and restart the noise."""
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, features: Features) -> None:
        """Replace the features."""
        prior = features.require_prior()
        if self._statistics is None:
            first, axes = prior[features.active].float(), (0, 1, 3, 4)
            self._statistics = first.mean(axes, keepdim=True), first.std(axes, keepdim=True)
        mean, deviation = self._statistics
        noise = torch.randn(prior.shape, generator=self._generator).to(prior.device)
        features.prior = (mean + deviation * noise).to(prior.dtype)


class NeighboursPrior(Change):
    """Gives each row the prior's features of another row: current ones, or those of its first frames.

    A row whose episode is over keeps its last features, so that there is always another one. With
    `first_frames` a row's very first features serve for the whole evaluation.
    """

    def __init__(self, *, first_frames: bool) -> None:
        self._first_frames = first_frames
        self.reset()

    def reset(self) -> None:
        """Forget all features."""
        self._memory: dict[int, Tensor] = {}

    def __call__(self, features: Features) -> None:
        """Exchange the features."""
        prior = features.require_prior()
        for row in features.active:
            if row not in self._memory or not self._first_frames:
                self._memory[row] = prior[row].clone()
        known = sorted(self._memory)
        if len(known) < 2:
            raise ValueError(
                f"expected at least 2 rows with episodes to exchange features, got {len(known)}; "
                "set batch_size=2 and processes=2 or more"
            )
        following = dict(zip(known, [*known[1:], known[0]], strict=True))
        features.prior = prior.clone()
        for row in features.active:
            features.prior[row] = self._memory[following[row]]


ABLATIONS = {
    "none": Ablation(lambda policy, checkpoint: policy, "the policy as it is"),
    "blind": Ablation(
        lambda policy, checkpoint: BlindPolicy(policy, read_mean_frames(checkpoint)),
        "every frame replaced by the dataset's mean frame",
    ),
    "tokens_shuffled": Ablation(
        lambda policy, checkpoint: FeatureAblation(
            policy, "tokens_shuffled", Change(shuffle_tokens), needs_prior=False
        ),
        "image tokens in another order, always the same",
    ),
    "prior_zero": Ablation(
        lambda policy, checkpoint: FeatureAblation(policy, "prior_zero", Change(zero_prior)),
        "the prior's features set to zero",
    ),
    "prior_noise": Ablation(
        lambda policy, checkpoint: FeatureAblation(policy, "prior_noise", NoisePrior()),
        "the prior's features replaced by noise of their statistics",
        rows_independent=False,
    ),
    "prior_batch": Ablation(
        lambda policy, checkpoint: FeatureAblation(
            policy, "prior_batch", NeighboursPrior(first_frames=False)
        ),
        "the prior's features of another episode at the same time",
        rows_independent=False,
    ),
    "prior_episode": Ablation(
        lambda policy, checkpoint: FeatureAblation(
            policy, "prior_episode", NeighboursPrior(first_frames=True)
        ),
        "the prior's features of the first frames of another episode",
        rows_independent=False,
    ),
}
"""Every ablation by name."""
