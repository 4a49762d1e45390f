"""Training entry point: `train` builds the parts of a run from its config and trains."""

import json
import logging
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from lerobot.configs import PreTrainedConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.processor.converters import create_transition
from safetensors.torch import load_file
from torch import Tensor

from vega_policy.checkpoints import PRETRAINED, fetch_checkpoint, newest_intact
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data import feature_cache
from vega_policy.data.dataset import (
    ACTION,
    STATE,
    DatasetError,
    FrameTable,
    check_finite,
    fingerprint_dataset,
    match_features,
    normalization_stats,
    open_dataset,
    read_table,
)
from vega_policy.data.dataset_files import describe_values, fingerprint_frames
from vega_policy.data.loader import CachedSource, Source, VideoSource
from vega_policy.data.video import FrameRows, frames_in_order, sampled_mean_frames
from vega_policy.model.compilation import compile_blocks
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.processor_vega import make_vega_pre_post_processors
from vega_policy.provenance import use_available_cores
from vega_policy.run_dir import check_space, lock_folder
from vega_policy.training import checkpoint as checkpoints
from vega_policy.training.checkpoint import MEAN_FRAMES, Origin, TrainState, check_folder, claim_folder
from vega_policy.training.config import TrainConfig, encode
from vega_policy.training.cuda_graph import check_capturable
from vega_policy.training.distributed import make_accelerator, shard
from vega_policy.training.failure_guards import NonFiniteGuard
from vega_policy.training.logging import push_to_hub, record_start
from vega_policy.training.optim import EMA, make_optimizer
from vega_policy.training.trainer import TrainData, Trainer
from vega_policy.training.validation import spread_evenly

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Train a policy, or resume a run, and return the folder of the last checkpoint.

    The policy's features are filled in from the dataset. The checkpoint's `pretrained_model` loads with
    `from_pretrained`.

    Raises:
        ValueError: If the output folder, the dataset or the cache does not fit; says what to do.
        FolderInUseError: If another process trains into the folder.
        TrainingStoppedError: If too many steps were not finite, or memory is full.
        DiskFullError: If the disk is full.
    """
    if config.precision == "bf16" and config.vega.device == "cpu":
        raise ValueError("precision=bf16 needs a GPU; policy.device is cpu. Set precision=no.")
    use_available_cores()
    accelerator = make_accelerator(cpu=config.vega.device == "cpu", precision=config.precision)
    main = accelerator.is_main_process
    with lock_folder(Path(config.output_dir)) if main else nullcontext():
        checkpoint = choose_checkpoint(config, accelerator)
        if checkpoint is not None and checkpoints.read_step(checkpoint) >= config.last_step:
            logger.info("%s is complete up to step %d; nothing to do.", config.output_dir, config.last_step)
            return checkpoint
        trainer = make_trainer(config, accelerator, checkpoint)
        last = trainer.fit()
        if main and config.vega.push_to_hub and config.last_step == config.steps:
            push_to_hub(config, trainer.data)
        return last


def choose_checkpoint(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint that the run resumes from, after refusing an output folder that does not fit.

    The main process chooses it for all.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        check_folder(config)
        found = [newest_intact(Path(config.output_dir))]
    return broadcast_object_list(found)[0]


def make_trainer(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> Trainer:
    """Build all parts of a run, as a checkpoint left them if one is given, and claim its folder."""
    saved = encode(config)  # before the policy resolves its own config
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.dataset.cache == "gpu" and accelerator.device.type == "cpu":
        raise ValueError("dataset.cache=gpu needs a GPU; this run trains on the cpu. Take dataset.cache=ram.")
    data = load_data(config)
    if config.capture:
        check_capturable(config, accelerator.device, data.instructions)
    origin: Origin = {"num_processes": world, "batch_size": config.batch_size}
    origin |= {f"dataset {part}": value for part, value in data.fingerprint.items()}
    if checkpoint is not None:
        checkpoints.check_origin(checkpoint, origin)
    set_seed(config.seed)
    policy = make_policy(config, checkpoint, accelerator.device)
    source, mean_frames = make_source(config, policy, data, checkpoint)
    if config.sharding == "full":
        shard(accelerator, policy)
    state = _make_state(config, policy, mean_frames, data, checkpoint)
    if accelerator.is_main_process:
        run = Path(config.output_dir)
        claim_folder(config, saved, state.step)
        check_space(run, checkpoints.estimate_size(state), "a checkpoint")
        record_start(run, state.step, world)
        logger.info(_summarize(config, policy, data, state.step))
    accelerator.wait_for_everyone()
    if config.compile:
        compile_blocks(policy.model)
    trainer = Trainer(config, accelerator, state, source, data, origin)
    set_seed(config.seed + 1 + rank)
    if checkpoint is not None:
        checkpoints.load_rng_state(checkpoint, rank, state.generator)
    return trainer


def load_data(config: TrainConfig) -> TrainData:
    """Open the dataset, and refuse one that the policy cannot learn from."""
    if config.dataset.cache != "none":
        if config.vega.base.name != "none":
            raise ValueError("dataset.cache: a base embeds images by itself; set dataset.cache=none.")
        feature_cache.check_cacheable(config.vega.backbone, config.vega.prior, config.dataset.cached)
    dataset = open_dataset(config.dataset)
    match_features(config.vega, dataset)
    root = Path(dataset.root)
    table = read_table(root, dataset.stored_names, config.dataset.task)
    training, held_out = (
        table.rows_of(episodes) for episodes in table.split(config.dataset.held_out, config.dataset.episodes)
    )
    check_finite(table, torch.cat([training, held_out]), root)
    observed = table.every(config.dataset.frame_stride)
    training, held_out = training[observed[training]], held_out[observed[held_out]]
    values, computed = {STATE: table.state, ACTION: table.action}, config.dataset.stats == "computed"
    modes = config.vega.normalization_mapping
    stats, lines = normalization_stats(dataset, values, modes, computed=computed)
    if config.vega.use_relative_actions:
        stats |= relative_action_stats(config.vega, table, torch.cat([training, held_out]))
    for line in lines:
        logger.warning("%s: %s", root, line)
    return TrainData(dataset, table, training, held_out, fingerprint_dataset(root, table), stats)


def relative_action_stats(policy: VegaConfig, table: FrameTable, rows: Tensor) -> dict[str, Any]:
    """Return the statistics of actions relative to the state at the start of their chunk.

    They are those of at most 100,000 chunks, evenly spaced over the rows [m].

    Raises:
        DatasetError: If the state is narrower than the action.
    """
    if table.state.shape[1] < table.action.shape[1]:
        raise DatasetError(
            f"policy.use_relative_actions subtracts the state from the action: expected a state of at least "
            f"{table.action.shape[1]} entries, got {table.state.shape[1]}. Take absolute actions."
        )
    rows = spread_evenly(rows, 100_000)
    actions, is_pad = table.chunks(rows, policy.chunk_size)
    steps: list[Any] = list(make_vega_pre_post_processors(policy)[0].steps)
    (step,) = (step for step in steps if isinstance(step, RelativeActionsProcessorStep))
    moved: Any = step(create_transition({STATE: table.state[rows]}, actions))[TransitionKey.ACTION]
    found = describe_values(moved[~is_pad].numpy())
    return {ACTION: {name: np.asarray(value) for name, value in found.items()}}


def make_policy(config: TrainConfig, checkpoint: Path | None, device: torch.device) -> VegaPolicy:
    """Return a new policy, one that starts from `policy.pretrained_path`, or a checkpoint's averaged one."""
    if checkpoint is not None:
        saved = PreTrainedConfig.from_pretrained(checkpoint / PRETRAINED)
        saved.device = config.vega.device
        return VegaPolicy.from_pretrained(checkpoint / PRETRAINED, config=saved, strict=True).to(device)
    if config.vega.pretrained_path is not None:
        path = fetch_checkpoint(config.vega.pretrained_path, revision=config.vega.pretrained_revision)
        saved: Any = PreTrainedConfig.from_pretrained(path)
        vega = copy(config.vega)  # requires the weights of the prior that the policy was trained with
        vega.prior = replace(vega.prior, fingerprint=saved.prior.fingerprint)
        packaged = saved.backbone.text_encoder_fingerprint
        vega.backbone = replace(vega.backbone, text_encoder_fingerprint=packaged)
        return VegaPolicy.from_pretrained(path, config=vega, strict=True).to(device)
    return VegaPolicy(config.vega).to(device)


