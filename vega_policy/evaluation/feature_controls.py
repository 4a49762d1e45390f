"""Controls inside a VEGA policy: its image tokens out of place, its prior silenced or someone else's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vega_policy.evaluation.lerobot_policy import LeRobotChunkPolicy
from vega_policy.evaluation.policies import ChunkPolicy, ObservationBatch, PolicyDescription
from vega_policy.modeling_vega import VegaPolicy

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


class FeatureControl:
    """A policy whose features are changed between its eyes and its fusion."""

    reads_frames = True

    def __init__(self, policy: ChunkPolicy, name: str, change: Change, *, needs_prior: bool) -> None:
        """Change a policy.

        Args:
            policy: The policy.
            name: Name of the control, for messages.
            change: What is done to the features; called once a chunk.
            needs_prior: Whether a policy without a prior is refused.

        Raises:
            ValueError: If the policy is no VEGA policy, or lacks the prior.
        """
        if not isinstance(policy, LeRobotChunkPolicy) or not isinstance(policy.policy, VegaPolicy):
            raise ValueError(
                f"control {name!r} reaches into the features of a vega policy; this one is "
                f"{policy.description.name!r}. Evaluate it with none or blind."
            )
        if needs_prior and policy.policy.model.prior is None:
            raise ValueError(
                f"control {name!r} changes the prior's features, but the checkpoint has no prior"
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
    assert features.prior is not None  # FeatureControl refuses policies without a prior
    return features.prior
