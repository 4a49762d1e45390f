"""Training entry point: `train` builds the parts of a run from its config and trains."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.processor.converters import create_transition
from safetensors.torch import load_file
from torch import Tensor

from vega_policy.checkpoints import PRETRAINED, fetch_checkpoint, newest_intact
from vega_policy.configuration_vega import VegaConfig, read_rendering
from vega_policy.data import feature_cache
from vega_policy.data.dataset import (
    ACTION,
    DISPLACEMENT,
    EXECUTED,
    STATE,
    DatasetConfig,
    DatasetError,
    FrameTable,
    LocalDataset,
    check_finite,
    fingerprint_dataset,
    match_features,
    normalization_stats,
    open_dataset,
    policy_features,
    read_table,
)
from vega_policy.data.dataset_files import describe_values, fingerprint_frames
from vega_policy.data.loader import CachedSource, MixedFrames, MixedSource, Source, VideoSource, join_tables
from vega_policy.data.video import FrameRows, frames_in_order, sampled_mean_frames
from vega_policy.model.compilation import compile_blocks
from vega_policy.model.observation import stack_views
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.processor_vega import make_vega_pre_post_processors
from vega_policy.run_dir import check_space, flatten, lock_folder, use_available_cores
from vega_policy.training import checkpoint as checkpoints
from vega_policy.training.checkpoint import MEAN_FRAMES, Origin, TrainState, check_folder, claim_folder
from vega_policy.training.config import TrainConfig, encode
from vega_policy.training.cuda_graph import check_capturable
from vega_policy.training.distributed import make_accelerator, shard
from vega_policy.training.logging import push_to_hub, record_start
from vega_policy.training.optim import EMA, NonFiniteGuard, make_optimizer
from vega_policy.training.trainer import DataPart, TrainData, Trainer
from vega_policy.training.validation import spread_evenly

logger = logging.getLogger(__name__)

# Weights that `new_fusion` initialises; `scale` is that of a base (zero: a new policy equals its base).
FUSION_PARTS = ("model.project.", "model.fusion.", "model.scale")


def train(config: TrainConfig) -> Path:
    """Train a policy, or resume a run, and return the folder of the last checkpoint.

    The policy's features are filled in from the dataset. The checkpoint's `pretrained_model` loads with
    `from_pretrained`. With `stop_after=0` only the cache is built, and its folder returned.

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
    if config.stop_after == 0:
        return build_cache(config, accelerator)
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


