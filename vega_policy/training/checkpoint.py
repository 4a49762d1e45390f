"""Training checkpoints in LeRobot's layout, from which a run resumes bitwise, and the run's folder.

<step>/pretrained_model/   config.json, model.safetensors (averaged weights), processors, README.md,
                           mean_frames.safetensors (each camera's mean frame, for the blind ablation),
                           checksums.json of these files
       training_state/     weights.safetensors (raw weights), optimizer_*, scheduler_state.json,
                           training_step.json, rng_state.safetensors (rng_state_<rank> of other processes)
       checksums.json      of all files
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.optim.schedulers import load_scheduler_state, save_scheduler_state
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.random_utils import deserialize_rng_state, serialize_rng_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.backbones.compact import TextEncoder
from vega_policy.checkpoints import (
    CHECKPOINTS,
    CHECKSUMS,
    PRETRAINED,
    STATE,
    check_checkpoint,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    set_aside_after,
    write_checksums,
)
from vega_policy.model.vega import TEXT_ENCODER
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.priors.base import fingerprint_weights
from vega_policy.run_dir import (
    LOCK,
    OtherRunError,
    atomic_folder,
    check_same_settings,
    flatten,
    lock_draft,
    read_json,
    read_yaml,
    remove_partial,
    require_empty,
    write_text,
)
from vega_policy.training.config import TrainConfig, defaults, encode
from vega_policy.training.distributed import shard_like, shard_state
from vega_policy.training.optim import EMA, NonFiniteGuard, trainable, whole

CONFIG, METRICS, CARD = "config.yaml", "metrics.jsonl", "README.md"
MEAN_FRAMES, WEIGHTS, STEP = "mean_frames.safetensors", "weights.safetensors", "training_step.json"

Origin = dict[str, int | str]
"""`num_processes` and `batch_size`, as LeRobot notes them, and a hash of each part of the dataset."""

FREE_TO_CHANGE = (
    *("output_dir", "resume", "steps", "stop_after", "shards", "shard"),
    *("log_every", "save_every", "keep_last", "keep_best", "evaluate_every", "max_skipped_steps"),
    *("simulation.every", "simulation.processes"),
    *("tracking", "tracker.project", "tracker.entity", "tracker.mode"),
    *("dataset.root", "dataset.cache", "dataset.cached", "dataset.video_backend"),
    *("dataset.workers", "dataset.cache_root", "dataset.collect_command"),
    *("policy.device", "policy.scheduler_decay_steps"),
)
"""Fields that may differ between the starts of one run.

