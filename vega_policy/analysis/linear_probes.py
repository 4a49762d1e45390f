"""Linear probes: ridge regression from frozen features to geometry, tested on scenes it never saw.

Scenes are dealt into folds; each fold is predicted by a probe fitted to the others, whose strength is chosen
on a part of those. What is kept are sums a scene (squared errors, squared deviations), from which R2 and its
interval follow.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.correspondence import (
    Correspondence,
    Estimate,
    Statistic,
    correspondence,
    difference,
    estimate,
    explained,
    ratio_of_sums,
)
from vega_policy.analysis.features import TokenGeometry
from vega_policy.analysis.scenes import pose_change
from vega_policy.data.scenes import Scene
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize
from vega_policy.priors import PRIORS, WAN, has_trained_weights, make_prior, resolve
from vega_policy.priors.base import pool
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import FrameEncoder
from vega_policy.priors.weights import locate

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


BATCH = 16  # pictures read at once
UNTRAINED = "untrained copy"


@dataclass(frozen=True)
class Readout:
    """One place at which one reader is read.

    Attributes:
        reader: The reader's label.
        layer: Layer of a prior; None where there are none.
        noise_level: Noise level of a prior; None where there is none.
    """

    reader: str
    layer: int | None = None
    noise_level: float | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.reader
        return f"{self.reader}, layer {self.layer}, noise {self.noise_level:g}"


class Reader(Protocol):
    """A frozen reader of pictures.

    Attributes:
        label: What it is called.
        fingerprint: Names its weights.
        readouts: Everything it can be asked for.
    """

    label: str
    fingerprint: str
    readouts: list[Readout]

    def read(self, pictures: Tensor, wanted: Sequence[Readout]) -> Iterator[tuple[Readout, Tensor]]:
        """Tokens of pictures [n 3 h w] in [0, 1] for each wanted readout, [n t d], in any order."""
        ...


class FixedReader:
    """A reader without layers or noise.

    Args:
        label: What it is called.
        identity: Names its weights.
        function: From pictures [n 3 h w] to features [n d gh gw].
    """

    def __init__(self, label: str, identity: str, function: Any) -> None:
        self.label, self.fingerprint, self.readouts = label, identity, [Readout(label)]
        self._function = function

    @torch.no_grad()
    def read(self, pictures: Tensor, wanted: Sequence[Readout]) -> Iterator[tuple[Readout, Tensor]]:
        """See `Reader`."""
        maps = torch.cat([self._function(part) for part in pictures.split(BATCH)])
        for readout in wanted:
            yield readout, rearrange(maps, "n d gh gw -> n (gh gw) d").float()


class WanSweep:
    """Wan at many layers and noise levels: pictures are encoded once, and one pass gives every layer.

    Args:
        label: What it is called.
        prior: Wan, built for the deepest layer, with the plain engine.
        layers: Layers to read.
        noise_levels: Noise levels to read.
    """

    def __init__(
        self, label: str, prior: LatentWorldSimulator, layers: Sequence[int], noise_levels: Sequence[float]
    ) -> None:
        self.label, self.fingerprint = label, f"{prior.fingerprint}-{prior.seed}"
        self._prior, self._encoder = prior, FrameEncoder(prior.vae)
        self.readouts = [Readout(label, layer, level) for level in noise_levels for layer in layers]

    @torch.no_grad()
    def read(self, pictures: Tensor, wanted: Sequence[Readout]) -> Iterator[tuple[Readout, Tensor]]:
        """See `Reader`; readouts come noise level by noise level."""
        latents = torch.cat([self.latents(part) for part in pictures.split(BATCH)])
        for level in dict.fromkeys(readout.noise_level for readout in wanted):
            asked = [readout for readout in wanted if readout.noise_level == level]
            parts = [self._layers(part, level, asked) for part in latents.split(BATCH)]
            for index, readout in enumerate(asked):
                yield readout, torch.cat([part[index] for part in parts])

    def latents(self, pictures: Tensor) -> Tensor:
        """Normalised latents, [n 3 h w] in [0, 1] -> [n z 1 h/8 w/8]."""
        prior = self._prior
        mean = self._encoder(prior_pictures(prior, pictures))[:, :, None].float()
        return (mean - prior.latents_mean) / prior.latents_std

    def _layers(self, latents: Tensor, level: float | None, asked: list[Readout]) -> list[Tensor]:
        prior, seen = self._prior, {}
        assert level is not None
        prior.noise_level = level
        hooks = [
            prior.transformer.blocks[layer].register_forward_hook(
                lambda _module, _inputs, output, layer=layer: seen.update({layer: output})
            )
            for layer in {readout.layer for readout in asked}
        ]
        prior.run_blocks((1 - level) * latents + level * prior.noise(latents, None))
        for hook in hooks:
            hook.remove()
        gh = latents.shape[-2] // prior.transformer.config.patch_size[-2]
        maps = [rearrange(seen[readout.layer], "n (gh gw) d -> n 1 d gh gw", gh=gh) for readout in asked]
        return [rearrange(pool(one, prior.grid), "n 1 d gh gw -> n (gh gw) d").float() for one in maps]


def prior_pictures(prior: LatentWorldSimulator, pictures: Tensor) -> Tensor:
    """Pictures [n 3 h w] at the size that the prior reads."""
    return resize(pictures, *prior.input_size)


class PriorSweep:
    """Any other prior: built anew for each layer and noise level.

    Args:
        config: The prior; its own default layer and noise level where none are listed.
        grid: Token grid.
        layers: Layers to read; empty takes the default.
        noise_levels: Noise levels to read; empty takes the default.
    """

    def __init__(
        self,
        config: PriorConfig,
        grid: tuple[int, int],
        layers: Sequence[int],
        noise_levels: Sequence[float],
    ) -> None:
        resolved = resolve(config)
        self._config, self._grid, self.label = config, grid, config.name
        self.fingerprint = make_prior(config, grid).fingerprint
        layers = layers or [resolved.layer or 0]
        noise_levels = noise_levels or [resolved.noise_level or 0.0]
        self.readouts = [Readout(self.label, layer, level) for level in noise_levels for layer in layers]

    @torch.no_grad()
    def read(self, pictures: Tensor, wanted: Sequence[Readout]) -> Iterator[tuple[Readout, Tensor]]:
        """See `Reader`."""
        for readout in wanted:
            config = replace(self._config, layer=readout.layer, noise_level=readout.noise_level)
            prior = make_prior(config, self._grid)
            maps = [prior(part[:, None, None])[:, 0].float() for part in pictures.split(BATCH)]
            yield readout, rearrange(torch.cat(maps), "n d gh gw -> n (gh gw) d")


def is_wan(config: PriorConfig) -> bool:
    """Whether a prior is one of the Wan family, of which one pass gives every layer."""
    return config.name in PRIORS and PRIORS[config.name].build == WAN


def prior_readers(
    config: PriorConfig,
    grid: tuple[int, int],
    layers: Sequence[int] | None,
    noise_levels: Sequence[float] | None,
) -> list[Reader]:
    """The prior over a sweep, and its untrained copy where its weights are trained ones.

    Args:
        config: The prior; frames are read one by one.
        grid: Token grid.
        layers: Layers; None takes all of a Wan, the default of another prior.
        noise_levels: Noise levels; None takes the default, as do priors that read clean frames.
    """
    resolved = resolve(config)
    if not is_wan(config):
        noisy = noise_levels if resolved.noise_level else None  # others read clean frames
        return [PriorSweep(config, grid, layers or [], noisy or [])]
    levels = [resolved.noise_level or 0.0] if noise_levels is None else list(noise_levels)
    chosen = list(range(depth(config))) if layers is None else list(layers)
    deep = replace(config, layer=max(chosen), engine="plain")
    readers: list[Reader] = [WanSweep(config.name, make_prior(deep, grid), chosen, levels)]
    if has_untrained_copy(config):
        readers.append(WanSweep(UNTRAINED, untrained_copy(deep, grid), chosen, levels))
    return readers


def depth(config: PriorConfig) -> int:
    """Number of blocks of a Wan."""
    return int(architecture(config)["transformer"]["num_layers"])


def architecture(config: PriorConfig) -> dict[str, dict[str, Any]]:
    """Constructor arguments of a Wan's `vae` and `transformer`, from its table entry or its checkpoint."""
    config = resolve(config)
    entry = PRIORS[config.name]
    if config.path is None:
        return entry.architecture or {}
    folder = locate(config, ["vae", "transformer"], entry.advice)
    parts = {name: json.loads((folder / name / "config.json").read_text()) for name in ("vae", "transformer")}
    return {
        name: {key: value for key, value in part.items() if not key.startswith("_")}
        for name, part in parts.items()
    }


