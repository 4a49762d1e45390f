"""Base class of priors: weights, their fingerprints, frame size, clips, noise, pooling to the token grid."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from vega_policy import resource
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import check_frames, resize
from vega_policy.priors import PriorEntry
from vega_policy.run_dir import DiskFullError, read_json, read_tensors, write_tensors

logger = logging.getLogger(__name__)

READ_SIZE = 1 << 24
VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")
"""Second copies of weights that some checkpoints hold beside those that are loaded."""

PROMPT_CACHE = Path(HF_HOME) / "vega_policy" / "empty_prompts"
PROMPT_LENGTH = 512
"""Tokens to which Wan pads a prompt; the padding is part of its input (diffusers' default is 226)."""


def locate(config: PriorConfig, parts: Iterable[str], advice: str) -> Path:
    """Return the local folder of a checkpoint, `config.path`, fetched from the hub if it is no folder.

    `parts` are the sub-folders that are needed, such as `vae`; `.` is the folder itself. `advice` ends the
    message of an error.

    Raises:
        FileNotFoundError: If a part is missing; names it and says where files may come from.
    """
    parts = list(parts)
    folder = local_folder(str(config.path))
    if not folder.is_dir():
        folder = _fetch(str(config.path), config.revision, parts, advice)
    missing = [file for part in parts for file in _missing_files(folder, part)]
    if missing:
        held = sorted(entry.name for entry in folder.iterdir())[:12]
        if any(name.startswith("Wan2") and name.endswith("VAE.pth") for name in held):
            advice = (
                "This is Wan's original release; take the one for diffusers, whose name ends in -Diffusers: "
                "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir FOLDER, prior.path=FOLDER."
            )
        raise FileNotFoundError(
            f"{folder} is not a checkpoint in the hub's layout: no {', '.join(missing)}. "
            f"It holds: {', '.join(held) or 'nothing'}. {advice}"
        )
    return folder


def local_folder(path: str) -> Path:
    """Return the folder that a prior's path names; `assets/...` is the package's unless it is there.

    Shipped policies name their prior's weights in this way, and are loaded from anywhere.
    """
    folder = Path(path).expanduser()
    if folder.parts[:1] == ("assets",) and not folder.is_dir():
        return resource("assets").joinpath(*folder.parts[1:])
    return folder


def _missing_files(folder: Path, part: str) -> list[str]:
    if part in ("tokenizer", "feature_extractor"):
        return []
    needed = ["scheduler_config.json"] if part == "scheduler" else ["config.json", "*.safetensors"]
    prefix = "" if part == "." else f"{part}/"
    return [f"{prefix}{name}" for name in needed if not any((folder / part).glob(name))]


def _fetch(source: str, revision: str | None, parts: list[str], advice: str) -> Path:
    # a star matches slashes too: "*.safetensors" would fetch the text encoder as well
    patterns = [f"{part}/*" for part in parts if part != "."]
    if "." in parts:
        patterns += ["config.json", "model*.safetensors", "model*.json", "*processor_config.json"]
    skipped = [*VARIANTS, "*.bin", "*.msgpack", "*.ckpt", "*.onnx*"]
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=skipped)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The prior's weights {source!r} are neither a local folder nor available from the hub "
            f"({type(error).__name__}). Missing: {', '.join(f'{part}/' for part in parts)}. "
            f"Download them once (`hf download {source}`) or give their folder as prior.path. {advice}"
        ) from error


def check_class(folder: Path, expected: str) -> None:
    """Refuse a network whose config, as its library wrote it, names another class than `expected`.

    Raises:
        ValueError: If the folder holds another architecture.
    """
    config = read_json(folder / "config.json")
    found = config.get("_class_name") or ", ".join(config.get("architectures") or ["no class"])
    if found != expected:
        raise ValueError(f"{folder} holds {found}; this prior requires {expected}.")


def load_network(cls: type[Any], folder: Path, config: PriorConfig) -> Any:
    """Load one network of diffusers or transformers in the floating-point type of the config."""
    name = "dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype"
    return cls.from_pretrained(folder, use_safetensors=True, **{name: getattr(torch, str(config.dtype))})


