"""Frozen features of scenes and moments: extractors for the prior and its baselines, and a cache on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from hydra.utils import get_method
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vega_policy import resource
from vega_policy.analysis import BASELINES, ProbeSettings
from vega_policy.backbones import make_backbone
from vega_policy.backbones.compact import STRIDE, ImageEncoder
from vega_policy.data.scenes import Demonstration, Scene, load_demonstrations
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.model.layers import grid_positions
from vega_policy.model.observation import EncodedText, resize
from vega_policy.priors import PRIORS, WAN, has_trained_weights, make_prior, resolve
from vega_policy.priors.base import fingerprint_weights, locate, pool
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import FrameEncoder
from vega_policy.run_dir import atomic_file, read_json

BATCH = 16  # frames encoded at once
MOMENTS = 8  # of a demonstration, with all cameras, encoded at once
CACHE_VERSION = 1  # raised when a change of the code changes cached numbers
UNTRAINED = "untrained copy"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FeatureSpec:
    """Features of one encoder; those of a prior at one layer and noise level."""

    encoder: str
    layer: int | None = None
    noise_level: float | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.encoder
        return f"{self.encoder}, layer {self.layer}, noise {self.noise_level:g}"


class FeatureExtractor(Protocol):
    """A frozen encoder of frames."""

    name: str
    fingerprint: str  # identifies the weights
    specs: list[FeatureSpec]  # all features that it offers

    def extract(self, frames: Tensor, specs: Sequence[FeatureSpec]) -> Iterator[tuple[FeatureSpec, Tensor]]:
        """Yield the tokens [n t d] of frames [n 3 h w] in [0, 1] for each of `specs`, in any order."""
        ...


class EncoderFeatures:
    """Features of a function from frames [n 3 h w] to maps [n d gh gw], without layers or noise."""

    def __init__(self, name: str, fingerprint: str, encode: Callable[[Tensor], Tensor]) -> None:
        self.name, self.fingerprint, self.specs = name, fingerprint, [FeatureSpec(name)]
        self._encode = encode

    @torch.no_grad()
    def extract(self, frames: Tensor, specs: Sequence[FeatureSpec]) -> Iterator[tuple[FeatureSpec, Tensor]]:
        """Yield tokens as `FeatureExtractor.extract`."""
        maps = torch.cat([self._encode(part) for part in frames.split(BATCH)])
        for spec in specs:
            yield spec, _to_tokens(maps)


class WanFeatures:
    """Features of Wan at many layers and noise levels: one VAE pass, then one pass per noise level."""

    def __init__(
        self, name: str, prior: LatentWorldSimulator, layers: Sequence[int], noise_levels: Sequence[float]
    ) -> None:
        """`prior` is built for the deepest of `layers`, with the plain engine."""
        self.name, self.fingerprint = name, f"{prior.fingerprint}-{prior.seed}"
        self._prior, self._encoder = prior, FrameEncoder(prior.vae)
        self.specs = [FeatureSpec(name, layer, level) for level in noise_levels for layer in layers]

    @torch.no_grad()
    def extract(self, frames: Tensor, specs: Sequence[FeatureSpec]) -> Iterator[tuple[FeatureSpec, Tensor]]:
        """Yield tokens as `FeatureExtractor.extract`, noise level by noise level."""
        latents = torch.cat([self.encode_latents(part) for part in frames.split(BATCH)])
        for level in dict.fromkeys(spec.noise_level for spec in specs):
            chosen = [spec for spec in specs if spec.noise_level == level]
            self._prior.noise_level = level or 0.0
            layers = {spec.layer for spec in chosen}
            parts = [self._run_blocks(part, layers) for part in latents.split(BATCH)]
            for spec in chosen:
                yield spec, torch.cat([part[spec.layer] for part in parts])

    def encode_latents(self, frames: Tensor) -> Tensor:
        """Return normalised latents, [n 3 h w] in [0, 1] -> [n z 1 h/8 w/8]."""
        prior = self._prior
        mean = self._encoder(resize(frames, *prior.input_size))[:, :, None].float()
        return (mean - prior.latents_mean) / prior.latents_std

    def _run_blocks(self, latents: Tensor, layers: set[int | None]) -> dict[int | None, Tensor]:
        """Return the tokens [n t d] after each of `layers`."""
        prior, found = self._prior, {}
        noisy = prior.add_noise(latents, None)
        tokens, conditions = prior.embed(noisy)
        for layer, block in enumerate(prior.transformer.blocks):
            tokens = block(tokens, *conditions)
            if layer in layers:
                found[layer] = _to_tokens(pool(prior.to_grid(tokens, noisy), prior.grid)[:, 0])
        return found


class PriorFeatures:
    """Features of any other prior, which is built again for each layer and noise level.

    Without `layers` or `noise_levels` they are those of the prior's defaults.
    """

    def __init__(
        self,
        config: PriorConfig,
        grid: tuple[int, int],
        layers: Sequence[int] | None,
        noise_levels: Sequence[float] | None,
    ) -> None:
        resolved = resolve(config)
        self._config, self._grid, self.name = config, grid, config.name
        self.fingerprint = make_prior(config, grid).fingerprint
        layers = layers or list(resolved.layers) or [0]
        noise_levels = noise_levels or [resolved.noise_level or 0.0]
        self.specs = [FeatureSpec(self.name, layer, level) for level in noise_levels for layer in layers]

    @torch.no_grad()
    def extract(self, frames: Tensor, specs: Sequence[FeatureSpec]) -> Iterator[tuple[FeatureSpec, Tensor]]:
        """Yield tokens as `FeatureExtractor.extract`."""
        for spec in specs:
            config = replace(self._config, layer=spec.layer, noise_level=spec.noise_level)
            prior = make_prior(config, self._grid)
            maps = [prior(part[:, None, None])[:, 0].float() for part in frames.split(BATCH)]
            yield spec, _to_tokens(torch.cat(maps))


def _to_tokens(maps: Tensor) -> Tensor:
    return rearrange(maps, "n d gh gw -> n (gh gw) d").float()


def prior_extractors(
    config: PriorConfig,
    grid: tuple[int, int],
    layers: Sequence[int] | None,
    noise_levels: Sequence[float] | None,
) -> list[FeatureExtractor]:
    """Return the prior's extractor, and that of its untrained copy if its weights are trained.

    `layers=None` takes all of a Wan and the default of another prior; `noise_levels=None` takes the default.
    """
    default = resolve(config).noise_level or 0.0
    if not is_wan(config):
        return [PriorFeatures(config, grid, layers, noise_levels if default else None)]
    if layers is None:
        layers = range(int(wan_architecture(config)["transformer"]["num_layers"]))
    levels = [default] if noise_levels is None else noise_levels
    deepest = replace(config, layer=max(layers), engine="plain")
    extractors: list[FeatureExtractor] = [WanFeatures(config.name, make_prior(deepest, grid), layers, levels)]
    if has_untrained_copy(config):
        extractors.append(WanFeatures(UNTRAINED, build_untrained_copy(deepest, grid), layers, levels))
    return extractors


def is_wan(config: PriorConfig) -> bool:
    """Return whether a prior is a Wan, of which one pass gives every layer."""
    return config.name in PRIORS and PRIORS[config.name].build == WAN


def wan_architecture(config: PriorConfig) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments of a Wan's `vae` and `transformer`, from its entry or checkpoint."""
    config = resolve(config)
    entry = PRIORS[config.name]
    if config.path is None:
        return entry.architecture or {}
    folder = locate(config, ["vae", "transformer"], entry.advice)
    parts = {name: read_json(folder / name / "config.json") for name in ("vae", "transformer")}
    return {
        name: {key: value for key, value in part.items() if not key.startswith("_")}
        for name, part in parts.items()
    }


