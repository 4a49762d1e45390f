"""Weights of priors: a checkpoint's folder, its networks, the empty prompt, and fingerprints."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vega_policy.model.config import PriorConfig
from vega_policy.run_dir import DiskFullError, atomic_file

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
    folder = Path(str(config.path)).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(config.path), config.revision, parts, advice)
    missing = [file for part in parts for file in _missing_files(folder, part)]
    if missing:
        held = sorted(entry.name for entry in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"{folder} is not a checkpoint in the hub's layout: no {', '.join(missing)}. "
            f"It holds: {', '.join(held) or 'nothing'}. {advice}"
        )
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
    config = json.loads((folder / "config.json").read_text())
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
        with atomic_file(cached) as draft:
            save_file({"prompt": prompt}, draft)
    except (OSError, DiskFullError) as error:  # such as a home that is read-only
        logger.warning("The empty prompt is not cached, and will be encoded again: %s", error)
    return prompt


def _load_prompt(path: Path, width: int) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"prior.prompt_file: {path} does not exist.")
    prompt = load_file(path).get("prompt")
    if prompt is None or prompt.ndim != 2 or prompt.shape[1] != width or len(prompt) > PROMPT_LENGTH:
        found = "no key `prompt`" if prompt is None else f"shape {tuple(prompt.shape)}"
        raise ValueError(
            f"{path}: expected the key `prompt` of shape [n {width}], n <= {PROMPT_LENGTH}; got {found}."
        )
    return prompt.float()
