"""Sizes of a policy: parameters, tokens, memory and arithmetic of each part, computed without weights.

Networks of published sizes are built on the meta device to count, or with random weights to measure time.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vega_policy.backbones.compact import MAX_WORDS, CompactBackbone
from vega_policy.backbones.vlm import CONNECTORS, ENCODERS, VisionLanguageBackbone, parts_of
from vega_policy.model.config import BackboneConfig, BaseConfig, ModelConfig, PriorConfig
from vega_policy.model.vega import VegaModel
from vega_policy.priors import PRIORS, make_prior, resolve
from vega_policy.priors.base import BasePrior, as_clips

PUBLISHED = json.loads(Path(__file__).with_suffix(".json").read_text())

PRIOR_ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = PUBLISHED["priors"]
"""Prior -> network -> arguments other than the defaults of its class (in transformers: of its config)."""


def prior_class(name: str) -> Any:
    """Return the class of a prior that is built from networks."""
    return resolve_name(PRIORS[name].build).__self__


def build_networks(name: str, device: str = "meta") -> dict[str, Any]:
    """Build the networks of a prior at their published sizes, or those of its registry entry.

    `meta` gives shapes and takes no memory; on another device weights are random.

    Raises:
        ValueError: If the prior has no published networks.
    """
    architecture = PRIOR_ARCHITECTURES.get(name) or (PRIORS[name].architecture if name in PRIORS else None)
    if architecture is None:
        raise ValueError(
            f"No architecture of the prior {name!r}. Known: {', '.join(sorted(PRIOR_ARCHITECTURES))}."
        )
    classes = prior_class(name).networks
    with torch.device(device):
        networks = {part: _build(classes[part], options) for part, options in architecture.items()}
    # diffusers' mixing factors are made on the CPU
    return {part: network.to(device) for part, network in networks.items()}


def _build(cls: Any, options: dict[str, Any]) -> nn.Module:
    is_transformers = issubclass(cls, PreTrainedModel)  # those take a config, diffusers' take its fields
    make_config: Any = cls.config_class if is_transformers else None
    return cls(make_config(**options)) if is_transformers else cls(**options)


def published_sizes(name: str) -> dict[str, int]:
    """Count the parameters of each whole network of a prior; empty for a prior without published networks."""
    if name not in PRIOR_ARCHITECTURES:
        return {}
    networks = build_networks(name)
    if "." in networks:  # V-JEPA 2's predictor is no part of the published count
        network = networks["."]
        networks = {"encoder": network.encoder if name == "vjepa2" else network}
    if name == "sd_vae":
        networks["its encoder"] = networks["vae"].encoder
    return {
        part: sum(weight.numel() for weight in network.parameters()) for part, network in networks.items()
    }


def build_without_weights(config: PriorConfig, grid: tuple[int, int], device: str = "meta") -> Any:
    """Build a prior at its published size, cut behind the layer that is read, for a token grid (gh, gw).

    `meta` gives shapes and takes no memory; on another device weights are random.

    Raises:
        ValueError: If the prior has no networks of published sizes.
    """
    config = resolve(replace(config, engine="plain"))
    if config.name in ("random", "wan_tiny", "wan_tiny_untrained"):
        return make_prior(config, grid).to(device)
    if config.name not in PRIOR_ARCHITECTURES:
        known = ", ".join(sorted(PRIOR_ARCHITECTURES))
        raise ValueError(f"The prior {config.name!r} has no networks of published size. Known: {known}.")
    parts = build_networks(config.name, device)
    for network in parts.values():
        cast_as_loaded(network, getattr(torch, str(config.dtype)))
    if "transformer" in parts:
        parts["prompt"] = torch.zeros(1, parts["transformer"].config.text_dim, device=device)
    if config.name == "sd21":
        parts["prompt"] = torch.zeros(77, 1024, device=device)
        betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        parts["schedule"] = DDIMScheduler(**betas).alphas_cumprod  # its values are read, so not on `meta`
    with torch.device(device):
        prior = prior_class(config.name)(parts, config, grid, "none")
    return prior.eval().requires_grad_(False)


def cast_as_loaded(network: Any, dtype: torch.dtype) -> None:
    """Cast weights as `from_pretrained` does, in place: some modules of diffusers stay in float32."""
    kept = set(network._keep_in_fp32_modules or ())
    for name, weight in network.named_parameters():
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(dtype)


PROMPT_TOKENS = 32
"""Assumed number of tokens of an instruction in its chat template."""

ADAM_BYTES = 12
"""Bytes of gradient and two moments of a trainable float32 weight."""


@dataclass(frozen=True)
class Architecture:
    """The published sizes of an image-text-to-text model; it has either a side or a stride."""

    model_type: str  # in transformers
    fields: dict[str, Any]  # of its `config.json`
    side: int | None = None  # tokens along a side of a frame, if their number is fixed
    stride: int | None = None  # pixels of a token, if the number follows the frame's size

    def grid_side(self, frame_size: int) -> int:
        """Return the number of tokens along a side of a frame."""
        return self.side or round(frame_size / (self.stride or 1))


BACKBONE_ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(**published) for name, published in PUBLISHED["backbones"].items()
}
"""Backbone -> its published sizes."""


@dataclass(frozen=True)
class Part:
    """Sizes of one part of a policy."""

    name: str
    trainable: int  # parameters
    frozen: int  # parameters
    weights: int  # bytes
    tokens: int | None = None  # that leave it in one control step, all views together
    flops: int | None = None  # of one control step with a new chunk; a product and its sum are two

    def row(self) -> dict[str, Any]:
        """Return the columns of a printed table."""
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
    """Return the sizes of every part of a policy; the last entry is their sum.

    Arithmetic is that of one observation. Hugging Face models count as two operations for each weight of
    their linear layers and token, plus full attention (also where it is windowed); everything else is counted
    while it runs on the meta device. Text encoders and word embeddings count as none.

    Raises:
        ValueError: If the published sizes of a part are not known.
    """
    if config.backbone.name == "compact":
        sizes = config.state_dim, config.views, config.frame_size
        backbone: Any = CompactBackbone(config.backbone, *sizes).to("meta")
    else:
        backbone = without_weights(config.backbone, config.state_dim, config.views, config.frame_size)
    prior = None if config.prior.name == "none" else build_without_weights(config.prior, backbone.grid)
    with torch.device("meta"):
        model: Any = VegaModel(config, (backbone, prior)).eval()
    n = backbone.grid[0] * backbone.grid[1]
    tokens = config.views * n
    parts = []
    if prior is not None:
        prior.requires_grad_(False)
        fused = model.fusion.tokens(n) * config.views
        parts += [
            _part(f"prior {config.prior.name}", [prior], tokens, _prior_flops(prior, config)),
            _part(
                "projector of the prior",
                [model.project],
                tokens,
                _projector_flops(model, prior.width, tokens),
            ),
            _part(f"fusion {config.fusion.name}", [model.fusion], fused, _fusion_flops(model, n)),
        ]
    parts += (
        _compact_parts(model, tokens) if isinstance(backbone, CompactBackbone) else _vlm_parts(model, tokens)
    )
    length = parts[-1].tokens or 1
    if model.forecast is not None:
        parts.append(_forecast_part(model, tokens, length))
        length += parts[-1].tokens or 0
    if model.displacement is not None:
        parts.append(_part("displacement", [model.displacement], 1, _displacement_flops(model, length)))
    flops = _head_flops(model, length)
    parts.append(_part(f"head {config.head.name}", [model.head], config.chunk_size, flops))
    total = {
        name: sum(getattr(part, name) or 0 for part in parts) for name in ("trainable", "frozen", "weights")
    }
    return [*parts, Part("sum", **total, flops=sum(part.flops or 0 for part in parts))]


def refuse_base(base: BaseConfig) -> None:
    """Refuse a policy built upon a pre-trained one: its networks are known from its checkpoint only.

    Raises:
        ValueError: If there is a base.
    """
    if base.name != "none":
        raise ValueError(
            f"base={base.name}: the networks of a pre-trained policy lie in its checkpoint. Inspect a policy "
            "of this package's own parts (base=none backbone=... head=...)."
        )


def without_weights(
    config: BackboneConfig,
    state_dim: int,
    views: int,
    frame_size: int,
    device: str = "meta",
    prompts: Callable[[int, int], Any] | None = None,
) -> VisionLanguageBackbone:
    """Build a backbone at its published sizes, frozen and adapted as its config says.

    `device="meta"` takes no memory; others get random weights. `prompts` makes the replacement of the
    processor from the tokens along a frame's side and the id of a placeholder; None takes `Placeholders`.

    Raises:
        ValueError: If the sizes of the backbone are not listed.
    """
    if config.name not in BACKBONE_ARCHITECTURES:
        known = ", ".join(sorted(BACKBONE_ARCHITECTURES))
        raise ValueError(f"No published sizes of the backbone {config.name!r}. Known: {known}.")
    published = BACKBONE_ARCHITECTURES[config.name]
    architecture = AutoConfig.for_model(published.model_type, **published.fields)
    side, token = published.grid_side(frame_size), architecture.image_token_id
    encoder: Any = Placeholders(views, side, token) if prompts is None else prompts(side, token)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=getattr(torch, config.dtype))
        return VisionLanguageBackbone(model.base_model, encoder, config, state_dim)


class Placeholders:
    """Replacement of a processor: as many placeholders as the model has tokens of a frame."""

    image_hash = "none"

    def __init__(self, views: int, side: int, image_token: int) -> None:
        self.views = views
        self._grid = torch.tensor([[1, 2 * side, 2 * side]] * views, device="cpu")
        self._ids = torch.full((1, views * side**2), image_token, device="cpu")
        self.processor = SimpleNamespace(image_processor=None)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return the ids of the placeholders [1 v*n]."""
        return {"input_ids": self._ids, "attention_mask": torch.ones_like(self._ids)}