def has_untrained_copy(config: PriorConfig) -> bool:
    """Return whether a prior is a Wan with trained weights."""
    return is_wan(config) and has_trained_weights(config)


def build_untrained_copy(config: PriorConfig, grid: tuple[int, int]) -> LatentWorldSimulator:
    """Build a Wan of the same architecture with weights from a seed, autoencoder included.

    Raises:
        ValueError: If the prior is not a Wan.
    """
    if not is_wan(config):
        raise ValueError(f"expected a Wan prior to build an untrained copy of; got {config.name!r}")
    resolved = replace(resolve(config), path=None)
    copy = LatentWorldSimulator.from_seed(resolved, wan_architecture(config), grid)
    return copy.eval().requires_grad_(False)


def baseline_extractors(
    names: Sequence[str],
    prior: FeatureExtractor,
    backbone: BackboneConfig,
    grid: tuple[int, int],
    seed: int = 0,
) -> list[FeatureExtractor]:
    """Return the extractors of some `BASELINES` that the prior is compared with.

    `vae` is the autoencoder of a Wan prior and left out for others, `semantic` the backbone's image encoder,
    `random` a projection of pixels drawn from `seed`.

    Raises:
        ValueError: If a name is unknown.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(
            f"sweep.baselines: expected entries of {', '.join(BASELINES)}; got {', '.join(unknown)}"
        )
    return [
        _baseline(name, prior, backbone, grid, seed)
        for name in names
        if name != "vae" or isinstance(prior, WanFeatures)
    ]


def _baseline(
    name: str, prior: FeatureExtractor, backbone: BackboneConfig, grid: tuple[int, int], seed: int
) -> EncoderFeatures:
    if name == "semantic":
        encoder = ImageEncoder(backbone.image_encoder, backbone.pretrained, frozen=True)
        identity = f"{backbone.image_encoder}-{fingerprint_weights(encoder.state_dict())}"
        return EncoderFeatures(name, identity, partial(_encode_resized, encoder, grid))
    if name == "vae":
        assert isinstance(prior, WanFeatures)
        latents = prior.encode_latents
        return EncoderFeatures(name, prior.fingerprint, lambda x: _unfold(latents(x)[:, :, 0], grid))
    if name == "random":
        random = make_prior(PriorConfig(name="random", seed=seed), grid)
        return EncoderFeatures(name, random.fingerprint, lambda x: random(x[:, None, None])[:, 0])
    if name == "pixels":  # colours of 4x4 places per cell, [n 48 gh gw]
        shape = (4 * grid[0], 4 * grid[1])
        return EncoderFeatures(
            name, "4x4", lambda x: _unfold(functional.adaptive_avg_pool2d(x - 0.5, shape), grid)
        )
    places = rearrange(grid_positions(*grid, 64), "(gh gw) d -> d gh gw", gh=grid[0])
    return EncoderFeatures(name, "64", lambda x: places.expand(len(x), -1, -1, -1))


def _encode_resized(encoder: ImageEncoder, grid: tuple[int, int], frames: Tensor) -> Tensor:
    maps = encoder(resize(frames, grid[0] * STRIDE, grid[1] * STRIDE))
    return maps if maps.shape[-2:] == grid else functional.adaptive_avg_pool2d(maps, grid)


def _unfold(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stack all values of a cell if the grid divides the map, else average them."""
    rows, columns = maps.shape[-2] // grid[0], maps.shape[-1] // grid[1]
    if maps.shape[-2:] != (rows * grid[0], columns * grid[1]):
        return functional.adaptive_avg_pool2d(maps, grid)
    return rearrange(maps, "n d (gh r) (gw c) -> n (d r c) gh gw", r=rows, c=columns)