They do not change its numbers, except `steps` with `scheduler_decay_steps`, which extend the schedule of the
learning rate from the present step on, and streams of the cache, whose features are rounded to bfloat16.
"""


@dataclass
class TrainState:
    """All that training changes, and what is saved beside it."""

    policy: VegaPolicy  # with the raw weights
    average: EMA  # of its trainable weights
    optimizer: Optimizer
    scheduler: LRScheduler
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]  # before and after the policy
    mean_frames: dict[str, Tensor]  # of each camera, float32 [3 h w] in [0, 1]
    generator: torch.Generator  # of the training noise, on the CPU; the same in all processes
    guard: NonFiniteGuard
    step: int = 0  # skipped ones included


@dataclass(frozen=True)
class Snapshot:
    """Whole tensors of all that is sharded over processes."""

    averaged: dict[str, Tensor]  # the policy's state with averaged weights
    raw: dict[str, Tensor]  # trainable weights as the optimizer has them
    optimizer: dict[str, Any]


def snapshot(train_state: TrainState) -> Snapshot:
    """Gather what is sharded; all processes call it at the same point."""
    average = train_state.average.by_weight()
    state = train_state.policy.state_dict(keep_vars=True)
    optimizer = train_state.optimizer.state_dict()
    optimizer["state"] = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    return Snapshot(
        averaged={name: whole(average.get(id(value), value)) for name, value in state.items()},
        raw={name: whole(weight).contiguous() for name, weight in trainable(train_state.policy).items()},
        optimizer=optimizer,
    )


def estimate_size(train_state: TrainState) -> int:
    """Return about the bytes of a checkpoint: all weights, and three more copies of the trainable ones."""
    weights = list(train_state.policy.parameters())
    return sum(w.numel() * w.element_size() * (4 if w.requires_grad else 1) for w in weights)


def save_checkpoint(
    run: Path,
    train_state: TrainState,
    content: Snapshot,
    rng_states: list[dict[str, Tensor]],
    origin: Origin,
    card: ModelCard,
) -> Path:
    """Write the checkpoint of the present step into the run's folder, and return its own.

    `content` are the state's tensors, by `snapshot`, `rng_states` the random states by rank, `origin` is what
    must be the same when the run resumes, `card` the policy's README.md.
    """
    target = checkpoint_path(run, train_state.step)
    with atomic_folder(target) as folder:
        pretrained, state = folder / PRETRAINED, folder / STATE
        pretrained.mkdir()
        state.mkdir()
        train_state.policy._save_pretrained(pretrained, state_dict=content.averaged)
        for processor in train_state.processors:
            processor.save_pretrained(pretrained)
        save_file(train_state.mean_frames, pretrained / MEAN_FRAMES)
        card.save(pretrained / CARD)
        save_file(content.raw, state / WEIGHTS)
        save_optimizer_state(train_state.optimizer, state, optim_state_dict=content.optimizer)
        save_scheduler_state(train_state.scheduler, state)
        for rank, rng_state in enumerate(rng_states):
            save_file(rng_state, state / _rng_file(rank))
        (state / STEP).write_text(
            json.dumps({"step": train_state.step, **train_state.guard.state(), **origin})
        )
        write_checksums(pretrained)
        write_checksums(folder)
    return target


def export_policy(source: Path, target: Path, card: str | None = None) -> None:
    """Write the policy in the folder `source` to a new folder to be published.

    Weights are rounded to bfloat16, and checksums are added. A frozen text encoder is left out where it is
    the packaged one; the config then holds its fingerprint. None copies the card.

    Raises:
        FileExistsError: If the target exists.
        FolderInUseError: If another process exports to it.
        DamagedCheckpointError: If a file was altered.
    """
    check_checkpoint(source)
    weights = load_file(source / SAFETENSORS_SINGLE_FILE)
    config = read_json(source / CONFIG_NAME) | {"device": None, "pretrained_path": None}  # of this machine
    packaged = _packaged_text_encoder(config, weights)
    if packaged is not None:
        config["backbone"]["text_encoder_fingerprint"] = packaged
        weights = {name: value for name, value in weights.items() if not name.startswith(TEXT_ENCODER)}
    rounded = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    with lock_draft(target), atomic_folder(target) as draft:
        for path in source.iterdir():
            if path.is_file() and path.name not in (SAFETENSORS_SINGLE_FILE, CONFIG_NAME, CHECKSUMS):
                shutil.copyfile(path, draft / path.name)
        (draft / CONFIG_NAME).write_text(json.dumps(config, indent=4))
        save_file(rounded, draft / SAFETENSORS_SINGLE_FILE, metadata={"format": "pt"})
        if card is not None:
            (draft / CARD).write_text(card)
        write_checksums(draft)


def _packaged_text_encoder(config: dict[str, Any], weights: dict[str, Tensor]) -> str | None:
    """Return the fingerprint of a policy's text encoder if it is the packaged one, else None."""
    own = {
        name.removeprefix(TEXT_ENCODER): value
        for name, value in weights.items()
        if name.startswith(TEXT_ENCODER)
    }
    backbone = config["backbone"]
    if not own or not backbone["pretrained"] or backbone["text_encoder"] is not None:
        return None
    packaged = TextEncoder(None, pretrained=True, frozen=True)
    found = fingerprint_weights(own)
    return found if found == fingerprint_weights(packaged.state_dict()) else None


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return read_json(checkpoint / STATE / STEP, "step")["step"]


