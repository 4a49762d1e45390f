"""The parts of `vega-benchmark`: `prior`, `policy`, `train`, `dataset`, `simulate`.

Priors are measured in several forms, in time, memory and error; Wan also as written with diffusers, and fast.
A policy is measured stage by stage of a control step, training by the step and from stored data.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vega_policy.backbones import make_backbone
from vega_policy.benchmarks import busy_time, kernel_fields, matmul_ceiling, measure, operator_times
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig
from vega_policy.model.action_head import euler
from vega_policy.model.compilation import CapturedControlStep, capture_obstacle, compile_blocks
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, ModelConfig, PriorConfig
from vega_policy.model.observation import Observation, resize, to_float
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
from vega_policy.run_dir import use_available_cores
from vega_policy.training.config import TrainConfig
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.logging import Progress
from vega_policy.training.optim import EMA, clip_gradient, read_scalars
from vega_policy.training.train import make_trainer

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


CASES = ("live", "cached", "none")
"""Where the prior's features come from: computed in the step, from a cache, or there is no prior."""

VARIANTS = ("eager", "compiled")
"""As written, or with `compile=true`."""


def benchmark_train(
    config: ModelConfig,
    device: torch.device,
    batch: int,
    seconds: float,
    cases: tuple[str, ...] = CASES,
    variants: tuple[str, ...] = ("eager",),
) -> Iterator[dict[str, Any]]:
    """Yield one row a case and variant, of a model with random weights; bfloat16 autocast on CUDA.

    A row holds `prior`, `variant`, `ready_s` (seconds until the first step is done), milliseconds of the step
    and of its stages, and `samples_per_s`; on a GPU also milliseconds by kind of kernel, and the longest
    `kernels` and `operators`.

    Raises:
        ValueError: If a case or variant is unknown.
    """
    for option, known, given in (("cases", CASES, cases), ("variants", VARIANTS, variants)):
        if set(given) - set(known):
            raise ValueError(f"{option}: expected some of {', '.join(known)}; got {' '.join(given)}.")
    plain = replace(config.prior, engine="plain")  # cached features are computed once, not worth a compiler
    configs = {
        "live": config,
        "cached": replace(config, prior=plain),
        "none": replace(config, prior=PriorConfig(name="none")),
    }
    for case in cases:
        for variant in variants:
            torch._dynamo.reset()
            start = time.perf_counter()
            step = TrainingStep(configs[case], device, batch, cached=case == "cached")
            if variant == "compiled":
                compile_blocks(step.model)
            yield {"prior": case, "variant": variant} | step.measure(seconds, start)


class TrainingStep:
    """One training step on synthetic samples, as the trainer makes it."""

    def __init__(self, config: ModelConfig, device: torch.device, batch: int, cached: bool) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.cached = device, batch, cached
        self.model: Any = VegaModel(config).train().to(device)
        shape = (batch, config.views, 3, config.frame_size, config.frame_size)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.prior: Tensor | None = None
        if cached:
            parts = self._float_frames().split(32)
            self.prior = torch.cat([self.model.prior(part) for part in parts])
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=device.type == "cuda")
        self.average = EMA(self.model, 0.999)
        self.state = torch.randn(batch, config.state_dim, device=device)
        self.actions = torch.randn(batch, config.chunk_size, config.action_dim, device=device)
        self.instruction = ["lift the red cube"] * batch

    def measure(self, seconds: float, start: float) -> dict[str, Any]:
        """Time the step as a whole for about `seconds`, then each stage; `start` is when building began."""
        torch.manual_seed(1)
        loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        self.step()
        row: dict[str, Any] = {"loss": loss.item(), "ready_s": time.perf_counter() - start}
        row["step_ms"] = self._time(self.step, seconds)
        row["samples_per_s"] = 1000 * self.batch / row["step_ms"]
        row |= {stage: self._time(call, seconds / 4) for stage, call in self._stages().items()}
        if self.device.type == "cuda":
            row |= kernel_fields(self.step, self.device) | {"operators": operator_times(self.step)}
        return row

    def step(self) -> None:
        """Run forward, backward and update; wait once for the device, as the trainer does."""
        loss = self.loss()
        loss.backward()
        norm = clip_gradient(self.weights, 1.0)
        read_scalars({"loss": loss.detach(), "gradient_norm": norm})
        self.update()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Return the mean loss of the batch."""
        noise, time = self.model.head.sample_noise_and_time(self.actions)
        observation = self._observation()
        return self._autocast(lambda: self.model.loss(observation, self.actions, None, noise, time).mean())

    def update(self) -> None:
        """Step the optimizer and the average of the weights."""
        self.optimizer.step()
        self.average.update(1000)

    def _stages(self) -> dict[str, Callable[[], Any]]:
        def encode() -> Tensor:
            return self._autocast(lambda: self.model.semantic_features(self._observation()))

        stages: dict[str, Callable[[], Any]] = {
            "encoder_ms": encode,
            "encoder_backward_ms": lambda: encode().float().sum().backward(),
        }
        if self.model.prior is not None and not self.cached:
            stages["prior_ms"] = lambda: self.model.prior(self._float_frames())
        stages["forward_ms"] = self.loss
        stages["forward_backward_ms"] = lambda: self.loss().backward()
        return stages | {"update_ms": self.update}

    def _observation(self) -> Observation:
        return Observation(self.frames[:, :, None], self.state, self.instruction, prior=self.prior)

    def _float_frames(self) -> Tensor:
        return to_float(self.frames[:, :, None])

    def _autocast(self, call: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return call()

    def _time(self, call: Callable[[], Any], seconds: float) -> float:
        once = busy_time(call, self.device, repeat=2)
        return busy_time(call, self.device, repeat=max(3, int(1000 * seconds / once)))


WARM_UP = 3
"""Steps that are not timed: workers start, pages of a mapped cache are read."""


def benchmark_dataset(options: Any, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row for training from videos, from a warm cache, and from a warm cache without a prior.

    Each is timed for about `seconds`, at least five steps. A row holds `data`, `prior`, `steps_per_s`,
    `samples_per_s` and `data_wait_percent`.
    """
    use_available_cores()
    for cache, prior in (("none", options.prior), ("ram", options.prior), ("ram", "none")):
        with tempfile.TemporaryDirectory() as folder:
            config = _train_config(options, device, cache, prior, Path(folder))
            rate = _train_steps_per_second(config, device, seconds)
        yield {
            "data": "videos" if cache == "none" else "cache",
            "prior": prior,
            "steps_per_s": rate["steps_per_s"],
            "samples_per_s": rate["steps_per_s"] * options.batch,
            "data_wait_percent": rate["data_wait_percent"],
        }


