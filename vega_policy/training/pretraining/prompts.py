"""Embeddings of instructions as the transformer is told them: MiniLM's tokens, padded with zeros.

Wan reads UMT5-XXL (11 GB). The small Wan's text width is MiniLM's, whose token features are taken as they
are; the empty prompt is what MiniLM makes of "", two tokens. Zeros behind them belong to the input, as in
Wan, and a prior's reader pads in the same way.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vega_policy.priors.prompt import PROMPT_LENGTH

EMPTY = ""


def write_prompts(path: Path, instructions: list[str]) -> None:
    """Embed the empty prompt and instructions, each alone, [n 384] float32, into one file."""
    from vega_policy.backbones.encoders import TextEncoder  # not needed where the file was brought along

    encoder = TextEncoder(None, pretrained=True, frozen=True)
    sentences = list(dict.fromkeys([EMPTY, *instructions]))
    tensors = {}
    for index, sentence in enumerate(sentences):
        tokens, mask = encoder([sentence])
        tensors[f"{index}"] = tokens[0][mask[0]].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, draft, metadata={"sentences": json.dumps(sentences)})
    draft.rename(path)


def read_prompts(path: Path) -> dict[str, Tensor]:
    """Sentence -> its embedding without padding, [n d].

    Raises:
        FileNotFoundError: If there is no such file; says how to make it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; embed the instructions: stages=[prompts]")
    with safe_open(path, framework="pt") as file:
        sentences = json.loads(file.metadata()["sentences"])
        return {sentence: file.get_tensor(str(index)) for index, sentence in enumerate(sentences)}


class PromptTable:
    """Padded embeddings by sentence.

    Args:
        prompts: As `read_prompts` gives them.
        device: Where they are wanted.
    """

    def __init__(self, prompts: dict[str, Tensor], device: torch.device) -> None:
        self._places = {sentence: place for place, sentence in enumerate(prompts)}
        padded = [
            functional.pad(tokens, (0, 0, 0, PROMPT_LENGTH - len(tokens))) for tokens in prompts.values()
        ]
        self._table = torch.stack(padded).to(device)

    def __call__(self, sentences: list[str]) -> Tensor:
        """Embeddings of b sentences, [b 512 d].

        Raises:
            ValueError: If a sentence is not in the table.
        """
        unknown = sorted({sentence for sentence in sentences if sentence not in self._places})
        if unknown:
            raise ValueError(
                f"no embedding of {unknown[:3]} ({len(unknown)} sentences); embed the instructions of these "
                "clips: stages=[prompts]"
            )
        return self._table[[self._places[sentence] for sentence in sentences]]
