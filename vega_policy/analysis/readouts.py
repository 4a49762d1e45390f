"""What is measured: features of frozen readers, for every layer and noise level of a sweep.

A reader turns pictures into tokens on a common grid. The prior and its untrained copy are read at each layer
and noise level; beside them stand the semantic encoder, the prior's own autoencoder, a random projection, raw
pixels, and the place of a token in the picture, which alone says much about depth.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from vega_policy.observation import resize
from vega_policy.parts import PriorConfig
from vega_policy.priors import PRIORS, has_trained_weights, make_prior, resolve
from vega_policy.priors.wan import LatentWorldSimulator, seeded
from vega_policy.priors.wan_frame import FrameEncoder
from vega_policy.priors.weights import locate, way_out

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
        prior.read_video((1 - level) * latents + level * prior.noise(latents, None))
        for hook in hooks:
            hook.remove()
        gh = latents.shape[-2] // prior.transformer.config.patch_size[-2]
        maps = [rearrange(seen[readout.layer], "n (gh gw) d -> n 1 d gh gw", gh=gh) for readout in asked]
        return [rearrange(prior.pooled(one), "n 1 d gh gw -> n (gh gw) d").float() for one in maps]


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
    return config.name in PRIORS and PRIORS[config.name].build == "vega_policy.priors.wan:load"


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
    folder = locate(config.path, config.revision, ["vae", "transformer"], way_out(entry))
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
    return seeded(replace(resolved, path=None), architecture(config), grid).eval().requires_grad_(False)