def make_source(
    config: TrainConfig, policy: VegaPolicy, data: TrainData, checkpoint: Path | None
) -> tuple[Source, dict[str, Tensor]]:
    """Return the source of batches, building its cache where missing, and each camera's mean frame."""
    cameras, backend = list(policy.config.image_features), config.dataset.video_backend
    if config.dataset.cache == "none":
        history = len(policy.config.observation_delta_indices or ())
        frames = FrameRows(data.dataset, data.table, cameras, backend, history)
        chunk, workers = policy.config.chunk_size, config.dataset.workers
        source = VideoSource(data.table, frames, chunk, workers=workers, seed=config.seed)
        if checkpoint is not None:
            return source, load_file(checkpoint / PRETRAINED / MEAN_FRAMES)
        return source, sampled_mean_frames(data.dataset, cameras, backend)
    root, model = Path(config.dataset.cache_root), policy.model
    names = feature_cache.check_cacheable(model.config.backbone, model.config.prior, config.dataset.cached)
    key = {"repo_id": config.dataset.repo_id, **fingerprint_frames(Path(data.dataset.root))}
    renamed = {name: data.dataset.stored_names[name] for name in cameras}
    if any(name != stored for name, stored in renamed.items()):
        key["stored_names"] = json.dumps(renamed)
    stride = config.dataset.frame_stride
    streams = feature_cache.streams_of(model, key, cameras, names, stride)
    observed = data.table.every(stride)
    stored = observed.nonzero()[:, 0]
    clips = _make_clips(config, data, key, cameras, observed)
    feature_cache.build_streams(root, streams, model, clips, frames=len(stored))
    place = {"disk": None, "ram": torch.device("cpu"), "gpu": next(policy.parameters()).device}
    values = {
        stream.name: feature_cache.open_stream(root, stream, len(stored), place[config.dataset.cache])
        for stream in streams
    }
    source = CachedSource(data.table, values, policy.config.chunk_size, stored)
    return source, feature_cache.open_mean_frames(root, streams[0])


