"""Priors other than diffusion models: clean latents, vision transformers, a random projection, files.

`precomputed` reads features that another program wrote, for models that neither diffusers nor transformers
carries. A folder of features:

    manifest.json             format, model, frame_size, views, width, grid, rows of each shard
    shard-00000.safetensors   `signature` float32 [n s], `features` [n v d gh gw]

Features are found by their frames: a row's signature is its frames (all views), averaged to 16x16 pixels.
Frames that were not exported have no features, so such a prior serves training and analysis on the exported
dataset, not a robot.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import DINOv3ViTModel, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry
from vega_policy.priors.base import (
    BasePrior,
    check_layer,
    drop_modules,
    fingerprint_files,
    fingerprint_seed,
    pool,
    refuse_noise,
)
from vega_policy.priors.unet import latent_mean
from vega_policy.run_dir import (
    OtherRunError,
    read_json,
    read_tensors,
    remove_partial,
    require_empty,
    require_folder,
    write_json,
    write_tensors,
)

logger = logging.getLogger(__name__)

CELL = 16
"""Pixels of a frame for each token of the backbone, as with the diffusion priors."""


class Autoencoder(BasePrior):
    """The encoder of a latent diffusion model alone; latents of one token are averaged."""

    vae: Any

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse a layer, a noise level and `clip=views`."""
        check_layer(config, 1)
        refuse_noise(config)
        if config.clip == "views":
            raise ValueError(
                f"prior.clip=views: the autoencoder {config.name!r} encodes each camera by itself, so that "
                "clip=views would change nothing. Take clip=frame or clip=history."
            )
        return super().load(config, entry, grid)


