"""Checkpoints in LeRobot's layout: complete or absent, and enough to go on bit by bit. No pickle.

<step>/pretrained_model/   config.json, model.safetensors (averaged weights), processors, README.md,
                           mean_frames.safetensors (each camera's mean frame, for the blind control)
       training_state/     weights.safetensors (raw weights), optimizer_*, scheduler_state.json,
                           training_step.json, rng_state.safetensors (rng_state_<rank> of other processes)
       checksums.json      of every file
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.optim.schedulers import load_scheduler_state, save_scheduler_state
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.random_utils import deserialize_rng_state, serialize_rng_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.folders import atomic_folder
from vega_policy.training.guards import Skips
from vega_policy.training.integrity import write_checksums
from vega_policy.training.optimization import WeightAverage, trainable
from vega_policy.training.parallel import shard_like, shard_state, whole
from vega_policy.training.retention import checkpoint_of

PRETRAINED, STATE = "pretrained_model", "training_state"
MEAN_FRAMES, WEIGHTS, STEP = "mean_frames.safetensors", "weights.safetensors", "training_step.json"
DRAWS = "draws"

Origin = dict[str, int | str]
"""`num_processes` and `batch_size`, as LeRobot notes them, and `dataset`, a hash."""


@dataclass
class Learner:
    """All that learning changes, and what is saved beside it.

    Attributes:
        policy: The policy with its raw weights.
        average: Averaged copy of its trainable weights.
        optimizer: The optimizer.
        scheduler: The learning-rate schedule.
        processors: Pre- and post-processor.
        mean_frames: Mean frame of each camera, float32 [3 h w] in [0, 1].
        draws: Where the training noise comes from, on the CPU; alike in all processes.
        skips: Steps that were skipped because they were not finite.
        step: Steps made, skipped ones included.
    """

    policy: VegaPolicy
    average: WeightAverage
    optimizer: Optimizer
    scheduler: LRScheduler
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]
    mean_frames: dict[str, Tensor]
    draws: torch.Generator
    skips: Skips
    step: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Whole tensors of all that is sharded over processes.

    Attributes:
        averaged: The policy's state with averaged weights.
        raw: Trainable weights as the optimizer has them.
        optimizer: The optimizer's state.
    """

    averaged: dict[str, Tensor]
    raw: dict[str, Tensor]
    optimizer: dict[str, Any]


def snapshot(learner: Learner) -> Snapshot:
    """Gathers what is sharded; to be called by every process, in the same place of the program."""
    average = learner.average.by_weight()
    state = learner.policy.state_dict(keep_vars=True)
    optimizer = learner.optimizer.state_dict()
    optimizer["state"] = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    return Snapshot(
        averaged={name: whole(average.get(id(value), value)) for name, value in state.items()},
        raw={name: whole(weight).contiguous() for name, weight in trainable(learner.policy).items()},
        optimizer=optimizer,
    )


def size_of(learner: Learner) -> int:
    """About the bytes of a checkpoint: all weights, and three more copies of those that learn."""
    weights = list(learner.policy.parameters())
    return sum(w.numel() * w.element_size() * (4 if w.requires_grad else 1) for w in weights)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps made before a checkpoint."""
    return json.loads((checkpoint / STATE / STEP).read_text())["step"]


def save_checkpoint(
    run: Path,
    learner: Learner,
    content: Snapshot,
    rng_states: list[dict[str, Tensor]],
    origin: Origin,
    card: ModelCard,
) -> Path:
    """Writes a checkpoint. Called by one process.

    Args:
        run: The run's folder.
        learner: What is saved.
        content: Its tensors, by `snapshot`.
        rng_states: Random states, one a process in the order of ranks.
        origin: What must be the same for the run to go on.
        card: The model card, written as the policy's README.md.

    Returns:
        The checkpoint's folder.
    """
    target = checkpoint_of(run, learner.step)
    with atomic_folder(target) as folder:
        pretrained, state = folder / PRETRAINED, folder / STATE
        pretrained.mkdir()
        state.mkdir()
        learner.policy._save_pretrained(pretrained, state_dict=content.averaged)
        for processor in learner.processors:
            processor.save_pretrained(pretrained)
        save_file(learner.mean_frames, pretrained / MEAN_FRAMES)
        card.save(pretrained / "README.md")
        save_file(content.raw, state / WEIGHTS)
        save_optimizer_state(learner.optimizer, state, optim_state_dict=content.optimizer)
        save_scheduler_state(learner.scheduler, state)
        for rank, rng_state in enumerate(rng_states):
            save_file(rng_state, state / _rng_file(rank))
        (state / STEP).write_text(json.dumps({"step": learner.step, **learner.skips.state(), **origin}))
        write_checksums(folder)
    return target


def load_raw_weights(checkpoint: Path, policy: VegaPolicy) -> None:
    """Replaces a policy's trainable weights by the raw ones of a checkpoint.

    Args:
        checkpoint: A complete checkpoint.
        policy: Policy that was loaded from its `pretrained_model`, so that the rest is in place.

    Raises:
        ValueError: If the checkpoint holds other trainable weights than the policy has.
    """
    saved, weights = load_file(checkpoint / STATE / WEIGHTS), trainable(policy)
    if saved.keys() != weights.keys():
        differing = sorted(saved.keys() ^ weights.keys())
        raise ValueError(
            f"{checkpoint}: the policy learns other weights than this checkpoint holds; {len(differing)} "
            f"differ, such as {differing[:3]}. Resume with the code and config of the run."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(shard_like(saved[name], weight))


def load_training_state(checkpoint: Path, learner: Learner) -> None:
    """Restores optimizer, schedule and step; random states come last, by `load_rng_state`."""
    state = checkpoint / STATE
    load_optimizer_state(learner.optimizer, state)
    shard_state(learner.optimizer)
    load_scheduler_state(learner.scheduler, state)
    learner.skips.restore(json.loads((state / STEP).read_text()))
    learner.step = step_of(checkpoint)


def check_origin(checkpoint: Path, origin: Origin) -> None:
    """Refuses to resume with other sizes or data than those that made the checkpoint.

    Raises:
        ValueError: If something differs: the order of samples would.
    """
    saved = json.loads((checkpoint / STATE / STEP).read_text())
    differing = {name: (saved[name], value) for name, value in origin.items() if saved[name] != value}
    if differing:
        told = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in differing.items())
        raise ValueError(
            f"{checkpoint}: {told}; a run goes on exactly only with the same dataset, batch_size and number "
            "of processes. Give those, or start a new run with policy.pretrained_path."
        )


def rng_state(draws: torch.Generator) -> dict[str, Tensor]:
    """Random states of Python, numpy and torch in this process, as LeRobot writes them, and of `draws`."""
    state = serialize_rng_state()
    # LeRobot rounds numpy's spare normal number to float32.
    state["np_rng_cached_gaussian"] = torch.tensor(
        [np.random.get_state(legacy=False)["gauss"]], dtype=torch.float64
    )
    return state | {DRAWS: draws.get_state()}


def set_rng_state(state: dict[str, Tensor], draws: torch.Generator) -> None:
    """Brings back what `rng_state` gave."""
    deserialize_rng_state(state)
    draws.set_state(state[DRAWS])


def load_rng_state(checkpoint: Path, rank: int, draws: torch.Generator) -> None:
    """Restores this process's random states, right before the first step."""
    set_rng_state(load_file(checkpoint / STATE / _rng_file(rank)), draws)


def _rng_file(rank: int) -> str:
    return f"rng_state_{rank}.safetensors" if rank else "rng_state.safetensors"