def _make_clips(
    config: TrainConfig, data: TrainData, key: dict[str, str], cameras: list[str], observed: Tensor
) -> feature_cache.Clips:
    """Return the observed frames [n] of a dataset in order, from its videos or, without any, from the cache.

    Raises:
        DatasetError: If it has neither.
    """
    if data.dataset.has_frames():
        clips = frames_in_order(data.dataset, cameras, config.dataset.video_backend)
        return feature_cache.pick_instants(clips, observed)
    root, size, stride = Path(config.dataset.cache_root), config.vega.frame_size, config.dataset.frame_stride
    every = feature_cache.frames_stream(key, cameras, size)
    if (root / every.folder).exists():
        frames = feature_cache.open_stream(root, every, len(observed), None)
        return feature_cache.pick_instants(feature_cache.cached_clips(frames, cameras), observed)
    rendered = feature_cache.frames_stream(key, cameras, size, stride=stride)
    if (root / rendered.folder).exists():
        frames = feature_cache.open_stream(root, rendered, int(observed.sum()), None)
        return feature_cache.cached_clips(frames, cameras)
    more = f" frame_stride={stride}" if stride > 1 else ""
    raise DatasetError(
        f"{data.dataset.root} has no videos, and dataset.cache_root={root} holds no frames of it as "
        f"{key['repo_id']} with {size} pixels. Render them: vega-render FILE.safetensors "
        f"root={data.dataset.root} repo_id={key['repo_id']} cache_root={root} frame_size={size}{more}"
    )


def _make_state(
    config: TrainConfig,
    policy: VegaPolicy,
    mean_frames: dict[str, Tensor],
    data: TrainData,
    checkpoint: Path | None,
) -> TrainState:
    average = EMA(policy, config.average_decay)  # a checkpoint's policy holds the averaged weights
    if checkpoint is not None:
        checkpoints.load_raw_weights(checkpoint, policy)
    optimizer, scheduler = make_optimizer(policy, config.steps)
    processors = make_vega_pre_post_processors(policy.config, data.stats)
    generator = torch.Generator().manual_seed(config.seed + 1)  # alike in all processes; each takes its share
    guard = NonFiniteGuard(config.max_skipped_steps)
    state = TrainState(policy, average, optimizer, scheduler, processors, mean_frames, generator, guard)
    if checkpoint is not None:
        checkpoints.load_training_state(checkpoint, state)
    return state


def _summarize(config: TrainConfig, policy: VegaPolicy, data: TrainData, step: int) -> str:
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in policy.parameters() if not weight.requires_grad)
    return (
        f"Training {trained / 1e6:.1f}M weights ({frozen / 1e6:.1f}M frozen) on {len(data.rows)} frames of "
        f"{config.dataset.repo_id} ({len(data.held_out)} held out), steps {step} to {config.steps}, into "
        f"{config.output_dir}"
    )
