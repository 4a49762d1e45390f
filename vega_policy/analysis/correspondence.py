"""Correspondence between views as in VEGA-3D, with its chance level; bootstrap intervals over scenes.

The paper's score is a cosine that is not centred: a component common to all tokens gives 0.9 for any two of
them. Three numbers belong together: the score, the same for pairs of different places (chance), and the score
after the mean token is subtracted. Retrieval measures in metres: whether the most similar token of the other
view shows the same point.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.scenes import TokenGeometry


@dataclass(frozen=True)
class Correspondence:
    """Scores of one scene, each a mean over pairs of adjacent views; nan if no two views share a place."""

    raw: float  # mean cosine of both views' mean tokens in the same voxel
    chance: float  # mean cosine over all pairs of different voxels
    centred: float  # `raw` after the scene's mean token is subtracted
    centred_chance: float
    retrieval: float  # fraction of points whose most similar token in the other view lies within the radius
    retrieval_chance: float  # the same for a token drawn at random


def correspondence(
    features: Tensor, geometry: TokenGeometry, voxel: float = 0.1, radius: float = 0.1
) -> Correspondence:
    """Compare each view of a scene with the next one.

    Args:
        features: Tokens [n t d] of the scene's views.
        geometry: Their geometry.
        voxel: Side of a voxel in metres.
        radius: Distance in metres within which a retrieved token is correct.

    Raises:
        ValueError: If features and geometry have different tokens, or there is only one view.
    """
    if features.shape[:2] != geometry.valid.shape:
        raise ValueError(
            f"features [n t d] must have the tokens of the geometry {tuple(geometry.valid.shape)}; got "
            f"{tuple(features.shape)}"
        )
    if len(features) < 2:
        raise ValueError("correspondence compares views; this scene has only one")
    raw = functional.normalize(features.double(), dim=-1)
    centred = functional.normalize(raw - raw[geometry.valid].mean(dim=0), dim=-1)
    pairs = []
    for first in range(len(raw) - 1):
        two = slice(first, first + 2)
        points, valid = geometry.points[two], geometry.valid[two]
        scores = [*_voxel_scores(raw[two], points, valid, voxel)]
        scores += _voxel_scores(centred[two], points, valid, voxel)
        pairs.append(torch.stack([*scores, *_retrieval(centred[two], points, valid, radius)]))
    return Correspondence(*torch.stack(pairs).nanmean(dim=0).tolist())


def _voxel_scores(tokens: Tensor, points: Tensor, valid: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Return the mean cosine in shared voxels and between different ones; [2 t d], [2 t 3], [2 t]."""
    lowest = points[valid].amin(dim=0) if valid.any() else points.new_zeros(3)
    cells = ((points - lowest) / voxel).floor().long()
    _, inverse = torch.cat([cells[0][valid[0]], cells[1][valid[1]]]).unique(dim=0, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    means, occupied = [], []
    for view, index in enumerate(inverse.split([int(valid[0].sum()), int(valid[1].sum())])):
        total = tokens.new_zeros(count, tokens.shape[-1]).index_add(0, index, tokens[view][valid[view]])
        means.append(functional.normalize(total, dim=-1))
        occupied.append(torch.bincount(index, minlength=count) > 0)
    shared = occupied[0] & occupied[1]
    m = int(shared.sum())
    nan = tokens.new_tensor(float("nan"))
    if m == 0:
        return nan, nan
    first, second = means[0][shared], means[1][shared]
    same = (first * second).sum()
    different = (first.sum(dim=0) * second.sum(dim=0)).sum() - same  # over every pair of different voxels
    return same / m, different / (m * (m - 1)) if m > 1 else nan


def _retrieval(tokens: Tensor, points: Tensor, valid: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the fraction of points retrieved in the other view, and chance level, over both directions."""
    near = torch.cdist(points[0], points[1]) <= radius  # [t t]
    near &= valid[0][:, None] & valid[1][None]
    similarity = tokens[0] @ tokens[1].T
    correct, by_chance = [], []
    for close, similar, candidates in ((near, similarity, valid[1]), (near.T, similarity.T, valid[0])):
        shared = close.any(dim=1)  # points that the other view shows too
        best = similar.masked_fill(~candidates[None], -2.0)[shared].argmax(dim=1)
        correct.append(close[shared].gather(1, best[:, None])[:, 0].double())
        by_chance.append(close[shared].sum(dim=1) / candidates.sum().clamp_min(1))
    return torch.cat(correct).mean(), torch.cat(by_chance).double().mean()


def match_tokens(
    tokens: Tensor, geometry: TokenGeometry, left: int, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Match the tokens of view `left` that the next view shows too with their most similar tokens there.

    Args:
        tokens: Both views' tokens [2 t d].
        geometry: Geometry of all views.
        left: Index of the first view.
        radius: Distance in metres within which a match is correct.

    Returns:
        Indices in the first view [m], in the second [m], and whether the match is correct, bool [m].
    """
    centred = functional.normalize(tokens - tokens.flatten(0, 1).mean(dim=0), dim=-1)
    near = torch.cdist(geometry.points[left], geometry.points[left + 1]) <= radius
    near &= geometry.valid[left][:, None] & geometry.valid[left + 1][None]
    first = near.any(dim=1).nonzero()[:, 0]
    similarity = (centred[0] @ centred[1].T).masked_fill(~geometry.valid[left + 1][None], -2.0)
    second = similarity[first].argmax(dim=1)
    return first, second, near[first, second]


RESAMPLES = 2000
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile bootstrap interval over scenes."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate in another unit; a negative factor swaps the interval's ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high)


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return the first over the second sum, [... 2] -> [...]; nan if the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def r_squared(sums: np.ndarray) -> np.ndarray:
    """Return R2 of summed squared errors and squared deviations, [... 2] -> [...]."""
    return 1 - ratio_of_sums(sums)


def estimate(sums: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0) -> Estimate:
    """Estimate a statistic of sums over scenes.

    Args:
        sums: What each scene adds, [scenes k].
        statistic: From summed [... k] to [...].
        seed: Seed of the resampling; equal seeds draw equal scenes, so that two estimates are paired.

    Raises:
        ValueError: If there is no scene.
    """
    return _bootstrap(statistic, seed, sums)


def difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0
) -> Estimate:
    """Estimate a statistic of the first minus that of the second, paired by scene, both [scenes k].

    Raises:
        ValueError: If the two have different numbers of scenes.
    """
    if len(first) != len(second):
        raise ValueError(f"expected sums of the same scenes, got {len(first)} and {len(second)}")
    return _bootstrap(statistic, seed, first, second)


def _bootstrap(statistic: Statistic, seed: int, *sums: np.ndarray) -> Estimate:
    # One multinomial draw of scene counts instead of scipy.stats.bootstrap: 2,000 matrix products of sums.
    scenes = len(sums[0])
    if scenes == 0:
        raise ValueError("expected at least one scene, got none")
    totals = [statistic(part.sum(axis=0)) for part in sums]
    value = float(totals[0] - totals[1] if len(totals) > 1 else totals[0])
    if scenes == 1:
        return Estimate(value, float("nan"), float("nan"))
    counts = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    values = [statistic(counts @ part) for part in sums]
    spread = values[0] - values[1] if len(values) > 1 else values[0]
    low, high = np.nanquantile(spread, [0.025, 0.975]) if np.isfinite(spread).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))
