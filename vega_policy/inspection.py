"""What a policy consists of: parameters, tokens, memory and arithmetic of each part, without any weights."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vega_policy import flow
from vega_policy.backbones.architectures import PROMPT_TOKENS, without_weights
from vega_policy.backbones.compact import CompactBackbone
from vega_policy.backbones.encoders import MAX_WORDS
from vega_policy.backbones.tuning import CONNECTORS, ENCODERS, parts_of
from vega_policy.bases import BaseConfig
from vega_policy.model import VegaModel
from vega_policy.parts import ModelConfig
from vega_policy.priors.architectures import reader_without_weights
from vega_policy.priors.reader import PriorReader, as_clips

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
    prior = None if config.prior.name == "none" else reader_without_weights(config.prior, backbone.grid)
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
    parts.append(
        _part(f"expert {config.expert.name}", [model.expert], config.chunk_size, _act(model, length))
    )
    return [*parts, _sum(parts)]


def refuse_base(base: BaseConfig) -> None:
    """Refuse a policy built upon a pre-trained one: its networks are known from its checkpoint alone.

    Raises:
        ValueError: If there is a base.
    """
    if base.name != "none":
        raise ValueError(
            f"base={base.name}: the networks of a pre-trained policy lie in its checkpoint, and are not "
            "known without it; backbone and expert of the config mean nothing here. Inspect a policy of this "
            "package's own parts (base=none backbone=... expert=...)."
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
    if not isinstance(prior, PriorReader):
        return None
    times = config.prior.clip_frames if prior.clip == "history" else 1
    frames = torch.empty(1, config.views, times, 3, *prior.input_size, device="meta")
    return _flops(lambda: prior.read_clips(as_clips(frames, prior.clip), None))


def _fusion_flops(model: Any, n: int) -> int:
    views, width = model.config.views, model.backbone.width
    stream, context = torch.empty(views, n, width, device="meta"), torch.empty(views, width, device="meta")
    return _flops(lambda: model.fusion(stream, stream, context if model.fusion.reads_instruction else None))


def _act(model: Any, length: int) -> int:
    config = model.config
    context = torch.empty(1, length, model.backbone.width, device="meta")
    mask = torch.ones(1, length, dtype=torch.bool, device="meta")
    noise = torch.empty(1, config.chunk_size, config.action_dim, device="meta")
    expert = copy.deepcopy(model.expert).requires_grad_(False)  # the counter trips over learned queries
    return _flops(lambda: expert.sample(context, mask, noise, flow.euler))


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