def write_moments(settings: ProbeSettings) -> tuple[str, list[Path]]:
    """Render the moments of demonstrations, or find them in the cache; return a hash of them, and files.

    Raises:
        FileNotFoundError: If a suite has no file of demonstrations.
    """
    future = settings.future
    shipped = resource("assets") / "demonstrations" / "libero"
    sources = [Path(future.states or shipped) / f"{suite}.safetensors" for suite in future.suites]
    for path in sources:
        if not path.is_file():
            raise FileNotFoundError(
                f"future.states: {path} does not exist; collect it with vega-collect format=states, or "
                "choose other future.suites"
            )
    spec = {name: getattr(future, name) for name in ("tasks", "episodes_per_task", "every")}
    spec |= {"ahead": future.horizons[-1], "frame_size": settings.frame_size}
    write: Callable[..., list[Path]] = get_method(settings.demonstration_writer)
    keys, files = [], []
    for path in sources:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        keys.append(cache_key(states=digest, rendering=settings.scenes.rendering, **spec))
        folder = Path(settings.cache_root) / f"moments-{keys[-1]}"
        more = {"file": str(path), "rendering": settings.scenes.rendering, "processes": settings.processes}
        files += write(folder, **spec, **more)
    return cache_key(files=keys), files


@dataclass(frozen=True)
class MomentEncoder:
    """A frozen encoder of a demonstration's moments."""

    name: str
    identity: dict[str, Any]  # determines its features
    encode: Callable[[Tensor, str], Tensor]  # frames [n v 3 h w] in [0, 1], instruction -> maps [n v d gh gw]