def has_untrained_copy(config: PriorConfig) -> bool:
    """Whether a prior's weights are trained ones of which there can be an untrained copy."""
    return is_wan(config) and has_trained_weights(config)


def untrained_copy(config: PriorConfig, grid: tuple[int, int]) -> LatentWorldSimulator:
    """A Wan of the same architecture with the weights of a seed, autoencoder included.

    Raises:
        ValueError: If the prior is no Wan.
    """
    if not is_wan(config):
        raise ValueError(f"an untrained copy is built of Wan priors; got {config.name!r}")
    resolved = resolve(config)
    copy = LatentWorldSimulator.from_seed(replace(resolved, path=None), architecture(config), grid)
    return copy.eval().requires_grad_(False)


FORMAT = 1  # of the cache: goes up where a number would change
EVERY = 3  # of so many tokens one goes into the probes of depth and normals
LEAST_COVER = 0.5  # tokens that a thing must cover to be probed
POOL = (2, 2)  # grid to which views are pooled for the change of pose


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    Attributes:
        title: Heading of its column.
        sums: Key of its sums.
        statistic: From sums to the number.
        scale: Factor into the unit shown.
        higher: Whether more is better.
    """

    title: str
    sums: str
    statistic: Statistic = ratio_of_sums
    scale: float = 1.0
    higher: bool = True


METRICS: dict[str, Metric] = {
    "raw": Metric("correspondence", "raw"),
    "chance": Metric("its chance level", "chance"),
    "centred": Metric("centred", "centred"),
    "centred_chance": Metric("its chance level", "centred_chance"),
    "retrieval": Metric("retrieval", "retrieval"),
    "retrieval_chance": Metric("its chance level", "retrieval_chance"),
    "depth_r2": Metric("depth R2", "depth_squares", explained),
    "depth_cm": Metric("depth error (cm)", "depth_errors", scale=100, higher=False),
    "normal_r2": Metric("normal R2", "normal_squares", explained),
    "normal_deg": Metric("normal error (deg)", "normal_errors", scale=180 / math.pi, higher=False),
    "object_r2": Metric("object R2", "object_squares", explained),
    "object_cm": Metric("object error (cm)", "object_errors", scale=100, higher=False),
    "shift_r2": Metric("camera shift R2", "shift_squares", explained),
    "shift_cm": Metric("camera shift error (cm)", "shift_errors", scale=100, higher=False),
    "turn_r2": Metric("camera turn R2", "turn_squares", explained),
    "turn_deg": Metric("camera turn error (deg)", "turn_errors", scale=180 / math.pi, higher=False),
}
HEADLINE = ("centred", "retrieval", "depth_r2", "normal_r2", "object_r2", "shift_r2", "turn_r2")
"""Metrics on which a prior is held against its untrained copy, and of which there are heat maps."""

Sums = dict[str, np.ndarray]


def value(sums: Sums, name: str) -> Estimate:
    """A metric with its interval; nan where the scenes did not allow it."""
    metric = METRICS[name]
    return _scaled(estimate(sums[metric.sums], metric.statistic), metric.scale)


def gain(first: Sums, second: Sums, name: str) -> Estimate:
    """By how much the first is better than the second, scene by scene paired; positive is better."""
    metric = METRICS[name]
    apart = difference(first[metric.sums], second[metric.sums], metric.statistic)
    apart = _scaled(apart, metric.scale)
    return apart if metric.higher else Estimate(-apart.value, -apart.high, -apart.low)


def _scaled(number: Estimate, scale: float) -> Estimate:
    return Estimate(number.value * scale, number.low * scale, number.high * scale)


@dataclass(frozen=True)
class Setup:
    """How scenes are measured.

    Attributes:
        grid: Token grid (gh, gw).
        voxel: Side of a voxel of the correspondence score (m).
        radius: How far a retrieved token may lie from the point (m).
    """

    grid: tuple[int, int]
    voxel: float = 0.1
    radius: float = 0.1


def measure(
    features: Tensor, scenes: Sequence[Scene], geometry: Sequence[TokenGeometry], setup: Setup
) -> Sums:
    """All sums of one readout.

    Args:
        features: Tokens of all views of all scenes one after the other, [n t d].
        scenes: The scenes.
        geometry: Their tokens' geometry.
        setup: How.

    Returns:
        Key of `Metric.sums` -> float64 [scenes 2]; zeros where there was nothing to measure.
    """
    tokens = features.split([len(scene.views) for scene in scenes])
    scores = [
        correspondence(part, place, setup.voxel, setup.radius)
        for part, place in zip(tokens, geometry, strict=True)
    ]
    sums: Sums = {}
    for name in Correspondence.__dataclass_fields__:
        found = np.array([score.values()[name] for score in scores])
        known = np.isfinite(found)
        sums[name] = np.stack([np.where(known, found, 0.0), known.astype(float)], axis=1)
    sums |= _token_probes(tokens, geometry)
    sums |= _object_probe(tokens, scenes, geometry)
    sums |= _pose_probe(tokens, scenes, setup.grid)
    return sums


def _token_probes(tokens: Sequence[Tensor], geometry: Sequence[TokenGeometry]) -> Sums:
    """Depth and normal under a token, by one probe with four outputs."""
    data = []
    for part, place in zip(tokens, geometry, strict=True):
        known = place.valid & (place.normals.norm(dim=-1) > 0)
        targets = torch.cat([place.depth[..., None], place.normals], dim=-1)
        data.append(ProbeData(part[known][::EVERY], targets[known][::EVERY]))
    found = _probe(data)
    if found is None:
        return _nothing(len(tokens), "depth", "normal")
    sums = _zeros(len(tokens), "depth", "normal")
    sums["depth_squares"] = found.squares[:, 0]
    sums["normal_squares"] = found.squares[:, 1:].sum(axis=1)
    for index, (guess, scene) in enumerate(zip(found.predictions, data, strict=True)):
        off = (guess[:, 0] - scene.targets[:, 0]).abs()
        cosine = functional.cosine_similarity(guess[:, 1:], scene.targets[:, 1:], dim=-1)
        angle = cosine.clamp(-1, 1).arccos()
        sums["depth_errors"][index] = off.sum().item(), len(off)
        sums["normal_errors"][index] = angle.sum().item(), len(angle)
    return sums


def _object_probe(
    tokens: Sequence[Tensor], scenes: Sequence[Scene], geometry: Sequence[TokenGeometry]
) -> Sums:
    """Middle of a thing in the robot's frame, from the mean of the tokens that show it."""
    data = []
    for part, scene, place in zip(tokens, scenes, geometry, strict=True):
        seen = place.cover.sum(dim=-1) >= LEAST_COVER  # [n k]
        weight = place.cover / place.cover.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        means = weight.to(part) @ part  # [n k d]
        centres = torch.tensor([thing.centre for thing in scene.objects]).reshape(-1, 3).double()
        data.append(ProbeData(means[seen], centres.expand(len(part), -1, 3)[seen]))
    return _summed("object", _probe(data), len(tokens), slice(0, 3))