def fingerprint_files(folder: Path, parts: Iterable[str]) -> str:
    """Hash names and bytes of the safetensors files of a checkpoint's parts, to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        paths = (folder / part).glob("*.safetensors")
        for path in sorted(path for path in paths if not any(fnmatch(path.name, v) for v in VARIANTS)):
            digest.update(f"{part}/{path.name}".encode())
            with path.open("rb") as file:
                while block := file.read(READ_SIZE):
                    digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint_weights(weights: Mapping[str, Tensor]) -> str:
    """Return a hash over the names and bytes of a module's weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_seed(seed: int, architecture: Any) -> str:
    """Hash what determines seeded weights, to 16 hexadecimal digits."""
    text = json.dumps({"seed": seed, "architecture": architecture}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def empty_prompt(config: PriorConfig, folder: Path, width: int, encode: Callable[[Path], Tensor]) -> Tensor:
    """Return the embedding of the empty prompt, [n width] float32.

    Its sources, in this order: `prompt_file`, `empty_prompt.safetensors` in the checkpoint, the cache, and
    `encode`, which runs the tokenizer and text encoder of a folder on "".

    Raises:
        FileNotFoundError: If there is neither an embedding nor a text encoder.
        ValueError: If a file holds an embedding of another shape.
    """
    if config.prompt_file is not None:
        return _load_prompt(Path(config.prompt_file).expanduser(), width)
    digest = hashlib.sha256(f"{config.path}@{folder.resolve()}".encode()).hexdigest()[:16]
    cached = PROMPT_CACHE / f"{digest}.safetensors"
    for path in (folder / "empty_prompt.safetensors", cached):
        if path.is_file():
            return _load_prompt(path, width)
    if not (folder / "text_encoder" / "config.json").is_file():
        folder = locate(
            config,
            ["text_encoder", "tokenizer"],
            "The text encoder runs once, on the empty prompt; its embedding may also be given as "
            "prior.prompt_file (safetensors, key `prompt`, [n d]).",
        )
    prompt = encode(folder)
    try:
        write_tensors(cached, {"prompt": prompt})
    except (OSError, DiskFullError) as error:  # such as a home that is read-only
        logger.warning("The empty prompt is not cached, and will be encoded again: %s", error)
    return prompt


def _load_prompt(path: Path, width: int) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"prior.prompt_file: {path} does not exist.")
    prompt = read_tensors(path).get("prompt")
    if prompt is None or prompt.ndim != 2 or prompt.shape[1] != width or len(prompt) > PROMPT_LENGTH:
        found = "no key `prompt`" if prompt is None else f"shape {tuple(prompt.shape)}"
        raise ValueError(
            f"{path}: expected the key `prompt` of shape [n {width}], n <= {PROMPT_LENGTH}; got {found}."
        )
    return prompt.float()


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
        self.slots = config.future_slots if config.clip == "future" else 0
        self.slot_pool = config.slot_pool
        self.input_size = choose_input_size(config, grid, stride, cell or stride)
        self._fixed_noise: dict[tuple[int, ...], Tensor] = {}
        self._checked = False

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

        t' = t = 1 for `clip=frame`; t' = t for `clip=views`; for `clip=history` the last of t' is used; for
        `clip=future` t = 1, and t' is the frame and its slots.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self,
        frames: Tensor,
        generator: torch.Generator | None = None,
        instruction: Sequence[str] | None = None,
    ) -> Tensor:
        """Encode frames [b v t 3 h w] in [0, 1] -> [b v d gh gw] in the prior's floating-point type.

        Fresh noise comes from `generator` (on the CPU); None takes fixed noise, the same for every clip.
        `instruction` holds b sentences; only `prompt=instruction` reads them.

        Raises:
            ValueError: If `clip=history` and t is not `clip_frames`, or the first frames that this prior
                encodes are not in [0, 1]; later ones are not checked, since a GPU would wait for it.
        """
        if frames.ndim != 6:
            raise ValueError(f"frames: expected [b v t 3 h w], got shape {tuple(frames.shape)}.")
        if not self._checked:
            check_frames(frames, "frames")
            self._checked = True
        if self.clip == "history" and frames.shape[2] != self.clip_frames:
            raise ValueError(
                f"prior.clip=history expects {self.clip_frames} frames a camera; got {frames.shape[2]}. "
                "Train with dataset.cache=none; in a rollout call select_action at every control step, which "
                "keeps past frames."
            )
        batch, views = frames.shape[:2]
        clips = resize(as_clips(frames, self.clip), *self.input_size)
        words = {} if instruction is None else {"instruction": [x for x in instruction for _ in range(views)]}
        with torch.autocast(frames.device.type, enabled=False):  # the trainer's type does not apply here
            tokens = self.encode_clips(clips, generator, **words)
            if self.clip == "future":
                tokens = self.join_slots(tokens)
            tokens = tokens if self.clip == "views" else tokens[:, -1:]
            return pool(tokens.reshape(batch, views, *tokens.shape[2:]), self.grid)

    def join_slots(self, tokens: Tensor) -> Tensor:
        """Join the features of a frame and its slots, [n t d gh gw] -> [n 1 d' gh gw], slot after slot."""
        if self.slot_pool == "mean":
            return tokens.mean(dim=1, keepdim=True)
        return rearrange(tokens, "n t d gh gw -> n 1 (t d) gh gw")

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

    `frame` and `future` take the last frame of each view alone, `history` each view's frames in time,
    `views` the last frames of all views as one video.
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
    """Return the configured layer, an index below `count`; refuse others, and several."""
    layer, *others = check_layers(config, count, what)
    if others:
        raise ValueError(f"prior.layer: {config.name!r} is read at one layer; got {[layer, *others]}.")
    return layer


def check_layers(config: PriorConfig, count: int, what: str = "blocks") -> tuple[int, ...]:
    """Return the configured layers, indices below `count` in rising order; refuse others."""
    if not config.layers or not all(0 <= layer < count for layer in config.layers):
        known = "the single layer 0" if count == 1 else f"{what} 0 to {count - 1}"
        raise ValueError(f"prior.layer: {config.name!r} has {known}; got {config.layer}.")
    return config.layers


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