@torch.no_grad()
def encode_moments(
    encoder: MomentEncoder, path: Path, key: str, grid: int, cache: Path
) -> tuple[list[Demonstration], list[Tensor]]:
    """Return the demonstrations of a file and their features, averaged over a grid, [n v grid*grid d] each.

    `key` identifies the file. The folder `cache` holds features that were computed before.
    """
    demonstrations = load_demonstrations(path)
    stored = cache / f"{cache_key(moments=key, file=path.name, grid=grid, **encoder.identity)}.npy"
    if not stored.is_file():
        parts = []
        for one in demonstrations:
            for frames in np.split(one.frames, range(MOMENTS, len(one.frames), MOMENTS)):
                floats = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
                maps = pool(encoder.encode(floats, one.instruction).float(), (grid, grid))
                parts.append(rearrange(maps, "n v d gh gw -> n v (gh gw) d"))
        with atomic_file(stored) as draft, draft.open("wb") as file:
            np.save(file, torch.cat(parts).numpy())
    features = torch.from_numpy(np.load(stored))
    return demonstrations, list(features.split([len(one.steps) for one in demonstrations]))


def moment_encoders(settings: ProbeSettings) -> Iterator[MomentEncoder]:
    """Yield the semantic encoder, the prior with each prompt, its untrained copy, and its frames alone.

    A prior with `clip=future` is read with `clip=frame`, too: its own weights at its layers, and those of
    `future.frame_path` at their default layer.
    """
    grid, prior, future = settings.grid, settings.prior, settings.future
    size = settings.frame_size
    semantic = make_backbone(settings.backbone, 1, 1, size)
    identity = {"semantic": asdict(settings.backbone), "size": size}
    yield MomentEncoder("semantic", identity, lambda frames, _: semantic.encode(frames))
    configs = {prior.clip: prior}
    if prior.clip == "future":
        configs = {f"future, prompt {prompt}": replace(prior, prompt=prompt) for prompt in future.prompts}
        configs["frame, same weights"] = replace(prior, clip="frame", noise_level=None, prompt="empty")
    if prior.clip == "future" and future.frame_path is not None:
        own = replace(configs["frame, same weights"], path=future.frame_path, layer=None)
        configs[f"frame, {Path(future.frame_path).name}"] = own
    for name, config in configs.items():
        yield _moment_encoder(name, config, make_prior(config, grid))
    if has_untrained_copy(prior):
        copied = replace(prior, prompt="empty")
        yield _moment_encoder(UNTRAINED, copied, build_untrained_copy(copied, grid))


def _moment_encoder(name: str, config: PriorConfig, prior: Any) -> MomentEncoder:
    def encode(frames: Tensor, instruction: str) -> Tensor:
        words = {"instruction": [instruction] * len(frames)} if config.prompt == "instruction" else {}
        return prior(frames[:, :, None], **words)

    identity = asdict(resolve(config)) | {"fingerprint": prior.fingerprint, "untrained": prior.untrained}
    return MomentEncoder(name, identity | {"size": prior.input_size}, encode)


def frames_of(scenes: Sequence[Scene]) -> Tensor:
    """Return all views of all scenes, [n 3 h w] in [0, 1]."""
    return frames_to_float(np.concatenate([scene.views.frames for scene in scenes]))


def frames_to_float(frames: np.ndarray) -> Tensor:
    """Convert frames from uint8 [n h w 3] to float [n 3 h w] in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device without waiting for it; one that is there is returned."""
    is_copied = device.type == "cuda" and not value.is_cuda
    return (value.pin_memory() if is_copied else value).to(device, non_blocking=True)


@dataclass(frozen=True)
class Features:
    """Outputs of the frozen encoders for s scenes."""

    semantic: Tensor  # of the backbone's image encoder, [s v c gh gw]
    prior: Tensor | None  # [s v d gh gw]

    def mean(self) -> "Features":
        """Replace every scene's features by their mean over scenes (blind ablation)."""
        semantic, prior = (
            None if part is None else part.mean(0, keepdim=True).expand_as(part)
            for part in (self.semantic, self.prior)
        )
        assert semantic is not None
        return Features(semantic, prior)

    def __getitem__(self, scenes: Tensor) -> "Features":
        """Select scenes."""
        return Features(self.semantic[scenes], None if self.prior is None else self.prior[scenes])


