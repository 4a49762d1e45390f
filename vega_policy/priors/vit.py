"""DINOv3 and V-JEPA 2 as priors: vision transformers read at one block, their final norm applied."""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import DINOv3ViTModel, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import PriorReader, check_layer, check_no_noise, drop_rest, fitting_size
from vega_policy.priors.weights import check_class, fingerprint_files, load_part, locate, way_out


class VisionTransformer(PriorReader):
    """What both share: ImageNet's normalisation and a stack of blocks that ends at the one that is read.

    Args:
        network: A transformer of transformers, whose blocks lie in `<encoder>.layer`.
        encoder: Its module that holds the blocks.
        config: Resolved prior config.
        grid: Token grid (gh, gw) of the backbone.
        fingerprint: Hash that names the weights.

    Raises:
        ValueError: If the network has no such block or frames cannot have the size asked for.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, network: Any, encoder: Any, config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        layer = check_layer(config, len(encoder.layer))
        patch: int = network.config.patch_size
        super().__init__(config, grid, fitting_size(config, grid, patch), fingerprint)
        encoder.layer = encoder.layer[: layer + 1]
        self.network, self.width, self.patch = network, network.config.hidden_size, patch
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None])

    def normalised(self, clips: Tensor) -> Tensor:
        """Frames as the network was trained on, [n t 3 h w] in [0, 1] -> [n t 3 h w]."""
        return ((clips - self.mean) / self.std).to(self.network.dtype)

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens of t' times at their places, [n t'*gh*gw d] -> [n t' d gh gw]."""
        gh, gw = (side // self.patch for side in self.input_size)
        return rearrange(tokens, "n (t h w) d -> n t d h w", h=gh, w=gw)


class Dinov3(VisionTransformer):
    """DINOv3 on single pictures: patch tokens, without class and register tokens."""

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Patch tokens of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        hidden = self.network(self.normalised(clips)[:, 0]).last_hidden_state
        return self.on_grid(hidden[:, 1 + self.network.config.num_register_tokens :])


class VJepa2(VisionTransformer):
    """V-JEPA 2's encoder on clips; one of its tokens spans two frames, so a single frame is shown twice."""

    def __init__(
        self, network: Any, encoder: Any, config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(network, encoder, config, grid, fingerprint)
        if grid[0] != grid[1]:
            raise ValueError(f"prior: 'vjepa2' knows places on square grids only; the backbone's is {grid}.")
        drop_rest(network, "predictor")
        for block in encoder.layer:  # transformers takes the rows of a frame from the config, not the frame
            block.attention.grid_size = self.input_size[1] // self.patch

    def read_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        For `clip=views` every camera fills a token's time span by itself (t' = t); a history is filled up
        with its first frame.
        """
        span = self.network.config.tubelet_size
        if self.clip == "history":
            missing = -clips.shape[1] % span
            clips = torch.cat([clips[:, :1].expand(-1, missing, -1, -1, -1), clips], dim=1)
        else:
            clips = repeat(clips, "n t c h w -> n (t s) c h w", s=span)
        return self.on_grid(self.network.encoder(self.normalised(clips)).last_hidden_state)


def _load(
    network: type[Any], reader: type[VisionTransformer], encoder: str, config: PriorConfig, entry: PriorEntry,
    grid: tuple[int, int],
) -> VisionTransformer:  # fmt: skip
    check_no_noise(config)
    folder = locate(str(config.path), config.revision, ["."], way_out(entry))
    check_class(folder, network.__name__)
    loaded = load_part(network, folder, config)
    return reader(loaded, getattr(loaded, encoder), config, grid, fingerprint_files(folder, ["."]))


def load_dinov3(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> VisionTransformer:
    """Load DINOv3 from a folder in the hub's layout or from the hub.

    Raises:
        FileNotFoundError: If files are missing; says which, and the way out.
        ValueError: If the folder holds another architecture, or a layer or noise level does not exist.
    """
    return _load(DINOv3ViTModel, Dinov3, "model", config, entry, grid)


def load_vjepa2(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> VisionTransformer:
    """Load V-JEPA 2 from a folder in the hub's layout or from the hub; raises as `load_dinov3`."""
    return _load(VJEPA2Model, VJepa2, "encoder", config, entry, grid)
