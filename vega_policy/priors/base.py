"""Base class of priors: loading of networks, frame size, clips, noise, and pooling to the token grid."""

from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize
from vega_policy.priors import PriorEntry
from vega_policy.priors.weights import check_class, fingerprint_files, load_network, locate


class BasePrior(nn.Module):
    """A frozen network that encodes frames; a subclass names its `networks` and implements `encode_clips`.

    Attributes:
        networks: Sub-folder of a checkpoint in the hub's layout -> class of the network in it.
        other_folders: Sub-folders that `load_inputs` reads.
        width: Width d of a feature.
        untrained: Whether the weights come from a seed.
    """

    networks: ClassVar[dict[str, type[Any]]] = {}
    other_folders: ClassVar[tuple[str, ...]] = ()
    width: int
    untrained = False

    def __init__(
        self,
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
        stride: int,
        cell: int | None = None,
    ) -> None:
        """Frames are resized to `cell` pixels a token of the backbone (None: the prior's own `stride`)."""
        super().__init__()
        self.layer, self.noise_level, self.seed = config.layer, config.noise_level or 0.0, config.seed
        self.clip, self.clip_frames, self.grid, self.fingerprint = (
            config.clip,
            config.clip_frames,
            grid,
            fingerprint,
        )
        self.input_size = choose_input_size(config, grid, stride, cell or stride)
        self._fixed_noise: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load a checkpoint in the hub's layout from a local folder or the hub.

        Raises:
            FileNotFoundError: If files are missing; names them and the way to get them.
            ValueError: If the folder holds another architecture or the layer does not exist.
        """
        folder = locate(config, [*cls.networks, *cls.other_folders], entry.advice)
        for part, network in cls.networks.items():
            check_class(folder / part, network.__name__)
        parts = {part: load_network(network, folder / part, config) for part, network in cls.networks.items()}
        parts |= cls.load_inputs(config, folder, parts)
        return cls(parts, config, grid, fingerprint_files(folder, cls.networks))  # pyright: ignore

    @classmethod
    def load_inputs(cls, config: PriorConfig, folder: Any, parts: dict[str, Any]) -> dict[str, Any]:
        """Load what the networks take beside frames, such as the empty prompt."""
        return {}

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features on the prior's own grid, clips [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        t' = t = 1 for `clip=frame`; t' = t for `clip=views`; for `clip=history` the last of t' is used.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode frames [b v t 3 h w] in [0, 1] -> [b v d gh gw] in the prior's floating-point type.

        Fresh noise comes from `generator` (on the CPU); None takes fixed noise, the same for every clip.

        Raises:
            ValueError: If `clip=history` and t is not `clip_frames`.
        """
        if self.clip == "history" and frames.shape[2] != self.clip_frames:
            raise ValueError(
                f"prior.clip=history expects {self.clip_frames} frames a camera; got {frames.shape[2]}. "
                "Train with dataset.cache=none; in a rollout call select_action at every control step, which "
                "keeps past frames."
            )
        batch, views = frames.shape[:2]
        clips = resize(as_clips(frames, self.clip), *self.input_size)
        with torch.autocast(frames.device.type, enabled=False):  # the trainer's type does not apply here
            tokens = self.encode_clips(clips, generator)
            tokens = tokens if self.clip == "views" else tokens[:, -1:]
            return pool(tokens.reshape(batch, views, *tokens.shape[2:]), self.grid)

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return standard normal noise of a tensor's shape, drawn on the CPU in float32.

        Without a generator it is one seeded draw a shape, shared by all clips of the batch.
        """
        if generator is not None:
            return torch.randn(like.shape, generator=generator).to(like)
        shape = tuple(like.shape[1:])
        if shape not in self._fixed_noise:
            self._fixed_noise[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        self._fixed_noise[shape] = self._fixed_noise[shape].to(like)
        return self._fixed_noise[shape]

    def add_noise(self, latent: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the point (1 - t) latent + t noise of the straight path, t the noise level."""
        return (1 - self.noise_level) * latent + self.noise_level * self.noise(latent, generator)


def pool(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average tokens over the cells of a grid, [b v d h w] -> [b v d gh gw]."""
    if tokens.shape[-2:] == grid:
        return tokens
    pooled = functional.adaptive_avg_pool2d(tokens.flatten(0, 1).float(), grid)
    return pooled.to(tokens.dtype).unflatten(0, tokens.shape[:2])


def as_clips(frames: Tensor, clip: str) -> Tensor:
    """Arrange frames as the videos that a prior encodes, [b v t 3 h w] -> [n t' 3 h w].

    `frame` takes the last frame of each view alone, `history` each view's frames in time, `views` the last
    frames of all views as one video.
    """
    if clip == "views":
        return frames[:, :, -1]
    last = frames if clip == "history" else frames[:, :, -1:]
    return rearrange(last, "b v t c h w -> (b v) t c h w")


def choose_input_size(config: PriorConfig, grid: tuple[int, int], stride: int, cell: int) -> tuple[int, int]:
    """Return height and width of the prior's frames: `input_size`, or `cell` pixels a token of the backbone.

    Raises:
        ValueError: If `input_size` is no multiple of the prior's stride, or gives fewer tokens than the grid.
    """
    if config.input_size is None:
        return grid[0] * cell, grid[1] * cell
    size = config.input_size
    if size % stride:
        raise ValueError(f"prior.input_size must be a multiple of {stride}; got {size}.")
    if size // stride < max(grid):
        raise ValueError(
            f"prior.input_size={size} gives {config.name!r} {size // stride}x{size // stride} tokens, which "
            f"cannot be pooled to the backbone's {grid[0]}x{grid[1]}. Take at least {max(grid) * stride}, or "
            "null."
        )
    return size, size


def check_layer(config: PriorConfig, count: int, what: str = "blocks") -> int:
    """Return the configured layer, an index below `count`; refuse others."""
    if config.layer is None or not 0 <= config.layer < count:
        known = "the single layer 0" if count == 1 else f"{what} 0 to {count - 1}"
        raise ValueError(f"prior.layer: {config.name!r} has {known}; got {config.layer}.")
    return config.layer


def refuse_noise(config: PriorConfig) -> None:
    """Refuse a noise level where no noise is added."""
    if config.noise_level:
        raise ValueError(
            f"prior.noise_level: {config.name!r} encodes clean frames; leave it null (got "
            f"{config.noise_level})."
        )


def drop_modules(network: Any, *names: str) -> None:
    """Replace modules behind the layer that is read by None, so that they take no memory and cannot run."""
    for name in names:
        setattr(network, name, None)