def build_cache(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Build the cache of a run, or this command's part of it, and return its folder.

    Raises:
        ValueError: If the run has no cache.
    """
    if config.dataset.cache == "none":
        raise ValueError("stop_after=0 builds the cache, and dataset.cache is none. Set dataset.cache=disk.")
    data = load_data(config)
    set_seed(config.seed)  # of encoders with random weights, as in training
    policy = make_policy(config, None, accelerator.device)
    world = accelerator.num_processes
    shard, shards = config.shard * world + accelerator.process_index, config.shards * world
    for part in data.parts:
        build_streams(part, policy, shard=shard, shards=shards)
    return Path(config.dataset.cache_root)


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
    check_forecast(config.vega, config.dataset)
    data = load_data(config)
    if config.capture:
        check_capturable(config, accelerator.device, data.instructions)
    origin: Origin = {"num_processes": world, "batch_size": config.batch_size}
    origin |= {f"dataset {part}": value for part, value in data.fingerprint.items()}
    if checkpoint is not None:
        checkpoints.check_origin(checkpoint, origin)
    set_seed(config.seed)
    policy = make_policy(config, checkpoint, accelerator.device)
    source, mean_frames = make_source(config, policy, data, checkpoint, rank=rank, world=world)
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
    configs = config.dataset.parts
    datasets = [open_dataset(part) for part in configs]
    given = bool(config.vega.input_features)
    for dataset in datasets:
        if dataset is not datasets[0] and not given:
            check_alike(datasets[0], dataset)
        match_features(config.vega, dataset)
    _join_metadata(config.vega, datasets)
    weights = [entry.weight for entry in config.dataset.mixture or ()] or [1.0]
    needed = [_needed_features(dataset, config.vega) for dataset in datasets]
    parts = [_read_part(*one) for one in zip(configs, datasets, weights, needed, strict=True)]
    joined, starts = join_tables([part.table for part in parts]), [0]
    starts += [start + len(part.table) for start, part in zip(starts, parts[:-1], strict=False)]
    rows, held_out = (
        torch.cat([getattr(part, name) + start for part, start in zip(parts, starts, strict=True)])
        for name in ("rows", "held_out")
    )
    fingerprint = {}
    for number, part in enumerate(parts):
        found = fingerprint_dataset(part.dataset.root, part.table)
        fingerprint |= {f"{number} {key}" if len(parts) > 1 else key: found[key] for key in found}
    return TrainData(parts, joined, rows, held_out, fingerprint, _make_stats(config, parts, joined, starts))


def check_alike(first: LocalDataset, other: LocalDataset) -> None:
    """Refuse a dataset of a mixture whose cameras, state or action are not those of the first one.

    Raises:
        DatasetError: Lists the differences.
    """
    expected, found = policy_features(first), policy_features(other)
    differing = [f"no {name}" for name in expected if name not in found]
    differing += [f"{name} besides" for name in found if name not in expected]
    for name in sorted(expected.keys() & found.keys()):
        shapes = [list(features[name].shape) for features in (expected, found)]
        if expected[name].type is not FeatureType.VISUAL and shapes[0] != shapes[1]:
            differing.append(f"{name} {shapes[1]} instead of {shapes[0]}")
        names = [dataset.features[name].get("names") for dataset in (first, other)]
        if expected[name].type is not FeatureType.VISUAL and all(names) and names[0] != names[1]:
            differing.append(f"{name} named {names[1]} instead of {names[0]}")
    if differing:
        raise DatasetError(
            f"dataset.mixture: {other.repo_id} differs from {first.repo_id}: {'; '.join(differing)}. Give "
            "both the same names by rename in their entries, or choose cameras by policy.input_features."
        )


def _join_metadata(policy: VegaConfig, datasets: Sequence[LocalDataset]) -> None:
    """Leave out of the policy's config what the datasets of a mixture do not agree on."""
    rates = {dataset.repo_id: dataset.fps for dataset in datasets}
    if len(set(rates.values())) > 1:
        logger.warning("The datasets differ in frames a second (%s): a chunk then spans other times.", rates)
        policy.dataset_fps = None
    if len({read_rendering(dataset.root) for dataset in datasets}) > 1:
        policy.dataset_rendering = None


def _needed_features(dataset: LocalDataset, policy: VegaConfig) -> dict[str, bool]:
    """Return which features beside state and action training reads, by argument of `read_table`."""
    return {
        "displacement": check_displacement(dataset, policy.displacement.weight),
        "executed": check_executed(dataset, policy.head.prefix_actions),
    }


def _read_part(
    config: DatasetConfig, dataset: LocalDataset, weight: float, needed: dict[str, bool]
) -> DataPart:
    table = read_table(dataset.root, dataset.stored_names, config.task, **needed)
    training, held_out = (table.rows_of(rows) for rows in table.split(config.held_out, config.episodes))
    check_finite(table, torch.cat([training, held_out]), dataset.root)
    observed = table.every(config.frame_stride)
    training, held_out = training[observed[training]], held_out[observed[held_out]]
    return DataPart(config, dataset, table, training, held_out, weight)


def _make_stats(
    config: TrainConfig, parts: Sequence[DataPart], table: FrameTable, starts: Sequence[int]
) -> dict[str, Any]:
    """Return the statistics of the normalisation, of a mixture as it is sampled: by each dataset's weight."""
    modes, computed = config.vega.normalization_mapping, config.dataset.stats == "computed"
    rows = torch.cat([torch.cat([one.rows, one.held_out]) + k for one, k in zip(parts, starts, strict=True)])
    weights = None
    if len(parts) == 1:
        values = {STATE: table.state, ACTION: table.action}
        stats, lines = normalization_stats(parts[0].dataset, values, modes, computed=computed)
        for line in lines:
            logger.warning("%s: %s", parts[0].dataset.root, line)
    else:
        if modes["VISUAL"] is not NormalizationMode.IDENTITY:
            raise DatasetError(
                "dataset.mixture: policy.normalization_mapping.VISUAL must be IDENTITY, since a mixture has "
                f"no statistics of images; got {modes['VISUAL'].name}."
            )
        counts = [len(part.rows) + len(part.held_out) for part in parts]
        each = torch.tensor([part.weight / count for part, count in zip(parts, counts, strict=True)])
        weights = each.repeat_interleave(torch.tensor(counts)).numpy()
        stats = {
            name: {key: np.asarray(value) for key, value in describe_values(data, weights).items()}
            for name, data in ((STATE, table.state[rows].numpy()), (ACTION, table.action[rows].numpy()))
        }
    if config.vega.use_relative_actions:
        stats |= relative_action_stats(config.vega, table, rows, weights)
    return stats


def relative_action_stats(
    policy: VegaConfig, table: FrameTable, rows: Tensor, weights: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the statistics of actions relative to the state at the start of their chunk.

    They are those of at most 100,000 chunks, evenly spaced over the rows [m], which weigh `weights` [m].

    Raises:
        DatasetError: If the state is narrower than the action.
    """
    if table.state.shape[1] < table.action.shape[1]:
        raise DatasetError(
            f"policy.use_relative_actions subtracts the state from the action: expected a state of at least "
            f"{table.action.shape[1]} entries, got {table.state.shape[1]}. Take absolute actions."
        )
    chosen = spread_evenly(torch.arange(len(rows)), 100_000)
    rows = rows[chosen]
    actions, is_pad = table.chunks(rows, policy.chunk_size)
    steps: list[Any] = list(make_vega_pre_post_processors(policy)[0].steps)
    (step,) = (step for step in steps if isinstance(step, RelativeActionsProcessorStep))
    moved: Any = step(create_transition({STATE: table.state[rows]}, actions))[TransitionKey.ACTION]
    if weights is not None:
        weights = np.broadcast_to(weights[chosen.numpy()][:, None], is_pad.shape)[~is_pad.numpy()]
    found = describe_values(moved[~is_pad].numpy(), weights)
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
        vega = copy(config.vega)
        if not config.new_fusion:  # requires the weights of the prior that the policy was trained with
            vega.prior = replace(vega.prior, fingerprint=saved.prior.fingerprint)
        packaged = saved.backbone.text_encoder_fingerprint
        vega.backbone = replace(vega.backbone, text_encoder_fingerprint=packaged)
        known = _without_new_parts(vega, saved, config.new_fusion)
        try:
            policy = VegaPolicy.from_pretrained(path, config=known, strict=True)
        except (RuntimeError, ValueError) as error:  # torch's has a line for each weight
            if not any(words in str(error) for words in ("loading state_dict", "missing or superfluous")):
                raise
            raise ValueError(_describe_misfit(config.vega.pretrained_path, saved, known)) from error
        if known is not vega:
            weights = policy.state_dict()
            if config.new_fusion:
                weights = {
                    name: value for name, value in weights.items() if not name.startswith(FUSION_PARTS)
                }
            policy = VegaPolicy(vega)
            policy.load_state_dict(weights, strict=False)  # what is missing is what is new
        return policy.to(device)
    return VegaPolicy(config.vega).to(device)


def _without_new_parts(vega: VegaConfig, saved: VegaConfig, new_fusion: bool) -> VegaConfig:
    """Return the configuration with which the saved weights fit; `vega` itself if that is it.

    Two parts that the saved policy does not have start as new ones and are off in it: the embedding of an
    action prefix and the displacement head. With `new_fusion` prior and fusion are the saved ones.
    """
    prefix = vega.head.prefix_steps > 0 and not saved.head.prefix_steps
    displacement = vega.displacement.weight > 0 and not saved.displacement.weight
    if not prefix and not displacement and not new_fusion:
        return vega
    known = copy(vega)
    if prefix:
        known.head = replace(vega.head, prefix_steps=0, prefix_actions="clean")
    if displacement:
        known.displacement = saved.displacement
    if new_fusion:
        known.prior, known.fusion = saved.prior, saved.fusion
    return known


def _describe_misfit(source: Any, saved: VegaConfig, config: VegaConfig) -> str:
    """Return why the weights of a policy do not fit a run: the fields of its parts that differ."""
    parts = ("fusion", "backbone", "head", "forecast", "displacement", "base")
    theirs, ours = (
        flatten({name: asdict(getattr(policy, name)) for name in parts})
        | {"policy.chunk_size": policy.chunk_size}
        for policy in (saved, config)
    )
    differing = [
        f"{name}={value} (here {ours[name]})" for name, value in theirs.items() if value != ours[name]
    ]
    theirs_in, ours_in = (sorted(c.input_features or {}) for c in (saved, config))
    inputs = f"cameras and state {theirs_in} (here {ours_in})"
    return (
        f"policy.pretrained_path={source}: its weights do not fit this run. Its policy has "
        f"{', '.join(differing) or inputs}. Give its values, or start without pretrained_path."
    )


def make_source(
    config: TrainConfig,
    policy: VegaPolicy,
    data: TrainData,
    checkpoint: Path | None,
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[Source, dict[str, Tensor]]:
    """Return the source of batches, building its cache where missing, and each camera's mean frame.

    Each of `world` processes builds its part of a cache; the first to end builds what a disk still lacks.
    """
    if config.dataset.cache == "none":
        source = _video_source(config, policy, data)
        if checkpoint is not None:
            return source, load_file(checkpoint / PRETRAINED / MEAN_FRAMES)
        cameras, backend = list(policy.config.image_features), config.dataset.video_backend
        means = [sampled_mean_frames(part.dataset, cameras, backend) for part in data.parts]
        return source, _weighted_mean(means, data, policy.config)
    for part in data.parts if world > 1 else ():
        build_streams(part, policy, shard=rank, shards=world)
    built = [_cached_source(part, policy) for part in data.parts]
    sources, means = [source for source, _ in built], [mean for _, mean in built]
    source = sources[0] if len(sources) == 1 else MixedSource(sources, data.starts)
    return source, _weighted_mean(means, data, policy.config)


def _weighted_mean(
    means: Sequence[dict[str, Tensor]], data: TrainData, policy: VegaConfig
) -> dict[str, Tensor]:
    """Return each camera's mean frame over a mixture as it is sampled, at the policy's size."""
    if len(means) == 1:
        return means[0]
    mixed, whole = 0.0, sum(part.weight for part in data.parts)
    for part, mean in zip(data.parts, means, strict=True):
        views = {camera: frame[None] for camera, frame in mean.items()}
        mixed = mixed + part.weight / whole * stack_views(views, policy.frame_size, policy.resize)[0, :, 0]
    return dict(zip(means[0], torch.as_tensor(mixed), strict=True))


def check_displacement(dataset: LocalDataset, weight: float) -> bool:
    """Return whether the policy learns the displacement.

    Raises:
        DatasetError: If it does, and the dataset has none.
    """
    shape = list(dataset.features.get(DISPLACEMENT, {}).get("shape", []))
    if weight and shape != [3]:
        raise DatasetError(
            f"policy.displacement.weight={weight} needs the feature {DISPLACEMENT} [3] in {dataset.root}; "
            f"got {shape or 'none'}. Render it again from its states into a new folder (vega-render "
            "displacement=true; docs/data.md), or set policy.displacement.weight=0."
        )
    return weight > 0


def check_executed(dataset: LocalDataset, prefix_actions: str) -> bool:
    """Return whether the prefix holds the executed actions.

    Raises:
        DatasetError: If it does, and the dataset has none.
    """
    if prefix_actions == "clean":
        return False
    shapes = [list(dataset.features.get(name, {}).get("shape", [])) for name in (ACTION, EXECUTED)]
    if shapes[0] != shapes[1]:
        raise DatasetError(
            f"head.prefix_actions=executed needs the feature {EXECUTED} {shapes[0]} in {dataset.root}; got "
            f"{shapes[1] or 'none'}. Render it again from its states into a new folder (vega-render; "
            "docs/data.md), or set head.prefix_actions=clean."
        )
    return True


def check_forecast(policy: VegaConfig, data: DatasetConfig) -> tuple[int, ...]:
    """Return how many control steps later frames a training batch must hold; none without a forecast.

    Raises:
        ValueError: If the dataset's cache cannot give them.
    """
    if not policy.forecast.weight:
        return ()
    if data.cache == "none" or not {"frames", "semantic"} & set(data.cached):
        raise ValueError(
            "policy.forecast.weight needs later frames, which come from a cache: expected dataset.cache=gpu "
            f"(or ram, disk) and dataset.cached=[frames]; got dataset.cache={data.cache}, "
            f"dataset.cached={list(data.cached)}."
        )
    wrong = [steps for steps in policy.forecast.steps if steps % data.frame_stride]
    if wrong:
        raise ValueError(
            f"policy.forecast.steps: expected multiples of dataset.frame_stride={data.frame_stride}, whose "
            f"frames the cache holds; got {wrong}."
        )
    return policy.forecast.steps


def _video_source(config: TrainConfig, policy: VegaPolicy, data: TrainData) -> VideoSource:
    """Return batches that are decoded while training."""
    cameras, backend = list(policy.config.image_features), config.dataset.video_backend
    for camera in cameras:
        sizes = {tuple(policy_features(part.dataset)[camera].shape[1:]) for part in data.parts}
        if len(sizes) > 1:
            raise DatasetError(
                f"dataset.mixture: frames of {camera} have several sizes ({sorted(sizes)}), and batches are "
                "decoded in one. Take a cache, whose frames have the policy's size: dataset.cache=disk"
            )
    history = len(policy.config.observation_delta_indices or ())
    frames: Any = [FrameRows(part.dataset, part.table, cameras, backend, history) for part in data.parts]
    frames = frames[0] if len(frames) == 1 else MixedFrames(frames, data.starts)
    chunk, workers = policy.config.chunk_size, config.dataset.workers
    return VideoSource(data.table, frames, chunk, workers=workers, seed=config.seed)


def _cached_source(part: DataPart, policy: VegaPolicy) -> tuple[CachedSource, dict[str, Tensor]]:
    """Return a dataset's batches from its cache, built where missing, and each camera's mean frame."""
    config = part.config
    root, streams = Path(config.cache_root), build_streams(part, policy)
    stored = part.table.every(config.frame_stride).nonzero()[:, 0]
    place = {"disk": None, "ram": torch.device("cpu"), "gpu": next(policy.parameters()).device}
    values = {
        stream.name: feature_cache.open_stream(root, stream, len(stored), place[config.cache])
        for stream in streams
    }
    future = check_forecast(policy.config, config)
    source = CachedSource(part.table, values, policy.config.chunk_size, stored, future)
    return source, feature_cache.open_mean_frames(root, streams[0])


def build_streams(
    part: DataPart, policy: VegaPolicy, *, shard: int = 0, shards: int = 1
) -> list[feature_cache.Stream]:
    """Build the missing streams of a dataset's cache, or a part of them, and return all of its streams."""
    root, streams, table = Path(part.config.cache_root), cache_streams(part, policy), part.table
    observed = table.every(part.config.frame_stride)
    ends = table.episode_end.unique().tolist()
    lengths = [int(observed[start:end].sum()) for start, end in pairwise([0, *ends])]
    read = partial(_read_clips, part, policy, observed, ends)
    words = _cached_instructions(part, policy)
    feature_cache.build_streams(
        root, streams, policy.model, read, lengths, shard=shard, shards=shards, instructions=words
    )
    return streams


def cache_streams(part: DataPart, policy: VegaPolicy) -> list[feature_cache.Stream]:
    """Return the streams that the cache of a dataset holds for a policy."""
    config, model = part.config, policy.model
    names = feature_cache.check_cacheable(model.config.backbone, model.config.prior, config.cached)
    cameras = list(policy.config.image_features)
    key, words = _cache_key(part, cameras), _cached_instructions(part, policy)
    return feature_cache.streams_of(model, key, cameras, names, config.frame_stride, words)


def _cached_instructions(part: DataPart, policy: VegaPolicy) -> list[str] | None:
    """Return the instruction of each cached frame, None where no cached feature depends on it."""
    if not feature_cache.reads_instructions(policy.model.config.prior, part.config.cached):
        return None
    observed = part.table.every(part.config.frame_stride)
    return part.table.instructions(observed.nonzero()[:, 0])


def _cache_key(part: DataPart, cameras: list[str]) -> dict[str, str]:
    key = {"repo_id": part.config.repo_id, **fingerprint_frames(part.dataset.root)}
    renamed = {name: part.dataset.stored_names[name] for name in cameras}
    if any(name != stored for name, stored in renamed.items()):
        key["stored_names"] = json.dumps(renamed)
    return key


def _read_clips(
    part: DataPart, policy: VegaPolicy, observed: Tensor, ends: Sequence[int], episodes: Sequence[int]
) -> feature_cache.Clips:
    """Return the observed frames [n] of episodes, from the dataset or, without any, from the cache.

    `ends` is the row after each episode of the dataset.
    """
    config, cameras = part.config, list(policy.config.image_features)
    spans = [slice(ends[episode - 1] if episode else 0, ends[episode]) for episode in episodes]
    if part.dataset.has_frames():
        clips = frames_in_order(part.dataset, cameras, config.video_backend, episodes)
        kept = [observed[span] for span in spans]
        return feature_cache.pick_instants(clips, torch.cat(kept) if kept else observed[:0])
    root, size, stride = Path(config.cache_root), policy.config.frame_size, config.frame_stride
    key = _cache_key(part, cameras)
    every = feature_cache.frames_stream(key, cameras, size)
    rendered = feature_cache.frames_stream(key, cameras, size, stride=stride)
    stored = observed.nonzero()[:, 0]  # table row of each cached row
    if (root / every.folder).exists():
        frames = feature_cache.open_stream(root, every, len(observed), None)
        rows = [torch.arange(span.start, span.stop)[observed[span]] for span in spans]
    elif (root / rendered.folder).exists():
        frames = feature_cache.open_stream(root, rendered, len(stored), None)
        rows = [
            torch.arange(*torch.searchsorted(stored, torch.tensor([s.start, s.stop])).tolist()) for s in spans
        ]
    else:
        more = f" frame_stride={stride}" if stride > 1 else ""
        raise DatasetError(
            f"{part.dataset.root} has no videos, and dataset.cache_root={root} holds no frames of it as "
            f"{key['repo_id']} with {size} pixels. Render them: vega-render FILE.safetensors "
            f"root={part.dataset.root} repo_id={key['repo_id']} cache_root={root} frame_size={size}{more}"
        )
    return feature_cache.cached_clips(frames, cameras, rows)


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
        f"{data.names} ({len(data.held_out)} held out), steps {step} to {config.steps}, into "
        f"{config.output_dir}"
    )