def _train_config(options: Any, device: torch.device, cache: str, prior: str, folder: Path) -> TrainConfig:
    is_frozen = "semantic" in options.cached
    sizes: dict[str, Any] = {"width": 128, "depth": 1, "heads": 4, "latents": 8} if options.small else {}
    head = ActionHeadConfig(name="l1", width=128, depth=2, heads=4) if options.small else ActionHeadConfig()
    policy = VegaConfig(
        device=device.type,
        push_to_hub=False,
        frame_size=options.frame_size,
        prior=PriorConfig(name=prior),
        backbone=BackboneConfig(freeze_image_encoder=is_frozen, freeze_text_encoder=True, **sizes),
        head=head,
    )
    dataset = DatasetConfig(
        repo_id=options.repo_id,
        root=options.root,
        cache=cache,
        cached=[name for name in options.cached if name != "prior" or prior != "none"],
        cache_root=options.cache_root,  # outlives the measured runs, so that each finds it warm
    )
    precision = "bf16" if device.type == "cuda" else "no"
    return TrainConfig(
        policy, dataset, str(folder / "run"), steps=1_000_000, batch_size=options.batch, precision=precision
    )


def _train_steps_per_second(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, float]:
    accelerator = make_accelerator(cpu=device.type == "cpu", precision=config.precision)
    trainer = make_trainer(config, accelerator, None)
    progress = Progress(trainer.run, 0, config.steps, [], shown=False)
    batches = trainer.source.stream(trainer.sampler, 0)
    step = 0
    for step in range(1, WARM_UP + 1):
        trainer.optimize(batches, progress, step)
    progress.interval()
    end = time.perf_counter() + seconds
    while step < WARM_UP + 5 or time.perf_counter() < end:
        step += 1
        progress.step(trainer.optimize(batches, progress, step))
    return progress.interval()


def benchmark_simulate(suites: list[str], frame_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield one row for each suite of `envs` and rendering profile: full, fast, and none (no rendering).

    The first task of a suite is timed for about `seconds` with random actions. A row holds `suite`,
    `rendering`, `cameras`, `steps_per_s` and `reset_s`.
    """
    make: Callable[..., Any] = import_module("envs").make
    for suite in suites:
        for rendering in ("full", "fast", "none"):
            is_rendered = rendering != "none"
            profile = rendering if is_rendered else "full"
            env = make(suite, 0, frame_size=frame_size, rendering=profile, render=is_rendered)
            start = time.perf_counter()
            observation, _ = env.reset(seed=0)
            reset = time.perf_counter() - start
            rate = _env_steps_per_second(env, seconds)
            env.close()
            yield {
                "suite": suite,
                "rendering": rendering,
                "cameras": len(observation["pixels"]) if is_rendered else 0,
                "steps_per_s": rate,
                "reset_s": reset,
            }


def _env_steps_per_second(env: Any, seconds: float) -> float:
    random = np.random.default_rng(0)
    env.step(np.zeros(env.action_space.shape, np.float32))  # fills caches
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(random.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        steps += 1
    return steps / (time.perf_counter() - start)