def _compact_parts(model: Any, tokens: int) -> list[Part]:
    config, backbone = model.config, model.backbone
    frames = torch.empty(1, config.views, 3, config.frame_size, config.frame_size, device="meta")
    length = config.views * (config.backbone.latents or tokens // config.views) + 1 + MAX_WORDS
    context = torch.empty(1, length, backbone.width, device="meta")
    flops = _flops(lambda: [block(context) for block in backbone.blocks])
    trunk = [part for name, part in backbone.named_children() if not name.endswith("_encoder")]
    return [
        _part("image encoder", [backbone.image_encoder], tokens, _flops(lambda: backbone.encode(frames))),
        _part("text encoder", [backbone.text_encoder], MAX_WORDS),
        _part("trunk", trunk, length, flops),
    ]


def _vlm_parts(model: Any, tokens: int) -> list[Part]:
    backbone, views = model.backbone, model.config.views
    connectors = parts_of(backbone.model, CONNECTORS)
    inner = {id(weight) for part in connectors for weight in part.parameters()}
    encoder, decoder = parts_of(backbone.model, ENCODERS)[0], backbone.model.get_decoder()
    patches = _patches(backbone.model.config, tokens // views)
    encoding = views * (_linear_flops(encoder, patches) + _attention_flops(encoder, patches))
    connecting = sum(_linear_flops(part, tokens) for part in connectors if part not in set(encoder.modules()))
    length = tokens + PROMPT_TOKENS
    decoding = _linear_flops(decoder, length) + _attention_flops(decoder, length)
    state = backbone.project_state
    return [
        _part("image encoder", [encoder], views * patches, encoding, without=inner),
        _part("connector", connectors, tokens, connecting),
        _part("language model", [decoder], length, decoding),
        _part("projector of the state", [state], length + 1, _linear_flops(state, 1)),
    ]


def _patches(config: Any, tokens: int) -> int:
    """Return the number of tokens of one frame inside the image encoder."""
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        return tokens * vision.spatial_merge_size**2
    return (vision.image_size // vision.patch_size) ** 2


def _linear_flops(module: nn.Module, tokens: int) -> int:
    return 2 * tokens * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _attention_flops(module: nn.Module, tokens: int) -> int:
    """Return the operations of full self-attention: 4 n n d for each query projection of width d."""
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


def _projector_flops(model: Any, width: int, tokens: int) -> int:
    features = torch.empty(1, tokens, width, device="meta")
    return _flops(lambda: model.project(features))


def _fusion_flops(model: Any, n: int) -> int:
    views, width = model.config.views, model.backbone.width
    stream, context = torch.empty(views, n, width, device="meta"), torch.empty(views, width, device="meta")
    return _flops(lambda: model.fusion(stream, stream, context if model.fusion.reads_instruction else None))


def _forecast_part(model: Any, tokens: int, length: int) -> Part:
    """Return the sizes of the forecast, which a control step computes only if the action head reads it."""
    config, width = model.config, model.backbone.width
    now = torch.empty(1, config.views, tokens // config.views, width, device="meta")
    context = torch.empty(1, length, width, device="meta")
    mask = torch.ones(1, length, dtype=torch.bool, device="meta")
    read = config.forecast.read
    flops = _flops(lambda: model.forecast(now, context, mask)) if read else 0
    return _part("forecast", [model.forecast], tokens * len(config.forecast.steps) if read else 0, flops)


def _displacement_flops(model: Any, length: int) -> int:
    context = torch.empty(1, length, model.backbone.width, device="meta")
    head = copy.deepcopy(model.displacement).requires_grad_(False)  # the counter fails on learned queries
    return _flops(lambda: head(context, torch.ones(1, length, dtype=torch.bool, device="meta")))


def _head_flops(model: Any, length: int) -> int:
    config = model.config
    context = torch.empty(1, length, model.backbone.width, device="meta")
    mask = torch.ones(1, length, dtype=torch.bool, device="meta")
    noise = torch.empty(1, config.chunk_size, config.action_dim, device="meta")
    head = copy.deepcopy(model.head).requires_grad_(False)  # the counter fails on learned queries
    return _flops(lambda: head.sample(context, mask, noise))


def _part(
    name: str,
    modules: list[nn.Module],
    tokens: int | None,
    flops: int | None = None,
    without: set[int] | None = None,
) -> Part:
    found: dict[int, Tensor] = {id(w): w for module in modules for w in module.parameters()}
    weights = [weight for key, weight in found.items() if key not in (without or set())]
    trainable = sum(weight.numel() for weight in weights if weight.requires_grad)
    total = sum(weight.numel() for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return Part(name, trainable, total - trainable, size, tokens, flops)
