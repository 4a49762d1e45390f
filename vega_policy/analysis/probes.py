"""Linear probes: ridge regression from frozen features to geometry, tested on scenes it never saw.

Scenes are dealt into folds; each fold is predicted by a probe fitted to the others, whose strength is chosen
on a part of those. What is kept are sums a scene (squared errors, squared deviations), from which R2 and its
interval follow.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FOLDS = 5
STRENGTHS = (1e-4, 1e-2, 1.0)
"""Candidate ridge strengths, in shares of the features' mean variance."""


@dataclass(frozen=True)
class ProbeData:
    """Samples of one scene.

    Attributes:
        features: [m d].
        targets: [m k].
    """

    features: Tensor
    targets: Tensor


@dataclass(frozen=True)
class ProbeResult:
    """What a probe did on scenes held out.

    Attributes:
        squares: Of each output, summed squared error and summed squared deviation from the fitted scenes'
            mean, float64 [scenes k 2]; their ratio is 1 - R2.
        predictions: For each scene, [m k].
        errors: For each scene, prediction minus target, [m k].
    """

    squares: np.ndarray
    predictions: list[Tensor]
    errors: list[Tensor]


def probe(scenes: list[ProbeData], folds: int = FOLDS) -> ProbeResult:
    """Fit on all other folds, predict each scene.

    Args:
        scenes: Samples of each scene; scene i belongs to fold i modulo `folds`.
        folds: Number of folds.

    Raises:
        ValueError: If there are too few scenes to hold one out and choose a strength.
    """
    if len(scenes) < 3:
        raise ValueError(
            f"a probe is tested on held-out scenes and needs at least 3 scenes; got {len(scenes)}"
        )
    folds = min(folds, len(scenes))
    predictions: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    squares = np.zeros((len(scenes), scenes[0].targets.shape[1], 2))
    for fold in range(folds):
        held_out = [index for index in range(len(scenes)) if index % folds == fold]
        fitted = [scene for index, scene in enumerate(scenes) if index % folds != fold]
        ridge = _fit_and_choose(fitted)
        for index in held_out:
            targets = scenes[index].targets.double()
            guess = ridge(scenes[index].features)
            errors[index], predictions[index] = guess - targets, guess
            squares[index, :, 0] = errors[index].square().sum(dim=0)
            squares[index, :, 1] = (targets - ridge.mean_target).square().sum(dim=0)
    ordered = range(len(scenes))
    return ProbeResult(squares, [predictions[i] for i in ordered], [errors[i] for i in ordered])


class _Moments:
    """Second moments of features and targets, to be added up over scenes; a column of ones is the offset."""

    def __init__(self, scenes: list[ProbeData]) -> None:
        features = torch.cat([scene.features for scene in scenes]).double()
        targets = torch.cat([scene.targets for scene in scenes]).double()
        self.mean, self.mean_target = features.mean(dim=0), targets.mean(dim=0)
        self.features, self.targets = features - self.mean, targets - self.mean_target
        self.scale = self.features.square().mean(dim=0).sqrt()
        self.scale = self.scale.clamp_min(1e-6 * self.scale.max().clamp_min(1e-12))
        self.features = self.features / self.scale


class _Ridge:
    """A fitted probe: standardise, multiply, add."""

    def __init__(self, moments: _Moments, weights: Tensor) -> None:
        self.moments, self.weights = moments, weights
        self.mean_target = moments.mean_target

    def __call__(self, features: Tensor) -> Tensor:
        """[m d] -> [m k]."""
        standard = (features.double() - self.moments.mean) / self.moments.scale
        return standard @ self.weights + self.mean_target


def _fit(scenes: list[ProbeData], strengths: tuple[float, ...]) -> list[_Ridge]:
    """One ridge regression a strength, by the smaller of the two Gram matrices."""
    moments = _Moments(scenes)
    x, y = moments.features, moments.targets
    samples, width = x.shape
    primal = width <= samples
    gram = (x.float().T @ x.float() if primal else x.float() @ x.float().T).double()
    values, vectors = torch.linalg.eigh(gram)
    onto = vectors.T @ (x.T @ y if primal else y)
    fitted = []
    for strength in strengths:
        solved = vectors @ (onto / (values + strength * samples)[:, None])
        fitted.append(_Ridge(moments, solved if primal else x.T @ solved))
    return fitted


def _fit_and_choose(scenes: list[ProbeData]) -> _Ridge:
    """Ridge regression on all scenes, with the strength that does best on every fourth of them."""
    chosen_on = scenes[::4]
    rest = [scene for index, scene in enumerate(scenes) if index % 4]
    losses = [
        sum((ridge(scene.features) - scene.targets).square().sum().item() for scene in chosen_on)
        for ridge in _fit(rest, STRENGTHS)
    ]
    return _fit(scenes, (STRENGTHS[int(np.argmin(losses))],))[0]