class StableDiffusionVae(Autoencoder):
    """Mean of Stable Diffusion's autoencoder times its scaling factor, 4 channels."""

    networks: ClassVar = {"vae": AutoencoderKL}

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae = parts["vae"]
        super().__init__(config, grid, fingerprint, 2 ** (len(vae.config.block_out_channels) - 1), CELL)
        self.vae, self.width = vae, vae.config.latent_channels
        drop_modules(vae, "decoder", "post_quant_conv")

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return latents of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 4 h/8 w/8]."""
        return (latent_mean(self.vae, clips[:, 0]) * self.vae.config.scaling_factor)[:, None]


class WanVae(Autoencoder):
    """Normalised mean of Wan's video autoencoder, of a frame or a history."""

    networks: ClassVar = {"vae": AutoencoderKLWan}
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        vae = parts["vae"]
        stride = vae.spatial_compression_ratio
        super().__init__(config, grid, fingerprint, stride, max(CELL, stride))
        self.vae, self.width = vae, vae.config.z_dim
        drop_modules(vae, "decoder")
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean)[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std)[:, None, None, None])

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return latents of clips, [n t 3 h w] in [0, 1] -> [n 1+(t-1)/4 z h/8 w/8]."""
        video = (2 * clips - 1).to(self.vae.dtype).transpose(1, 2)
        mean = self.vae.encode(video).latent_dist.mode().float()
        return ((mean - self.latents_mean) / self.latents_std).transpose(1, 2)


class VisionTransformer(BasePrior):
    """A vision transformer read at one block, with its final norm; its module `encoder` holds the blocks."""

    encoder: str
    network: Any
    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse a noise level."""
        refuse_noise(config)
        return super().load(config, entry, grid)

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        network = parts["."]
        encoder = getattr(network, self.encoder)
        layer = check_layer(config, len(encoder.layer))
        super().__init__(config, grid, fingerprint, network.config.patch_size)
        encoder.layer = encoder.layer[: layer + 1]
        self.network, self.width, self.patch = network, network.config.hidden_size, network.config.patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None])

    def normalize(self, clips: Tensor) -> Tensor:
        """Apply ImageNet's statistics, [n t 3 h w] in [0, 1] -> [n t 3 h w] in the network's type."""
        return ((clips - self.mean) / self.std).to(self.network.dtype)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Arrange the tokens of t' times as maps, [n t'*gh*gw d] -> [n t' d gh gw]."""
        gh, gw = (side // self.patch for side in self.input_size)
        return rearrange(tokens, "n (t h w) d -> n t d h w", h=gh, w=gw)


class Dinov3(VisionTransformer):
    """DINOv3 on single frames: patch tokens, without class and register tokens."""

    networks: ClassVar = {".": DINOv3ViTModel}
    encoder = "model"

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return patch tokens of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        hidden = self.network(self.normalize(clips)[:, 0]).last_hidden_state
        return self.to_grid(hidden[:, 1 + self.network.config.num_register_tokens :])


class VJepa2(VisionTransformer):
    """V-JEPA 2's encoder on clips; one token spans two frames, so that a single frame is repeated."""

    networks: ClassVar = {".": VJEPA2Model}
    encoder = "encoder"

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(parts, config, grid, fingerprint)
        if grid[0] != grid[1]:
            raise ValueError(f"prior: 'vjepa2' has positions on square grids only; the backbone's is {grid}.")
        drop_modules(self.network, "predictor")
        for block in self.network.encoder.layer:  # transformers takes a frame's rows from the config
            block.attention.grid_size = self.input_size[1] // self.patch

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return tokens of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        For `clip=views` every camera fills a token's time span alone (t' = t); a history that does not fill
        its last span begins with its first frame repeated.
        """
        span = self.network.config.tubelet_size
        if self.clip == "history":
            missing = -clips.shape[1] % span
            clips = torch.cat([clips[:, :1].expand(-1, missing, -1, -1, -1), clips], dim=1)
        else:
            clips = repeat(clips, "n t c h w -> n (t s) c h w", s=span)
        return self.to_grid(self.network.encoder(self.normalize(clips)).last_hidden_state)


class RandomProjection(BasePrior):
    """The control: patches of 16x16 pixels through one fixed random matrix. A useful prior must beat it."""

    patch, width = 16, 256
    untrained = True
    matrix: Tensor

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Draw the matrix from the config's seed; refuse a layer and a noise level."""
        check_layer(config, 1)
        refuse_noise(config)
        return cls(config, grid)

    def __init__(self, config: PriorConfig, grid: tuple[int, int]) -> None:
        fingerprint = fingerprint_seed(config.seed, {"patch": self.patch, "width": self.width})
        super().__init__(config, grid, fingerprint, self.patch)
        values = 3 * self.patch**2
        matrix = torch.randn(values, self.width, generator=torch.Generator().manual_seed(config.seed))
        self.register_buffer("matrix", matrix * 4 / values**0.5)

    def encode_clips(self, clips: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return projected patches of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw]."""
        patches = rearrange(
            clips - 0.5, "n t c (gh p) (gw q) -> n t gh gw (c p q)", p=self.patch, q=self.patch
        )
        return rearrange(patches @ self.matrix, "n t gh gw d -> n t d gh gw")


FORMAT = 1
MANIFEST, SHARD = "manifest.json", "shard-{:05d}.safetensors"
SIDE = 16
TOLERANCE = 1 / 255
"""Largest difference between signatures of one image; another device makes a smaller one."""


def signature(frames: Tensor) -> Tensor:
    """Average frames to 16x16 pixels, [n v 3 h w] in [0, 1] -> [n v*3*16*16] float32."""
    small = functional.adaptive_avg_pool2d(frames.flatten(0, 1).float(), SIDE)
    return rearrange(small, "(n v) c h w -> n (v c h w)", v=frames.shape[1])


def find_encoder(name: str) -> Callable[[str], Callable[[Tensor], Tensor]]:
    """Return the function that `vega-export-features` is given as module:function.

    Raises:
        ValueError: If there is none.
    """
    try:
        function = resolve_name(name) if ":" in name else None
    except (ImportError, AttributeError, ValueError) as error:
        reason = str(error)
    else:
        if callable(function):
            return cast(Callable[[str], Callable[[Tensor], Tensor]], function)
        reason = "this names no function"
    raise ValueError(
        f"encoder: expected a function of yours as module:function, got {name} ({reason}). Run the command "
        "in the folder of its module, with the Python in which the model's own repository is installed"
    )


class FeatureWriter:
    """Writes the features of `model` to a folder, shard by shard; `close` completes it with a manifest.

    `skip` finds the shards that an earlier writer has left. A complete folder is only compared, so that a
    writer that was killed after its manifest can be started again.

    Raises:
        OtherRunError: If the folder holds other files.
    """

    def __init__(self, folder: Path, model: str) -> None:
        require_folder(folder)
        shards = [path.name for path in folder.glob("shard-*.safetensors")]
        require_empty(folder, may_hold=[*shards, MANIFEST], option="output")
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        self._folder, self._model = folder, model
        manifest = folder / MANIFEST
        self._manifest: dict[str, Any] | None = read_json(manifest, "rows") if manifest.is_file() else None
        self._rows: list[int] = []
        self._shape: tuple[int, ...] | None = None
        self._frame_size = 0

    @property
    def was_complete(self) -> bool:
        """Whether an earlier writer has completed the folder."""
        return self._manifest is not None

    def skip(self, frames: Tensor) -> bool:
        """Return whether the next shard is there already; then it need not be added.

        Raises:
            OtherRunError: If it is of other frames or of another model, or missing in a complete folder.
        """
        path = self._folder / SHARD.format(len(self._rows))
        if not path.is_file():
            if self._manifest is not None and len(self._rows) >= len(self._manifest["rows"]):
                raise self._other(f"it has {len(self._rows)} shards, and there are more frames")
            return False
        try:
            with safe_open(path, "pt") as file:
                model = (file.metadata() or {}).get("model")
            held = load_file(path)
        except SafetensorError as error:
            logger.warning("%s is damaged (%s) and computed again", path, error)
            return False
        if model != self._model or not torch.equal(held["signature"], signature(frames).cpu()):
            raise OtherRunError(
                f"{path} holds features of other frames or of another model ({model}). Delete {self._folder} "
                "or name another folder."
            )
        self._shape, self._frame_size = tuple(held["features"].shape[1:]), frames.shape[-1]
        self._rows.append(len(frames))
        return True

    def add(self, frames: Tensor, features: Tensor) -> None:
        """Write one shard, frames [n v 3 h h] in [0, 1] and their features [n v d gh gw].

        Raises:
            ValueError: If shapes disagree with each other or with earlier shards.
        """
        square = frames.shape[-1] == frames.shape[-2]
        if features.ndim != 5 or features.shape[:2] != frames.shape[:2] or not square:
            raise ValueError(
                "expected features [n v d gh gw] of square frames [n v 3 h h], got "
                f"{tuple(features.shape)} of {tuple(frames.shape)}."
            )
        if self._shape not in (None, tuple(features.shape[1:])) or not features.isfinite().all():
            raise ValueError(
                "features must be finite and of one shape [v d gh gw]; got "
                f"{tuple(features.shape[1:])} after {self._shape}."
            )
        self._shape, self._frame_size = tuple(features.shape[1:]), frames.shape[-1]
        shard = {"signature": signature(frames), "features": features}
        path = self._folder / SHARD.format(len(self._rows))
        tensors = {key: value.cpu().contiguous() for key, value in shard.items()}
        write_tensors(path, tensors, {"model": self._model})
        self._rows.append(len(frames))

    def close(self) -> None:
        """Write the manifest, or compare it; refuse a folder without features."""
        if self._shape is None:
            raise ValueError(f"Nothing to write into {self._folder}: no frames were given.")
        views, width, *grid = self._shape
        manifest = {"format": FORMAT, "model": self._model, "frame_size": self._frame_size}
        manifest |= {"views": views, "width": width, "grid": grid, "rows": self._rows}
        if self._manifest is None:
            write_json(self._folder / MANIFEST, manifest)
        elif self._manifest != manifest:
            raise self._other(f"its {MANIFEST} differs from {manifest}")

    def _other(self, difference: str) -> OtherRunError:
        return OtherRunError(
            f"{self._folder} is a complete export of other frames: {difference}. Delete it or name another "
            "folder."
        )


class PrecomputedPrior(nn.Module):
    """Finds features in a folder of `FeatureWriter` by the frames they were computed from."""

    untrained = False
    layer = 0
    noise_level = 0.0

    def __init__(self, folder: Path, grid: tuple[int, int]) -> None:
        """Raise a ValueError if the features are coarser than the grid (gh, gw), or of another format."""
        super().__init__()
        self.manifest: dict[str, Any] = read_json(
            folder / MANIFEST, "format", "grid", "width", "rows", "views", "frame_size"
        )
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{folder} has format {self.manifest['format']}; this version reads {FORMAT}.")
        held = tuple(self.manifest["grid"])
        if held[0] < grid[0] or held[1] < grid[1]:
            raise ValueError(
                f"{folder} holds {held[0]}x{held[1]} tokens a view, which cannot be pooled to the backbone's "
                f"{grid[0]}x{grid[1]}. Export the features on that grid, or a finer one."
            )
        self.folder, self.grid = folder, grid
        self.width: int = self.manifest["width"]
        self.fingerprint = fingerprint_files(folder, ["."])
        self._shards = [folder / SHARD.format(number) for number in range(len(self.manifest["rows"]))]
        self._rows = [
            (shard, row)
            for shard, count in zip(self._shards, self.manifest["rows"], strict=True)
            for row in range(count)
        ]
        self._signatures = torch.cat([read_tensors(shard)["signature"] for shard in self._shards])

    @torch.no_grad()
    def forward(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return features of the last frame of each clip, [b v t 3 h w] in [0, 1] -> [b v d gh gw].

        Raises:
            ValueError: If a frame was not exported, or frames have another size or number of views.
        """
        frames = frames[:, :, -1]
        expected = (self.manifest["views"], self.manifest["frame_size"])
        if (frames.shape[1], frames.shape[-1]) != expected:
            raise ValueError(
                f"{self.folder} was exported from {expected[0]} views of {expected[1]} pixels; the policy "
                f"has {frames.shape[1]} of {frames.shape[-1]}. Export again with its frame_size."
            )
        wanted = signature(frames).cpu()
        nearest = torch.cdist(wanted, self._signatures).argmin(dim=1)
        distance = (wanted - self._signatures[nearest]).abs().max()  # the largest difference of a pixel
        if distance > TOLERANCE:
            raise ValueError(
                f"{self.folder} holds no features of these frames: the nearest of its {len(self._rows)} rows "
                f"differs by {distance:.3f}. Precomputed features exist for the exported dataset only; new "
                "frames (a rollout, a robot) need a prior that runs."
            )
        features = torch.stack([self._read(*self._rows[index]) for index in nearest.tolist()])
        return pool(features.to(frames.device), self.grid)

    def _read(self, shard: Path, row: int) -> Tensor:
        with safe_open(shard, "pt") as file:
            return file.get_slice("features")[row : row + 1][0]


def load(config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> PrecomputedPrior:
    """Open a folder of features.

    Raises:
        ValueError: If no folder is named, or a layer or noise level is.
        FileNotFoundError: If there is no complete folder of features.
    """
    check_layer(config, 1)
    refuse_noise(config)
    advice = "`vega-export-features --help` shows how to write one."
    if config.path is None:
        raise ValueError(f"prior=precomputed needs prior.path, a folder of features. {advice}")
    folder = Path(config.path).expanduser()
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} is no complete folder of features: no {MANIFEST}. {advice}")
    return PrecomputedPrior(folder, grid)
