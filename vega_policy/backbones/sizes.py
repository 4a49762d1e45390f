"""What a policy consists of: parameters, tokens, memory and arithmetic of each part, without any weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vega_policy.backbones.compact import MAX_WORDS, CompactBackbone
from vega_policy.backbones.vlm import CONNECTORS, ENCODERS, VisionLanguageBackbone, parts_of
from vega_policy.model import flow
from vega_policy.model.config import BackboneConfig, BaseConfig, ModelConfig
from vega_policy.model.vega import VegaModel
from vega_policy.priors.base import BasePrior, as_clips
from vega_policy.priors.sizes import build_without_weights

PROMPT_TOKENS = 32
"""Assumed tokens of an instruction with what a chat template puts around it."""


@dataclass(frozen=True)
class Architecture:
    """One published model.

    Attributes:
        model_type: Its type in transformers.
        fields: Constructor arguments of its config.
        side: Tokens along a side of a frame, if the model has a fixed number of them.
        stride: Pixels a token, if the number follows the frame's size.
    """

    model_type: str
    fields: dict[str, Any]
    side: int | None = None
    stride: int | None = None

    def grid_side(self, frame_size: int) -> int:
        """Tokens along a side of a frame of so many pixels."""
        if self.side is not None:
            return self.side
        assert self.stride is not None  # one of both is given
        return round(frame_size / self.stride)


_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN2_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}

ARCHITECTURES: dict[str, Architecture] = {
    "smolvlm2_500m": Architecture(
        "smolvlm",
        {
            "text_config": {
                "model_type": "llama",
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "vocab_size": 49280,
            },
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "scale_factor": 4,
            "image_token_id": 49190,
            "pad_token_id": 2,
        },
        side=8,
    ),
    "paligemma2_3b": Architecture(
        "paligemma",
        {
            "text_config": {
                "model_type": "gemma2",
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 257216,
            },
            "vision_config": {**_SO400M, "image_size": 224, "projection_dim": 2304},
            "projection_dim": 2304,
        },
        side=16,
    ),
    "qwen2.5_vl_3b": Architecture(
        "qwen2_5_vl",
        {
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "rope_parameters": _QWEN2_ROPE,
            },
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
        },
        stride=28,
    ),
}
"""Backbone -> its published sizes."""


def without_weights(
    config: BackboneConfig,
    state_dim: int,
    views: int,
    frame_size: int,
    device: str = "meta",
    prompts: Callable[[int, int], Any] | None = None,
) -> VisionLanguageBackbone:
    """A backbone at its published sizes, frozen and adapted as its config says.

    Args:
        config: The backbone's config.
        state_dim: Width s of the proprioceptive state.
        views: Number of cameras v.
        frame_size: Side of the square frames in pixels.
        device: `meta` gives shapes and takes no memory; another one draws random weights there.
        prompts: Makes what stands in for the processor, given the tokens along a frame's side and the id of a
            placeholder; None takes `Placeholders`.

    Raises:
        ValueError: If the sizes of the backbone are not listed.
    """
    if config.name not in ARCHITECTURES:
        raise ValueError(
            f"No published sizes of the backbone {config.name!r}. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    published = ARCHITECTURES[config.name]
    architecture = AutoConfig.for_model(published.model_type, **published.fields)
    side = published.grid_side(frame_size)
    stand_in: Any = prompts or (lambda side, token: Placeholders(views, side, token))
    encoder = stand_in(side, architecture.image_token_id)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=getattr(torch, config.dtype))
        return VisionLanguageBackbone(model.base_model, encoder, config, state_dim)


class Placeholders:
    """Stands in for a processor: as many placeholders as the model has tokens of a frame.

    Args:
        views: Cameras v.
        side: Tokens along a side of a frame.
        image_token: Id of a placeholder.
    """

    picture_hash = "none"

    def __init__(self, views: int, side: int, image_token: int) -> None:
        self.views = views
        self._grid = torch.tensor([[1, 2 * side, 2 * side]] * views, device="cpu")
        self._ids = torch.full((1, views * side**2), image_token, device="cpu")
        self.processor = SimpleNamespace(image_processor=None)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Ids of the placeholders [1 v*n]."""
        return {"input_ids": self._ids, "attention_mask": torch.ones_like(self._ids)}


