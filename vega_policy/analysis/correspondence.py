"""Do tokens of two views that show the same place look alike? The score of VEGA-3D, with what it hides.

The paper's score is a cosine that is not centred: a component that all tokens share gives 0.9 for any two
of them. So three numbers belong together: the score, the same for random pairs of places (chance), and the
score after the mean token is taken off. Retrieval asks in centimetres: does the nearest token of the other
view show the point?
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.features import TokenGeometry


@dataclass(frozen=True)
class Correspondence:
    """Scores of one scene, each a mean over its adjacent views; nan where no two views share a place.

    Attributes:
        raw: Mean cosine of the two views' mean tokens in the same voxel.
        chance: The same for all pairs of different voxels: what the raw score is without any geometry.
        centred: The raw score after the scene's mean token is taken off.
        centred_chance: Chance level of `centred`.
        retrieval: Share of points of which the most similar token of the other view lies within the radius.
        retrieval_chance: The same for a token drawn at random.
    """

    raw: float
    chance: float
    centred: float
    centred_chance: float
    retrieval: float
    retrieval_chance: float

    def values(self) -> dict[str, float]:
        """Scores by name."""
        return asdict(self)


def correspondence(
    features: Tensor, geometry: TokenGeometry, voxel: float = 0.1, radius: float = 0.1
) -> Correspondence:
    """Compare each view of a scene with the next one.

    Args:
        features: Tokens [n t d] of the scene's views.
        geometry: Where they lie.
        voxel: Side of a voxel in metres.
        radius: How far from the point a retrieved token may lie, in metres.

    Raises:
        ValueError: If features and geometry do not belong together, or there is only one view.
    """
    if features.shape[:2] != geometry.valid.shape:
        raise ValueError(
            f"features [n t d] must have the tokens of the geometry {tuple(geometry.valid.shape)}; got "
            f"{tuple(features.shape)}"
        )
    if len(features) < 2:
        raise ValueError("correspondence compares views; this scene has only one")
    raw = functional.normalize(features.double(), dim=-1)
    mean = raw[geometry.valid].mean(dim=0)
    centred = functional.normalize(raw - mean, dim=-1)
    pairs = []
    for first in range(len(raw) - 1):
        two = slice(first, first + 2)
        places, valid = geometry.points[two], geometry.valid[two]
        scores = [_voxel_scores(tokens[two], places, valid, voxel) for tokens in (raw, centred)]
        pairs.append(torch.stack([*scores[0], *scores[1], *_retrieval(centred[two], places, valid, radius)]))
    return Correspondence(*torch.stack(pairs).nanmean(dim=0).tolist())


def _voxel_scores(tokens: Tensor, points: Tensor, valid: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Mean cosine in shared voxels, and between different ones; two views [2 t d], [2 t 3], [2 t]."""
    lowest = points[valid].amin(dim=0) if valid.any() else points.new_zeros(3)
    places = ((points - lowest) / voxel).floor().long()
    both = torch.cat([places[0][valid[0]], places[1][valid[1]]])
    _, inverse = both.unique(dim=0, return_inverse=True)
    split = inverse.split([int(valid[0].sum()), int(valid[1].sum())])
    count = int(inverse.max()) + 1 if len(inverse) else 0
    means, seen = [], []
    for view in (0, 1):
        total = tokens.new_zeros(count, tokens.shape[-1]).index_add(0, split[view], tokens[view][valid[view]])
        means.append(functional.normalize(total, dim=-1))
        seen.append(torch.bincount(split[view], minlength=count) > 0)
    shared = seen[0] & seen[1]
    m = int(shared.sum())
    nothing = tokens.new_tensor(float("nan"))
    if m == 0:
        return nothing, nothing
    first, second = means[0][shared], means[1][shared]
    same = (first * second).sum()
    others = (first.sum(dim=0) * second.sum(dim=0)).sum() - same  # every pair of different voxels
    return same / m, others / (m * (m - 1)) if m > 1 else nothing


def _retrieval(tokens: Tensor, points: Tensor, valid: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Share of points found in the other view, and that of a blind guess, over both directions."""
    near = torch.cdist(points[0], points[1]) <= radius  # [t t]
    near &= valid[0][:, None] & valid[1][None]
    likeness = tokens[0] @ tokens[1].T
    found, guessed = [], []
    for close, alike, other in ((near, likeness, valid[1]), (near.T, likeness.T, valid[0])):
        asked = close.any(dim=1)  # points that the other view shows too
        best = alike.masked_fill(~other[None], -2.0)[asked].argmax(dim=1)
        found.append(close[asked].gather(1, best[:, None])[:, 0].double())
        guessed.append(close[asked].sum(dim=1) / other.sum().clamp_min(1))
    return torch.cat(found).mean(), torch.cat(guessed).double().mean()


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile bootstrap interval.

    Attributes:
        value: Over all scenes.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


RESAMPLES = 2000


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """First over second sum, [... 2] -> [...]: a mean where the second counts; nan if nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def explained(sums: np.ndarray) -> np.ndarray:
    """R2 from squared errors and squared deviations, [... 2] -> [...]."""
    return 1 - ratio_of_sums(sums)


Statistic = Callable[[np.ndarray], np.ndarray]


def estimate(sums: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0) -> Estimate:
    """A statistic of sums over scenes, with an interval from redrawing the scenes.

    Args:
        sums: What each scene adds, [scenes k].
        statistic: From summed [... k] to [...].
        seed: Of the redrawing; the same seed redraws the same scenes, so that two estimates are paired.

    Raises:
        ValueError: If there is no scene.
    """
    return _interval(statistic, seed, sums)


def difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic = ratio_of_sums, seed: int = 0
) -> Estimate:
    """Statistic of the first minus that of the second, scene by scene paired, both [scenes k].

    Raises:
        ValueError: If the two are not of the same scenes.
    """
    if len(first) != len(second):
        raise ValueError(f"expected sums of the same scenes, got {len(first)} and {len(second)}")
    return _interval(statistic, seed, first, second)


def _interval(statistic: Statistic, seed: int, *sums: np.ndarray) -> Estimate:
    scenes = len(sums[0])
    if scenes == 0:
        raise ValueError("expected at least one scene, got none")
    whole = [statistic(part.sum(axis=0)) for part in sums]
    value = float(whole[0] - whole[1] if len(whole) > 1 else whole[0])
    if scenes == 1:
        return Estimate(value, float("nan"), float("nan"))  # one scene says nothing about others
    draws = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    values = [statistic(draws @ part) for part in sums]
    spread = values[0] - values[1] if len(values) > 1 else values[0]
    low, high = np.nanquantile(spread, [0.025, 0.975]) if np.isfinite(spread).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))