def load_raw_weights(checkpoint: Path, policy: VegaPolicy) -> None:
    """Replace the trainable weights of a policy, loaded from `pretrained_model`, by the raw ones.

    Raises:
        ValueError: If the checkpoint holds other trainable weights than the policy has.
    """
    saved, weights = load_file(checkpoint / STATE / WEIGHTS), trainable(policy)
    if saved.keys() != weights.keys():
        differing = sorted(saved.keys() ^ weights.keys())
        raise ValueError(
            f"{checkpoint}: expected the policy's {len(weights)} trainable weights, got {len(saved)}; "
            f"{len(differing)} differ, such as {differing[:3]}. Resume with the code and config of the run."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(shard_like(saved[name], weight))


def load_training_state(checkpoint: Path, train_state: TrainState) -> None:
    """Restore optimizer, schedule and step; random states come last, by `load_rng_state`."""
    state = checkpoint / STATE
    load_optimizer_state(train_state.optimizer, state)
    shard_state(train_state.optimizer)
    load_scheduler_state(train_state.scheduler, state)
    train_state.guard.restore(read_json(state / STEP))
    train_state.step = read_step(checkpoint)


def check_origin(checkpoint: Path, origin: Origin) -> None:
    """Refuse to resume with other data or sizes, which would change the order of samples.

    Raises:
        ValueError: Lists each difference.
    """
    saved = read_json(checkpoint / STATE / STEP)
    differing = [
        f"{name} was {saved.get(name)}, is {new}" for name, new in origin.items() if saved.get(name) != new
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: {', '.join(differing)}; a run resumes exactly only with the same dataset, "
            "batch_size and number of processes. Give those, or start a new run with policy.pretrained_path."
        )


def rng_state(generator: torch.Generator) -> dict[str, Tensor]:
    """Return the random states of Python, numpy and torch, as LeRobot writes them, and of `generator`."""
    state = serialize_rng_state()
    # LeRobot rounds numpy's spare normal number to float32.
    state["np_rng_cached_gaussian"] = torch.tensor(
        [np.random.get_state(legacy=False)["gauss"]], dtype=torch.float64
    )
    return state | {"generator": generator.get_state()}


def set_rng_state(state: dict[str, Tensor], generator: torch.Generator) -> None:
    """Restore what `rng_state` returned."""
    deserialize_rng_state(state)
    generator.set_state(state["generator"])


def load_rng_state(checkpoint: Path, rank: int, generator: torch.Generator) -> None:
    """Restore this process's random states, right before the first step."""
    set_rng_state(load_file(checkpoint / STATE / _rng_file(rank)), generator)


def _rng_file(rank: int) -> str:
    return f"rng_state_{rank}.safetensors" if rank else "rng_state.safetensors"


def check_folder(config: TrainConfig) -> None:
    """Refuse an output folder that does not fit, before anything is built or written.

    Raises:
        OtherRunError: If the folder holds another run, or anything at all and `resume` is off.
    """
    folder = Path(config.output_dir)
    saved = folder / CONFIG
    if not (saved.exists() and config.resume):
        try:
            require_empty(folder)
        except OtherRunError as error:
            raise OtherRunError(_describe_content(folder)) from error
        return
    stored, free = read_yaml(saved), FREE_TO_CHANGE
    if not flatten(stored).get("simulation.every"):  # no evaluation yet that would have to be comparable
        free = (*free, "simulation")
    check_same_settings(folder, stored, encode(config), free_to_change=free, defaults=defaults(config))


def claim_folder(config: TrainConfig, values: dict[str, Any], step: int) -> None:
    """Prepare a folder that `check_folder` accepted: write the config, delete drafts, set damage aside.

    `values` is the config before the policy completed it, by `encode`. The run resumes from `step`; later
    checkpoints are damaged ones.
    """
    folder = Path(config.output_dir)
    remove_partial(folder)
    remove_partial(folder / CHECKPOINTS)
    # Also of a run that resumes: its steps, or the place of its data, may be others now. It comes first: a
    # folder without it, of a start that was killed, would be refused.
    write_text(folder / CONFIG, yaml.safe_dump(values | {"resume": False}, sort_keys=False))
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    set_aside_after(folder, step)
    prune_checkpoints(folder, keep_last=None, keep_best=config.keep_best)


def _describe_content(folder: Path) -> str:
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        content = f"a run at step {int(checkpoints[-1].name)}"
    elif (folder / CONFIG).exists():
        content = "a run without a checkpoint yet"
    else:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
        content = f"no run ({', '.join(names[:8])})"
    return (
        f"{folder}: expected an empty or new folder for a new run, found {content}. Give another output_dir, "
        "or resume=true to resume that run, or delete the folder."
    )