ADAM_BYTES = 12
"""Bytes of gradient and two moments of a float32 weight that learns."""


@dataclass(frozen=True)
class Part:
    """One part of a policy.

    Attributes:
        name: What it is.
        trainable: Parameters that learn.
        frozen: Parameters that do not.
        weights: Bytes of all its weights.
        tokens: Tokens that leave it in one control step, all views together; None where there are none.
        flops: Operations of one control step with a new chunk (a product and its sum are two); None where
            they are not counted.
    """

    name: str
    trainable: int
    frozen: int
    weights: int
    tokens: int | None = None
    flops: int | None = None

    def row(self) -> dict[str, Any]:
        """Columns of a printed table."""
        return {
            "part": self.name,
            "trainable": f"{self.trainable:,}",
            "frozen": f"{self.frozen:,}",
            "weights GB": round(self.weights / 1e9, 3),
            "to learn GB": round(ADAM_BYTES * self.trainable / 1e9, 3),
            "tokens": self.tokens,
            "GFLOP": None if self.flops is None else round(self.flops / 1e9, 3),
        }


def inspect_model(config: ModelConfig) -> list[Part]:
    """Sizes of every part of a policy, the last one being their sum.

    Arithmetic is that of one observation. That of Hugging Face models is two operations for each weight of
    their linear layers and token, and full attention (windows count as full); all else is counted while it
    runs without data. Text encoders of a sentence and word embeddings count as none.

    Args:
        config: The policy's model.

    Raises:
        ValueError: If the published sizes of a part are not known.
    """
    backbone = _backbone(config)
    prior = None if config.prior.name == "none" else build_without_weights(config.prior, backbone.grid)
    with torch.device("meta"):
        model: Any = VegaModel(config, (backbone, prior)).eval()
    n = backbone.grid[0] * backbone.grid[1]
    seen = config.views * n
    parts = []
    if prior is not None:
        prior.requires_grad_(False)
        parts.append(_part(f"prior {config.prior.name}", [prior], seen, _prior_flops(prior, config)))
        fused = model.fusion.tokens(n) * config.views
        parts += [
            _part("projector of the prior", [model.project], seen, _linear_flops(model.project, seen)),
            _part(f"fusion {config.fusion.name}", [model.fusion], fused, _fusion_flops(model, n)),
        ]
    parts += _compact(model, seen) if isinstance(backbone, CompactBackbone) else _vlm(model, seen)
    length = parts[-1].tokens or 1
    parts.append(_part(f"head {config.head.name}", [model.head], config.chunk_size, _act(model, length)))
    return [*parts, _sum(parts)]


def refuse_base(base: BaseConfig) -> None:
    """Refuse a policy built upon a pre-trained one: its networks are known from its checkpoint alone.

    Raises:
        ValueError: If there is a base.
    """
    if base.name != "none":
        raise ValueError(
            f"base={base.name}: the networks of a pre-trained policy lie in its checkpoint, and are not "
            "known without it; backbone and head of the config mean nothing here. Inspect a policy of this "
            "package's own parts (base=none backbone=... head=...)."
        )


def _backbone(config: ModelConfig) -> Any:
    if config.backbone.name != "compact":
        return without_weights(config.backbone, config.state_dim, config.views, config.frame_size)
    return CompactBackbone(config.backbone, config.state_dim, config.views, config.frame_size).to("meta")


