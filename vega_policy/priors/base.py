"""What priors that read pictures or clips share: size, clips, noise, and the way to the backbone's grid."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize


def check_layer(config: PriorConfig, count: int, what: str = "blocks") -> int:
    """The layer to be read, an index into what a network has.

    Args:
        config: Resolved prior config.
        count: Number of read-outs.
        what: What they are, for the message.

    Raises:
        ValueError: If the network has no such layer.
    """
    if config.layer is None or not 0 <= config.layer < count:
        listed = "the single layer 0" if count == 1 else f"{what} 0 to {count - 1}"
        raise ValueError(f"prior.layer: {config.name!r} has {listed}; got {config.layer}.")
    return config.layer


def check_no_noise(config: PriorConfig) -> None:
    """Refuse a noise level where no noise is added.

    Raises:
        ValueError: If the noise level is above 0.
    """
    if config.noise_level:
        raise ValueError(
            f"prior.noise_level: {config.name!r} reads clean frames; leave it null (got "
            f"{config.noise_level})."
        )


def fitting_size(
    config: PriorConfig, grid: tuple[int, int], stride: int, cell: int | None = None
) -> tuple[int, int]:
    """Height and width to which frames are resized, so that the prior has at least the backbone's tokens.

    Args:
        config: Resolved prior config; `input_size` overrides the fitting size.
        grid: Token grid (gh, gw) of the backbone.
        stride: Pixels from one token of the prior to the next.
        cell: Pixels a token of the backbone; None takes `stride`, so that the prior's tokens are the grid's.

    Raises:
        ValueError: If `input_size` is no multiple of the stride, or gives fewer tokens than the grid has.
    """
    if config.input_size is None:
        return grid[0] * (cell or stride), grid[1] * (cell or stride)
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


class PriorReader(nn.Module):
    """A frozen network that is read as features of frames; the network's own part is `read_clips`.

    Args:
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        size: Height and width in pixels to which frames are resized.
        fingerprint: Hash that names the weights.
    """

    width: int
    untrained = False

    def __init__(
        self, config: PriorConfig, grid: tuple[int, int], size: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__()
        self.layer, self.noise_level, self.seed = config.layer, config.noise_level or 0.0, config.seed
        self.clip, self.grid, self.input_size, self.fingerprint = config.clip, grid, size, fingerprint
        self.clip_frames = config.clip_frames
        self._fixed: dict[tuple[int, ...], Tensor] = {}

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features on the prior's own grid, clips [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        t' = t = 1 for single pictures; for `clip=views` t' = t; for `clip=history` the last of t' is read.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Read frames.

        Args:
            frames: Frames [b v t 3 h w] in [0, 1].
            generator: CPU generator of fresh noise; None takes the fixed noise, the same for every clip.

        Returns:
            Features [b v d gh gw] in the prior's own floating-point type.

        Raises:
            ValueError: If `clip=history` and there are not as many frames as it reads.
        """
        if self.clip == "history" and frames.shape[2] != self.clip_frames:
            raise ValueError(
                f"prior.clip=history reads {self.clip_frames} frames of each camera; got {frames.shape[2]}. "
                "Train with dataset.cache=none; in a rollout call select_action at every control step, which "
                "remembers frames."
            )
        batch, views = frames.shape[:2]
        clips = resize(as_clips(frames, self.clip), *self.input_size)
        with torch.autocast(frames.device.type, enabled=False):  # frozen features ignore the trainer's type
            tokens = self.read_clips(clips, generator)
            tokens = tokens if self.clip == "views" else tokens[:, -1:]
            return self.pooled(tokens.reshape(batch, views, *tokens.shape[2:]))

    def pooled(self, tokens: Tensor) -> Tensor:
        """Adaptive average over the cells of the backbone's grid, [b v d h w] -> [b v d gh gw]."""
        if tokens.shape[-2:] == self.grid:
            return tokens
        pooled = functional.adaptive_avg_pool2d(tokens.flatten(0, 1).float(), self.grid)
        return pooled.to(tokens.dtype).unflatten(0, tokens.shape[:2])

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Standard normal noise of a tensor's shape, drawn on the CPU in float32.

        Without a generator it is one seeded draw per shape, shared by all clips of the batch.
        """
        if generator is not None:
            return torch.randn(like.shape, generator=generator).to(like)
        shape = tuple(like.shape[1:])
        if shape not in self._fixed:
            self._fixed[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        self._fixed[shape] = self._fixed[shape].to(like)
        return self._fixed[shape]


def as_clips(frames: Tensor, clip: str) -> Tensor:
    """Arrange frames as the videos a prior reads, [b v t 3 h w] -> [n t' 3 h w].

    Args:
        frames: Frames of all views and times.
        clip: `frame` (each view's last frame alone), `history` (each view's frames in time) or `views` (the
            last frames of all views as one video).
    """
    if clip == "views":
        return frames[:, :, -1]
    last = frames if clip == "history" else frames[:, :, -1:]
    return rearrange(last, "b v t c h w -> (b v) t c h w")


def drop_rest(network: Any, *names: str) -> None:
    """Replace modules behind the read-out by nothing, so that they take no memory and cannot run."""
    for name in names:
        setattr(network, name, None)