def _pose_probe(tokens: Sequence[Tensor], scenes: Sequence[Scene], grid: tuple[int, int]) -> Sums:
    """How the camera moved between two views one or two apart, from both views' pooled tokens."""
    data = []
    for part, scene in zip(tokens, scenes, strict=True):
        maps = rearrange(part, "n (gh gw) d -> n d gh gw", gh=grid[0])
        pooled = functional.adaptive_avg_pool2d(maps, POOL).flatten(1)
        count = len(part)
        pairs = [(i, j) for i in range(count) for j in range(count) if 0 < abs(i - j) <= 2]
        first, second = (torch.tensor(side, dtype=torch.long) for side in zip(*pairs, strict=True))
        poses = torch.from_numpy(scene.views.poses)
        both = torch.cat([pooled[first], pooled[second]], dim=-1)
        data.append(ProbeData(both, pose_change(poses[first], poses[second])))
    found = _probe(data)
    return _summed("shift", found, len(tokens), slice(0, 3)) | _summed(
        "turn", found, len(tokens), slice(3, 6)
    )


def _probe(data: list[ProbeData]) -> ProbeResult | None:
    """The probe's result; None where too few scenes have samples."""
    if sum(len(scene.features) > 0 for scene in data) < max(3, len(data)):
        return None
    return probe(data)


def _summed(name: str, found: ProbeResult | None, scenes: int, outputs: slice) -> Sums:
    sums = _zeros(scenes, name)
    if found is None:
        return sums
    sums[f"{name}_squares"] = found.squares[:, outputs].sum(axis=1)
    for index, error in enumerate(found.errors):
        lengths = error[:, outputs].norm(dim=-1)
        sums[f"{name}_errors"][index] = lengths.sum().item(), len(lengths)
    return sums


def _zeros(scenes: int, *names: str) -> Sums:
    return {f"{name}_{kind}": np.zeros((scenes, 2)) for name in names for kind in ("squares", "errors")}


_nothing = _zeros


def cache_key(**parts: object) -> str:
    """Hash over all that determines some numbers, 16 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_sums(path: Path) -> Sums | None:
    """Cached sums, or None."""
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return dict(stored)


def save_sums(path: Path, sums: Sums) -> None:
    """Keep sums; a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.savez(file, **sums)  # pyright: ignore[reportArgumentType]
    draft.rename(path)
