"""What frozen encoders make of scenes, computed once and kept: models that answer questions read that."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.analysis.measures import cache_key
from vega_policy.analysis.readouts import untrained_copy
from vega_policy.analysis.scenes import Scene
from vega_policy.backbones import make_backbone
from vega_policy.observation import resize
from vega_policy.parts import BackboneConfig, PriorConfig
from vega_policy.priors import make_prior, resolve

PICTURES = 16  # at once


@dataclass(frozen=True)
class Looker:
    """Looks at scenes with one encoder after the other.

    Args:
        scenes: The scenes.
        key: Names them.
        frame_size: Side of the frames in pixels.
        cache: Folder of what was seen before; None keeps nothing.
    """

    scenes: Sequence[Scene]
    key: str
    frame_size: int
    cache: Path | None = None

    def semantic(self, config: BackboneConfig) -> Tensor:
        """Output of a backbone's image encoder, [s v c gh gw].

        Raises:
            ValueError: If the image encoder learns: then its features cannot be computed once.
        """
        if not config.frozen_features:
            raise ValueError(
                "questions are answered on cached features; set backbone.freeze_image_encoder=true"
            )
        path = self._path(semantic=asdict(config))
        if path is not None and path.is_file():
            return _load(path)
        backbone = make_backbone(config, 1, len(self.scenes[0].views), self.frame_size)
        return self._look("semantic", lambda frames: backbone.encode(frames[None])[0], path)

    def prior(self, config: PriorConfig, grid: tuple[int, int], untrained: bool = False) -> Tensor:
        """Output of a prior, or of its untrained copy, [s v d gh gw]."""
        prior = (
            untrained_copy(replace(resolve(config), engine="plain"), grid)
            if untrained
            else make_prior(config, grid)
        )
        identity = {"weights": prior.fingerprint, "layer": prior.layer, "noise_level": prior.noise_level}
        path = self._path(**identity, seed=config.seed, input_size=config.input_size, untrained=untrained)
        if path is not None and path.is_file():
            return _load(path)
        label = f"untrained {config.name}" if untrained else config.name
        return self._look(label, lambda frames: prior(frames[:, None, None])[:, 0].float(), path)

    def _path(self, **identity: object) -> Path | None:
        if self.cache is None:
            return None
        return self.cache / f"{cache_key(scenes=self.key, frame_size=self.frame_size, **identity)}.npy"

    @torch.no_grad()
    def _look(self, label: str, read: Callable[[Tensor], Tensor], path: Path | None) -> Tensor:
        views = len(self.scenes[0].views)
        frames = np.concatenate([scene.views.frames for scene in self.scenes])
        maps = []
        for start in tqdm(range(0, len(frames), PICTURES), f"Looking: {label}", unit="batch"):
            part = torch.from_numpy(frames[start : start + PICTURES]).permute(0, 3, 1, 2).float() / 255
            maps.append(read(resize(part, self.frame_size, self.frame_size)))
        features = torch.cat(maps).unflatten(0, (-1, views))
        if path is not None:
            _save(path, features)
        return features


def _load(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def _save(path: Path, features: Tensor) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.save(file, features.numpy())
    draft.rename(path)
