"""Parts `prior` and `policy`: a prior in several forms, and each stage of a control step.

Priors are measured in time, memory and error; Wan also as written with diffusers, and fast.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vega_policy.backbones import make_backbone
from vega_policy.benchmarks import busy_time, kernel_fields, matmul_ceiling, measure
from vega_policy.model.action_head import euler
from vega_policy.model.compilation import CapturedControlStep, capture_obstacle
from vega_policy.model.config import ModelConfig, PriorConfig
from vega_policy.model.observation import Observation, resize
from vega_policy.model.sizes import (
    BACKBONE_ARCHITECTURES,
    PROMPT_TOKENS,
    Placeholders,
    build_networks,
    build_without_weights,
    cast_as_loaded,
    without_weights,
)
from vega_policy.model.vega import VegaModel
from vega_policy.priors import PRIORS, resolve
from vega_policy.priors.wan import LatentWorldSimulator
from vega_policy.priors.wan_fast import CapturedWan, FastWan, Plan, capture

WAN = ("wan2.1_t2v_1.3b", "wan2.2_ti2v_5b", "wan_tiny")
"""Priors that are measured by all paths, with random weights; all others only as a policy runs them."""

PATHS = ("released", "all_blocks", "early_stop", "fast")
"""As the released code runs; as a user of diffusers would write it, with all blocks or up to the layer; the
exact reductions.
"""

CHOICES = ("encode", "read", "attention", "layer", "future")
"""Options of the path `fast`, such as `fast/encode=8/read=16/attention=flash/layer=12`; `future=2` reads
frames with two slots of noise behind them (`clip=future`).
"""

CELL = 16
"""Pixels of a token of the grid to which features are pooled, as with the compact backbone."""


def _product_flops(bias: Any, first: Any, second: Any, **_: Any) -> int:
    """Count the operations of a product with bias and activation, given shapes [d], [m k], [k d]."""
    return 2 * first[0] * first[1] * second[1]


FLOPS = {torch.ops.aten._addmm_activation: _product_flops}
"""Operations that torch's counter does not know."""

Encode = Callable[[Tensor], Tensor]