def _compact(model: Any, seen: int) -> list[Part]:
    config, backbone = model.config, model.backbone
    frames = torch.empty(1, config.views, 3, config.frame_size, config.frame_size, device="meta")
    kept = config.views * (config.backbone.latents or seen // config.views)
    length = kept + 1 + MAX_WORDS
    context = torch.empty(1, length, backbone.width, device="meta")
    flops = _flops(lambda: [block(context) for block in backbone.blocks])
    trunk = [part for name, part in backbone.named_children() if not name.endswith("_encoder")]
    return [
        _part("image encoder", [backbone.image_encoder], seen, _flops(lambda: backbone.encode(frames))),
        _part("text encoder", [backbone.text_encoder], MAX_WORDS),
        _part("trunk", trunk, length, flops),
    ]


def _vlm(model: Any, seen: int) -> list[Part]:
    backbone, views = model.backbone, model.config.views
    connectors = parts_of(backbone.model, CONNECTORS)
    inner = {id(weight) for part in connectors for weight in part.parameters()}
    encoder, decoder = parts_of(backbone.model, ENCODERS)[0], backbone.model.get_decoder()
    patches = _patches(backbone.model.config, seen // views)
    looked = views * (_linear_flops(encoder, patches) + _attention_flops(encoder, patches))
    joined = sum(_linear_flops(part, seen) for part in connectors if part not in set(encoder.modules()))
    length = seen + PROMPT_TOKENS
    read = _linear_flops(decoder, length) + _attention_flops(decoder, length)
    return [
        _part("image encoder", [encoder], views * patches, looked, without=inner),
        _part("connector", connectors, seen, joined),
        _part("language model", [decoder], length, read),
        _part(
            "projector of the state",
            [backbone.project_state],
            length + 1,
            _linear_flops(model.backbone.project_state, 1),
        ),
    ]


def _patches(config: Any, tokens: int) -> int:
    """Tokens of one frame inside the image encoder."""
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        return tokens * vision.spatial_merge_size**2
    return (vision.image_size // vision.patch_size) ** 2


def _linear_flops(module: nn.Module, tokens: int) -> int:
    return 2 * tokens * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _attention_flops(module: nn.Module, tokens: int) -> int:
    """Scores and mixtures of full self-attention, for each query projection of a width d: 4 n n d."""
    widths = [
        part.out_features if name.endswith("q_proj") else part.out_features // 3
        for name, part in module.named_modules()
        if name.endswith(("q_proj", ".qkv")) and isinstance(part, nn.Linear)
    ]
    return 4 * tokens**2 * sum(widths)


def _flops(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _prior_flops(prior: Any, config: ModelConfig) -> int | None:
    if not isinstance(prior, BasePrior):
        return None
    times = config.prior.clip_frames if prior.clip == "history" else 1
    frames = torch.empty(1, config.views, times, 3, *prior.input_size, device="meta")
    return _flops(lambda: prior.encode_clips(as_clips(frames, prior.clip), None))


def _fusion_flops(model: Any, n: int) -> int:
    views, width = model.config.views, model.backbone.width
    stream, context = torch.empty(views, n, width, device="meta"), torch.empty(views, width, device="meta")
    return _flops(lambda: model.fusion(stream, stream, context if model.fusion.reads_instruction else None))


def _act(model: Any, length: int) -> int:
    config = model.config
    context = torch.empty(1, length, model.backbone.width, device="meta")
    mask = torch.ones(1, length, dtype=torch.bool, device="meta")
    noise = torch.empty(1, config.chunk_size, config.action_dim, device="meta")
    head = copy.deepcopy(model.head).requires_grad_(False)  # the counter trips over learned queries
    return _flops(lambda: head.sample(context, mask, noise, flow.euler))


def _part(
    name: str,
    modules: list[nn.Module],
    tokens: int | None,
    flops: int | None = None,
    without: set[int] | None = None,
) -> Part:
    found: dict[int, Tensor] = {id(w): w for module in modules for w in module.parameters()}
    weights = [weight for key, weight in found.items() if key not in (without or set())]
    learned = sum(weight.numel() for weight in weights if weight.requires_grad)
    total = sum(weight.numel() for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return Part(name, learned, total - learned, size, tokens, flops)


def _sum(parts: list[Part]) -> Part:
    return Part(
        "sum",
        trainable=sum(part.trainable for part in parts),
        frozen=sum(part.frozen for part in parts),
        weights=sum(part.weights for part in parts),
        flops=sum(part.flops or 0 for part in parts),
    )