class TextCache:
    """Output of a frozen text encoder for many phrases, computed once and kept on the encoder's device."""

    def __init__(self, encoder: Callable[[list[str]], EncodedText], phrases: Sequence[str]) -> None:
        unique = list(dict.fromkeys(phrases))
        self._rows = {phrase: row for row, phrase in enumerate(unique)}
        with torch.no_grad():
            self._words, self._is_word = encoder(unique)
        self._lengths = self._is_word.sum(dim=1).tolist()

    def __contains__(self, phrase: str) -> bool:
        """Return whether a phrase was encoded."""
        return phrase in self._rows

    def __call__(self, phrases: Sequence[str]) -> EncodedText:
        """Return words [b l c] and their mask [b l], l those of the longest of these phrases."""
        rows = [self._rows[phrase] for phrase in phrases]
        index = to_device(torch.tensor(rows), self._words.device)
        length = max(self._lengths[row] for row in rows)
        return self._words[:, :length][index], self._is_word[:, :length][index]


def cache_key(**identity: object) -> str:
    """Return a hash over all that determines cached numbers, 16 hexadecimal digits."""
    text = json.dumps({"format": CACHE_VERSION, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class FeatureCache:
    """Frozen encoders' features of scenes, computed once and kept on disk."""

    scenes: Sequence[Scene]
    key: str  # hash that identifies the scenes
    frame_size: int  # pixels
    folder: Path | None = None  # None keeps nothing
    device: torch.device = CPU  # where features are computed and returned

    @property
    def device_key(self) -> dict[str, str]:
        """Part of a cache key: the device, whose rounding differs from the CPU's.

        Empty on the CPU, whose files keep their names.
        """
        return {} if self.device.type == "cpu" else {"device": self.device.type}

    def semantic(self, config: BackboneConfig) -> Tensor:
        """Return the output of a backbone's image encoder, [s v c gh gw].

        Raises:
            ValueError: If the image encoder is trained: its features cannot be computed once.
        """
        if not config.frozen_features:
            raise ValueError(
                "questions are answered from cached features; set backbone.freeze_image_encoder=true"
            )

        def build() -> Callable[[Tensor], Tensor]:
            backbone = make_backbone(config, 1, len(self.scenes[0].views), self.frame_size).to(self.device)
            return lambda frames: backbone.encode(frames[None])[0]

        return self._load_or_encode("semantic", build, semantic=asdict(config))

    def prior(self, config: PriorConfig, grid: tuple[int, int], untrained: bool = False) -> Tensor:
        """Return the output of a prior, or of its untrained copy, [s v d gh gw]."""
        prior = build_untrained_copy(resolve(config), grid) if untrained else make_prior(config, grid)
        clip = {}
        if config.clip != "frame":
            clip = {name: getattr(config, name) for name in ("clip", "future_slots", "slot_pool", "prompt")}

        def build() -> Callable[[Tensor], Tensor]:
            if self.device.type == "cuda" and is_wan(config) and config.engine == "auto":
                prior.use_engine("plain")  # frames are encoded once: compiling would take longer
            prior.to(self.device)
            return lambda frames: prior(frames[:, None, None])[:, 0].float()

        return self._load_or_encode(
            f"untrained {config.name}" if untrained else config.name,
            build,
            weights=prior.fingerprint,
            layer=prior.layer,
            noise_level=prior.noise_level,
            seed=config.seed,
            input_size=config.input_size,
            untrained=untrained,
            **clip,
        )

    @torch.no_grad()
    def _load_or_encode(
        self, label: str, build: Callable[[], Callable[[Tensor], Tensor]], **identity: object
    ) -> Tensor:
        """Return cached features, or those of the encoder that `build` makes."""
        path = None
        if self.folder is not None:
            key = cache_key(scenes=self.key, frame_size=self.frame_size, **identity, **self.device_key)
            path = self.folder / f"{key}.npy"
            if path.is_file():
                return torch.from_numpy(np.load(path)).to(self.device)
        encode, maps = build(), []
        frames = np.concatenate([scene.views.frames for scene in self.scenes])
        for start in tqdm(range(0, len(frames), BATCH), f"Encoding: {label}", unit="batch"):
            part = frames_to_float(frames[start : start + BATCH]).to(self.device)
            maps.append(encode(resize(part, self.frame_size, self.frame_size)))
        # In the memory format of cached ones: their sums, which name cached models, are then the same bits.
        features = torch.cat(maps).unflatten(0, (-1, len(self.scenes[0].views))).contiguous()
        if path is not None:
            with atomic_file(path) as draft, draft.open("wb") as file:
                np.save(file, features.cpu().numpy())
        return features
