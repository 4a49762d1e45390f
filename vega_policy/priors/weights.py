"""Where a prior's weights come from: local folder, hub, or seed; and the fingerprint that names them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, UMT5EncoderModel

from vega_policy.model.config import PriorConfig
from vega_policy.priors import PriorEntry

CHUNK = 1 << 24
VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")
"""Second copies of weights that some checkpoints hold beside the ones that are read."""


def way_out(entry: PriorEntry) -> str:
    """Advice for somebody who cannot have a prior's files: its terms, and the prior that needs none."""
    terms = f"Their terms: {entry.terms}. " if entry.terms else ""
    return (
        f"{terms}To try the policy without these files, take the small prior that needs no download: "
        "prior=wan_tiny (LeRobot: --policy.prior.name=wan_tiny)."
    )


def locate(source: str, revision: str | None, parts: Iterable[str], way_out: str) -> Path:
    """Local folder that holds the named parts of a checkpoint, fetched from the hub if need be.

    Args:
        source: Local folder in the hub's layout, or hub id.
        revision: Hub revision; None takes the newest.
        parts: Sub-folders that are needed, such as `vae` and `transformer`; `.` is the folder itself.
        way_out: Advice for somebody who cannot have these files.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a part is missing; names it and says where files may come from.
    """
    parts = list(parts)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, revision, parts, way_out)
    missing = [file for part in parts for file in _missing(folder, part)]
    if missing:
        held = sorted(entry.name for entry in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"{folder} is not a checkpoint in the hub's layout: no {', '.join(missing)}. "
            f"It holds: {', '.join(held) or 'nothing'}. {way_out}"
        )
    return folder


def _missing(folder: Path, part: str) -> list[str]:
    """Files that a part needs and lacks."""
    place = "" if part == "." else f"{part}/"
    if part == "scheduler":
        needed = ["scheduler_config.json"]
    elif part in ("tokenizer", "feature_extractor"):
        needed = []
    else:
        needed = ["config.json", "*.safetensors"]
    return [f"{place}{name}" for name in needed if not any((folder / part).glob(name))]


def _fetch(source: str, revision: str | None, parts: list[str], way_out: str) -> Path:
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
            f"The prior's weights {source!r} are neither a local folder nor to be had from the hub "
            f"({type(error).__name__}). Missing: {', '.join(f'{part}/' for part in parts)}. "
            f"Download them once (`hf download {source}`) or give their folder as prior.path. {way_out}"
        ) from error


def check_class(folder: Path, expected: str) -> None:
    """Refuse a part whose config names another class than the one that will read it.

    Args:
        folder: A checkpoint's part, such as `<checkpoint>/vae`.
        expected: Class name, as diffusers or transformers wrote it.

    Raises:
        ValueError: If the folder holds another architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    found = config.get("_class_name") or ", ".join(config.get("architectures") or ["no class"])
    if found != expected:
        raise ValueError(f"{folder} holds {found}; this prior needs {expected}.")


def load_part(cls: type[Any], folder: Path, config: PriorConfig) -> Any:
    """One network of a checkpoint, in the floating-point type that the config names.

    Args:
        cls: A model class of diffusers or transformers.
        folder: The part's folder.
        config: Resolved prior config.
    """
    dtype = getattr(torch, str(config.dtype))
    if issubclass(cls, PreTrainedModel):
        return cls.from_pretrained(folder, dtype=dtype)
    return cls.from_pretrained(folder, torch_dtype=dtype)


def fingerprint_files(folder: Path, parts: Iterable[str]) -> str:
    """Hash over names and bytes of the safetensors files of a checkpoint's parts, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        paths = (folder / part).glob("*.safetensors")
        for path in sorted(path for path in paths if not any(fnmatch(path.name, v) for v in VARIANTS)):
            digest.update(f"{part}/{path.name}".encode())
            with path.open("rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint_seed(seed: int, architecture: Any) -> str:
    """Hash over what determines seeded weights, 16 hexadecimal digits."""
    text = json.dumps({"seed": seed, "architecture": architecture}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


CACHE = Path(HF_HOME) / "vega_policy" / "empty_prompts"
PROMPT_LENGTH = 512
"""Tokens to which Wan pads a prompt; the padding is part of its input (diffusers' default is 226)."""


def encode_empty_prompt(folder: Path) -> Tensor:
    """Run the checkpoint's tokenizer and UMT5 encoder on "", -> [n d] float32, padding cut off."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype="auto").eval()
    words = tokenizer(
        [""], padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = encoder(words.input_ids, words.attention_mask).last_hidden_state[0]
    return hidden[words.attention_mask[0].bool()].float().contiguous()


def empty_prompt(
    source: str,
    folder: Path,
    revision: str | None,
    file: str | None,
    width: int,
    encode: Callable[[Path], Tensor] = encode_empty_prompt,
) -> Tensor:
    """Embedding of the empty prompt, [n d] float32.

    Looks for the given file, then for `empty_prompt.safetensors` in the checkpoint, then in the cache;
    only then the checkpoint's text encoder is loaded, once.

    Args:
        source: The checkpoint as the user named it.
        folder: The checkpoint's local folder.
        revision: Hub revision.
        file: Safetensors file with the key `prompt`, or None.
        width: Expected width d.
        encode: Runs the tokenizer and text encoder of a folder on "".

    Raises:
        FileNotFoundError: If there is no embedding and no text encoder.
        ValueError: If a file holds an embedding of another shape.
    """
    digest = hashlib.sha256(f"{source}@{folder.resolve()}".encode()).hexdigest()[:16]
    cached = CACHE / f"{digest}.safetensors"
    for path in (Path(file).expanduser() if file else None, folder / "empty_prompt.safetensors", cached):
        if path is not None and (path.is_file() or str(path) == file):
            return _load(path, width)
    prompt = encode(_with_text_encoder(source, folder, revision))
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(f".{os.getpid()}")
    save_file({"prompt": prompt}, unfinished)
    unfinished.rename(cached)  # whole or not there, whenever this is killed
    return prompt


def _with_text_encoder(source: str, folder: Path, revision: str | None) -> Path:
    if (folder / "text_encoder" / "config.json").is_file():
        return folder
    return locate(
        source,
        revision,
        ["text_encoder", "tokenizer"],
        "The text encoder is needed once, for the empty prompt; its embedding may also be given as "
        "prior.prompt_file (safetensors, key `prompt`, [n d]).",
    )


def _load(path: Path, width: int) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"prior.prompt_file: {path} does not exist.")
    prompt = load_file(path).get("prompt")
    if prompt is None or prompt.ndim != 2 or prompt.shape[1] != width or len(prompt) > PROMPT_LENGTH:
        found = "no key `prompt`" if prompt is None else f"shape {tuple(prompt.shape)}"
        raise ValueError(
            f"{path}: expected the key `prompt` of shape [n {width}], n <= {PROMPT_LENGTH}; got {found}."
        )
    return prompt.float()
