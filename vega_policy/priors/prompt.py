"""The embedding of the empty prompt: computed once with the checkpoint's own text encoder, then kept.

Wan's text encoder (UMT5-XXL) weighs 11 GB and is needed for this one sentence only.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from vega_policy.priors.weights import locate

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