def benchmark_prior(
    name: str,
    device: torch.device,
    sizes: list[tuple[int, int]],
    batches: list[int],
    paths: list[str],
    seconds: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Yield one row a size (height and width in pixels), number of frames and path of a prior of `WAN`.

    A row holds the fields of `measure`, `frames_per_s` and the relative `error` against float32; for the fast
    paths also the seconds it took to build and the fields of `Fast.measure_stages`.
    """
    ceiling = matmul_ceiling(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for size in sizes:
        wan = RandomWan(name, device, size)
        for n in batches:
            frames = torch.rand(n, 3, *size, device=device)
            exact: dict[int, Tensor] = {}
            for path in paths:
                slots = (parse_path(path) or FastPath(Plan(), None)).slots
                if slots not in exact:
                    exact[slots] = wan.encode_exactly(frames, slots)
                expected = exact[slots]
                torch._dynamo.reset()
                start = time.perf_counter()
                encode = wan.path(path, frames)
                built = time.perf_counter() - start
                row = {"path": path, **_measure_encoder(encode, frames, device, seconds)}
                if path != "released":  # its features are not kept
                    row["error"] = ((encode(frames).float() - expected).norm() / expected.norm()).item()
                if isinstance(encode, Fast):
                    row |= {"build_s": built} | encode.measure_stages(frames, ceiling)
                yield row


@torch.no_grad()
def benchmark_any_prior(
    name: str, device: torch.device, sizes: list[tuple[int, int]], batches: list[int], seconds: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Yield one row a size and number of frames of any prior, as a policy runs it with `engine=plain`.

    Weights are float32 on the CPU and of the prior's own type elsewhere. `reads` is the size to which the
    prior resizes the frames.

    Raises:
        ValueError: If the prior is unknown or has no networks of its own.
    """
    dtype = "float32" if device.type == "cpu" or name not in PRIORS else PRIORS[name].dtype
    torch.manual_seed(0)
    for size in sizes:
        grid = (size[0] // CELL, size[1] // CELL)
        prior = build_without_weights(PriorConfig(name=name, dtype=dtype), grid, str(device))
        height, width = prior.input_size
        for n in batches:
            frames = torch.rand(1, n, 1, 3, *size, device=device)
            row = _measure_encoder(prior, frames, device, seconds)
            yield {"path": "plain", **row, "reads": f"{height}x{width}"}


def _measure_encoder(encode: Encode, frames: Tensor, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time an encoder of frames [... 3 h w]."""
    height, width = frames.shape[-2:]
    n = frames.shape[:-3].numel()
    row = measure(lambda: encode(frames), device, seconds)
    return {"size": f"{height}x{width}", "frames": n, **row, "frames_per_s": 1000 * n / row["p50_ms"]}


@dataclass(frozen=True)
class FastPath:
    """Options of the fast path: how a batch is divided, and the block that is read, if not the prior's."""

    plan: Plan
    layer: int | None
    slots: int = 0  # of noise behind a frame


def parse_path(name: str) -> FastPath | None:
    """Return the options of a fast path, or None for another one.

    Raises:
        ValueError: If path or option is unknown.
    """
    path, *options = name.split("/")
    pairs = [option.partition("=") for option in options]
    unknown = [key for key, _, value in pairs if key not in CHOICES or not value]
    if path not in PATHS or unknown or (options and path != "fast"):
        raise ValueError(
            f"paths: expected some of {', '.join(PATHS)}, the last also with {', '.join(CHOICES)}, such as "
            f"fast/encode=8; got {name}."
        )
    if path != "fast":
        return None
    given = {key: value for key, _, value in pairs}
    counts = {key: int(given[key]) for key in ("encode", "read", "layer", "future") if key in given}
    plan = Plan(counts.get("encode"), counts.get("read"), given.get("attention", "cudnn"))
    return FastPath(plan, counts.get("layer"), counts.get("future", 0))


class RandomWan:
    """A Wan prior with random weights for frames of one size, in all its forms."""

    def __init__(self, name: str, device: torch.device, size: tuple[int, int]) -> None:
        self.device, self.size = device, size
        config = resolve(PriorConfig(name=name, engine="plain"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        parts = build_networks(name, str(device))
        parts["vae"].decoder = None
        for network in parts.values():
            cast_as_loaded(network, dtype)
            network.eval()
        transformer = parts["transformer"]
        self.whole = copy.copy(transformer)  # keeps all its blocks when the prior drops some
        self.whole._modules = dict(transformer._modules)
        parts["prompt"] = torch.randn(1, transformer.config.text_dim, device=device)
        stride = parts["vae"].spatial_compression_ratio * transformer.config.patch_size[-1]
        self.prior = LatentWorldSimulator(parts, config, (size[0] // stride, size[1] // stride), "random")
        self.prior = self.prior.to(device).eval().requires_grad_(False)

    def path(self, name: str, frames: Tensor) -> Encode:
        """Return one way to compute the features, frames [n 3 h w] -> [n d gh gw]; see `PATHS`."""
        fast = parse_path(name)
        if fast is not None:
            return Fast(self, frames, fast)
        if name == "released":
            return Released(self)
        if name == "all_blocks":
            return lambda frames: encode_with_all_blocks(self.prior, self.whole, frames)
        return lambda frames: self.prior.encode_frames(frames, None)

    @torch.no_grad()
    def encode_exactly(self, frames: Tensor, slots: int = 0) -> Tensor:
        """Run the plain path in float32 with the same weights, four frames at a time."""
        prior = with_slots(copy.deepcopy(self.prior).float(), slots)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if slots:
                return torch.cat([prior.encode_future(part, None, None) for part in frames.split(4)])
            return torch.cat([prior.encode_frames(part, None) for part in frames.split(4)])


def with_slots(prior: Any, slots: int) -> Any:
    """Return a prior of frames as one of `clip=future` with pure noise in its slots; weights are shared."""
    if not slots:
        return prior
    other = copy.copy(prior)
    other.clip, other.slots, other.noise_level = "future", slots, 1.0
    return other


@torch.no_grad()
def encode_with_all_blocks(prior: LatentWorldSimulator, transformer: Any, frames: Tensor) -> Tensor:
    """Run the paper's equations with diffusers' modules called as they are, [n 3 h w] -> [n d gh gw]."""
    outputs: list[Tensor] = []
    block = transformer.blocks[prior.layer]
    hook = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    noisy = prior.add_noise(prior.encode_latent(frames[:, :, None]), None)
    time = torch.full((len(frames),), 1000 * prior.noise_level, device=frames.device)
    prompt = prior.prompt.to(transformer.dtype).expand(len(frames), -1, -1)
    transformer(noisy.to(transformer.dtype), time, prompt)
    hook.remove()
    return outputs[0].transpose(1, 2).unflatten(2, (-1, frames.shape[3] // prior.patch))


class Released:
    """As the released code runs: float32 weights under bfloat16 autocast, frames encoded one at a time."""

    def __init__(self, wan: RandomWan) -> None:
        self._prior = copy.deepcopy(wan.prior).float()
        self._whole = copy.deepcopy(wan.whole).float()

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Run all blocks on frames [n 3 h w]."""
        prior, n = self._prior, len(frames)
        with torch.autocast(frames.device.type, torch.bfloat16):
            latent = torch.cat([prior.encode_latent(frame[None, :, None]) for frame in frames])
            noisy = prior.add_noise(latent, None)
            time = torch.full((n,), 1000 * prior.noise_level, device=frames.device)
            self._whole(noisy, time, prior.prompt.expand(n, -1, -1))
        return noisy


class Fast:
    """The fast form of a prior, captured on a GPU for batches of the length of `frames` [n 3 h w]."""

    def __init__(self, wan: RandomWan, frames: Tensor, path: FastPath) -> None:
        prior = with_slots(_cut(wan.prior, path.layer), path.slots)
        self._fast, self._device = FastWan(prior), wan.device
        latent = torch.empty(len(frames), *self._fast.latent, device=wan.device)
        self._noise = wan.prior.noise(latent, None)
        is_gpu = wan.device.type == "cuda"
        self._run = CapturedWan(self._fast, frames, self._noise, path.plan) if is_gpu else self._fast

    def __call__(self, frames: Tensor) -> Tensor:
        """Return features, [n 3 h w] -> [n d gh gw], of k slots [n 1+k d gh gw]."""
        return self._run(frames, self._noise, self._fast.noise_level)

    @torch.no_grad()
    def measure_stages(self, frames: Tensor, ceiling: float) -> dict[str, Any]:
        """Time encoder and transformer apart; compare the latter with the ceiling in TFLOP/s."""
        noise = self._noise.expand(len(frames), *self._fast.latent).contiguous()
        tokens = self._run.embed(frames, noise)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            self._fast.run_blocks(tokens)
        vae = self._graphed_time(lambda: self._run.embed(frames, noise))
        dit = self._graphed_time(lambda: self._run.run_blocks(tokens))
        rate = counter.get_total_flops() / dit / 1e9
        shares = {"dit_tflops": rate, "ceiling_tflops": ceiling, "dit_of_ceiling": rate / ceiling}
        return {"vae_ms": vae, "dit_ms": dit, **shares, **kernel_fields(lambda: self(frames), self._device)}

    def _graphed_time(self, call: Callable[[], Tensor]) -> float:
        if self._device.type != "cuda":
            return busy_time(call, self._device, repeat=5)
        graph, _ = capture(call)
        return busy_time(graph.replay, self._device)


def _cut(prior: Any, layer: int | None) -> Any:
    """Return the prior with no block behind a layer; weights are shared."""
    if layer is None:
        return prior
    shorter, transformer = copy.copy(prior), copy.copy(prior.transformer)
    transformer._modules = transformer._modules | {"blocks": prior.transformer.blocks[: layer + 1]}
    shorter._modules = prior._modules | {"transformer": transformer}
    return shorter


@torch.no_grad()
def benchmark_policy(config: ModelConfig, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row a stage of a control step (batch 1), of the whole step, and of the captured one on a GPU.

    Weights are random. A row holds `stage` and the fields of `measure`.
    """
    model: Any = random_model(config, device)
    side = config.frame_size
    frames = torch.rand(1, config.views, 1, 3, side, side, device=device)
    state = torch.randn(1, config.state_dim, device=device)
    noise = torch.randn(1, config.chunk_size, config.action_dim, device=device)
    observation = Observation(frames, state, ["lift the red cube"])
    for stage, call in _stages(model, observation, noise).items():
        yield {"stage": stage, **measure(call, device, seconds)}
    if capture_obstacle(model, observation, noise) is None:
        captured = CapturedControlStep(model, observation, noise)
        row = measure(lambda: captured(observation, noise), device, seconds)
        error = (captured(observation, noise) - model.sample_actions(observation, noise)).abs().max().item()
        yield {"stage": "whole, captured", **row, "error": error}


def _stages(model: Any, observation: Observation, noise: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the stages of `VegaModel.sample_actions`, each on the result of the one before."""
    semantic = model.semantic_features(observation)
    prior = None if model.prior is None else model.prior_features(observation)
    cached = Observation(None, observation.state, observation.instruction, semantic, prior)
    tokens = model.encode_observation(cached)
    inputs = (tokens, observation.instruction, observation.state, semantic)
    context, mask = model.backbone.encode_context(*inputs)
    stages: dict[str, Callable[[], Any]] = {
        "semantic encoder": lambda: model.semantic_features(observation),
        "prior": lambda: model.prior_features(observation),
        "projectors and fusion": lambda: model.encode_observation(cached),
        "backbone": lambda: model.backbone.encode_context(*inputs),
        "head": lambda: model.head.sample(context, mask, noise, euler),
        "whole": lambda: model.sample_actions(observation, noise),
    }
    if model.prior is None:
        del stages["prior"]
    return stages


def random_model(config: ModelConfig, device: torch.device) -> VegaModel:
    """Build a model in evaluation mode; networks that would come from the hub have random weights.

    Raises:
        ValueError: If the sizes of a part are not listed, or its images need a processor of its own.
    """
    torch.manual_seed(0)
    if config.backbone.name == "compact":
        backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
    else:
        backbone = _random_backbone(config, device)
    prior: Any = None
    if config.prior.name != "none":
        prior = build_without_weights(config.prior, backbone.grid, str(device))
        if hasattr(prior, "use_engine"):
            prior.use_engine(config.prior.engine)
    return VegaModel(config, (backbone, prior)).eval().to(device)


def _random_backbone(config: ModelConfig, device: torch.device) -> Any:
    published = BACKBONE_ARCHITECTURES.get(config.backbone.name)
    if published is not None and published.side is None:
        raise ValueError(
            f"backbone: {config.backbone.name!r} needs a processor of its own. Take compact or one of "
            f"{', '.join(name for name, known in BACKBONE_ARCHITECTURES.items() if known.side is not None)}."
        )

    def prompts(side: int, image_token: int) -> ImagePlaceholders:
        assert published is not None  # without_weights refuses unknown ones before
        size = published.fields["vision_config"]["image_size"]
        return ImagePlaceholders(
            config.views, side, image_token, size, nested=published.model_type == "smolvlm"
        )

    return without_weights(
        config.backbone, config.state_dim, config.views, config.frame_size, str(device), prompts
    )


class ImagePlaceholders(Placeholders):
    """Stands in for a processor that only resizes and scales: placeholders, an instruction, pixel values.

    `image_size` is the side of the image that the model reads; `nested` groups images by sample, [1 n 3 h w].
    """

    def __init__(self, views: int, side: int, image_token: int, image_size: int, nested: bool) -> None:
        super().__init__(views, side, image_token)
        self._size, self._nested = image_size, nested
        self._ids = torch.cat([self._ids, torch.ones(1, PROMPT_TOKENS, dtype=torch.long)], dim=1)

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return ids of the placeholders and of an instruction, [b v*n+l], and their mask."""
        ids = self._ids.to(device).expand(len(sentences), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Bring frames in [0, 1] to the model's size and to [-1, 1], [n 3 h w]."""
        pixels = 2 * resize(frames, self._size, self._size) - 1
        return {"pixel_values": pixels[None] if self._nested else pixels}
