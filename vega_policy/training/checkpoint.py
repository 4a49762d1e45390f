"""Checkpoints in LeRobot's layout: complete or absent, and enough to go on bit by bit. No pickle.

<step>/pretrained_model/   config.json, model.safetensors (averaged weights), processors, README.md,
                           mean_frames.safetensors (each camera's mean frame, for the blind control)
       training_state/     weights.safetensors (raw weights), optimizer_*, scheduler_state.json,
                           training_step.json, rng_state.safetensors (rng_state_<rank> of other processes)
       checksums.json      of every file
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
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
from vega_policy.run_dir import (
    CHECKPOINTS,
    PARTIAL_SUFFIX,
    atomic_folder,
    drop_lines_after,
    point_link,
    remove_partial,
    replace_text,
)
from vega_policy.training.config import TrainConfig, defaults, encode
from vega_policy.training.distributed import shard_like, shard_state, whole
from vega_policy.training.failure_guards import NonFiniteGuard
from vega_policy.training.optim import EMA, trainable

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are not those that were written; the message names them."""


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of every file below `folder`, and of the note itself, in its `checksums.json`."""
    (folder / CHECKSUMS).write_bytes(_render({name: _digest(folder / name) for name in _files(folder)}))


def damage(folder: Path, *, below: str = "") -> list[str]:
    """What is wrong with the files of a folder that `write_checksums` left.

    Args:
        folder: The folder.
        below: Look only at this sub-folder's files; all by default.

    Returns:
        One phrase a file that names it; empty if all is as it was written.
    """
    note = folder / CHECKSUMS
    if not note.is_file():
        return [f"{CHECKSUMS} is missing"]
    expected = _read(note)
    if expected is None:
        return [f"{CHECKSUMS} is altered"]
    there = set(_files(folder))
    wrong = [
        f"{name} is {'altered' if name in there else 'missing'}"
        for name, digest in expected.items()
        if name.startswith(below) and (name not in there or _digest(folder / name) != digest)
    ]
    return wrong + [f"{name} does not belong there" for name in sorted(there - expected.keys())]


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(files: dict[str, str]) -> bytes:
    """The note in its only valid form, so that no byte of it can change unseen."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "own": own}, indent=1, sort_keys=True) + "\n").encode()


def _read(note: Path) -> dict[str, str] | None:
    """Digests by file; None if the note is not what `_render` gives."""
    content = note.read_bytes()
    try:
        files = json.loads(content)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) and _render(files) == content else None


LAST, BEST, SCORES = "last", "best", "scores.json"
DAMAGED_SUFFIX = ".damaged"

Scores = dict[int, dict[str, float]]
"""What was measured, by step: `success` in [0, 1], `held_out_loss`, ..."""


def checkpoint_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """Every checkpoint of a run that was written to its end, oldest first."""
    there = [path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit()]
    return sorted(there, key=lambda path: int(path.name))


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose files are those that were written, None before the first one.

    Damaged ones that are newer are named in the log and passed over.

    Raises:
        DamagedCheckpointError: If there are checkpoints, but none is sound; names what is wrong with each.
    """
    complaints = []
    for checkpoint in reversed(checkpoints_of(run)):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        complaints.append(f"{checkpoint}: {', '.join(wrong)}")
        logger.warning("Damaged checkpoint, passed over. %s.", complaints[-1])
    if complaints:
        raise DamagedCheckpointError(
            f"No checkpoint of {run} is sound. {'; '.join(complaints)}. Restore these files from a copy, or "
            "delete the folder to start the run anew."
        )
    return None


def set_aside_after(run: Path, step: int) -> None:
    """Renames the checkpoints after `step`, which `newest_sound` passed over, so that theirs can be written.

    They become `<step>.damaged`; an earlier one of that name is deleted.
    """
    for checkpoint in checkpoints_of(run):
        if int(checkpoint.name) > step:
            aside = checkpoint.with_name(checkpoint.name + DAMAGED_SUFFIX)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def require_sound(folder: Path) -> None:
    """Refuses a checkpoint, or a checkpoint's `pretrained_model`, whose files were altered.

    A folder that came without checksums, such as LeRobot's own, is let pass.

    Args:
        folder: What a user named.

    Raises:
        DamagedCheckpointError: Names the files, and the newest sound checkpoint of the same run.
    """
    folder = folder.resolve()
    named, below = (folder, "") if (folder / CHECKSUMS).is_file() else (folder.parent, f"{folder.name}/")
    wrong = damage(named, below=below) if (named / CHECKSUMS).is_file() else []
    if not wrong:
        return
    siblings = [path for path in checkpoints_of(named.parent.parent) if path != named and not damage(path)]
    offer = f"Use {siblings[-1]} instead" if siblings else "No other checkpoint of this run is sound"
    raise DamagedCheckpointError(f"{named} is damaged: {', '.join(wrong)}. {offer}.")


def read_scores(run: Path) -> Scores:
    """What was measured so far, by step."""
    path = run / SCORES
    return {int(step): row for step, row in json.loads(path.read_text()).items()} if path.is_file() else {}


def add_scores(run: Path, step: int, measured: dict[str, float]) -> None:
    """Notes what was measured after a step."""
    scores = read_scores(run)
    scores[step] = scores.get(step, {}) | measured
    replace_text(run / SCORES, json.dumps(scores, indent=1) + "\n")


def by_merit(steps: list[int], scores: Scores) -> list[int]:
    """The steps that have a score, best first: by success, then by held-out loss, then the later one."""

    def merit(step: int) -> tuple[float, float, int]:
        row = scores[step]
        return row.get("success", -1.0), -row.get("held_out_loss", float("inf")), step

    scored = [step for step in steps if scores.get(step, {}).keys() & {"success", "held_out_loss"}]
    return sorted(scored, key=merit, reverse=True)


def tidy(run: Path, *, keep_last: int | None, keep_best: int) -> None:
    """Points `last` and `best`, and deletes the checkpoints that are neither recent nor good.

    Args:
        run: The run's folder.
        keep_last: So many newest ones are kept, at least 1; None keeps all.
        keep_best: So many best ones are kept besides; the one that `best` points to always is.
    """
    steps = [int(path.name) for path in checkpoints_of(run)]
    ranked = by_merit(steps, read_scores(run))
    links = {LAST: steps[-1:], BEST: ranked[:1]}
    for name, found in links.items():
        if found:
            point_link(run / CHECKPOINTS / name, checkpoint_of(run, found[0]))
    if keep_last is None:
        return
    kept = {*steps[-keep_last:], *ranked[: max(keep_best, 1)]}
    for step in set(steps) - kept:
        doomed = checkpoint_of(run, step)
        partial = doomed.with_name(f".{doomed.name}{PARTIAL_SUFFIX}")
        doomed.rename(partial)  # from here on a kill leaves nothing that looks like a checkpoint
        shutil.rmtree(partial)


PRETRAINED, STATE = "pretrained_model", "training_state"
MEAN_FRAMES, WEIGHTS, STEP = "mean_frames.safetensors", "weights.safetensors", "training_step.json"
DRAWS = "draws"

Origin = dict[str, int | str]
"""`num_processes` and `batch_size`, as LeRobot notes them, and `dataset`, a hash."""


@dataclass
class TrainState:
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
    average: EMA
    optimizer: Optimizer
    scheduler: LRScheduler
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]
    mean_frames: dict[str, Tensor]
    draws: torch.Generator
    skips: NonFiniteGuard
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


def snapshot(learner: TrainState) -> Snapshot:
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


def size_of(learner: TrainState) -> int:
    """About the bytes of a checkpoint: all weights, and three more copies of those that learn."""
    weights = list(learner.policy.parameters())
    return sum(w.numel() * w.element_size() * (4 if w.requires_grad else 1) for w in weights)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps made before a checkpoint."""
    return json.loads((checkpoint / STATE / STEP).read_text())["step"]


def save_checkpoint(
    run: Path,
    learner: TrainState,
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


def load_training_state(checkpoint: Path, learner: TrainState) -> None:
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


CONFIG, METRICS = "config.yaml", "metrics.jsonl"
FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "stop_after",
    "log_every",
    "save_every",
    "keep_last",
    "keep_best",
    "evaluate_every",
    "max_skipped_steps",
    "simulation.every",
    "simulation.processes",
    "wandb.project",
    "wandb.entity",
    "wandb.mode",
    "dataset.workers",
    "dataset.cache_root",
    "dataset.collect_command",
    "policy.device",
)
"""Fields that may differ between the starts of one run: they do not change its numbers."""


class RunFolderError(ValueError):
    """The output folder does not fit what was asked for."""


def check_folder(config: TrainConfig) -> None:
    """Refuses an output folder that does not fit, before anything is built or written.

    Args:
        config: The run. With `resume` the folder may hold an earlier start of the same run.

    Raises:
        RunFolderError: If the folder holds another run, or anything at all and `resume` is off.
    """
    folder = Path(config.output_dir)
    saved = folder / CONFIG
    if saved.exists() and config.resume:
        _check_same_run(config, yaml.safe_load(saved.read_text()), folder)
    elif folder.exists() and any(folder.iterdir()):
        raise RunFolderError(_occupied(folder))


def claim(config: TrainConfig, values: dict[str, Any], step: int) -> None:
    """Takes a folder that `check_folder` let pass: notes the config, clears what is half-written.

    Args:
        config: The run.
        values: The config as it was asked for, by `encode`.
        step: Step that the run goes on from; later checkpoints are damaged ones and are set aside.
    """
    folder = Path(config.output_dir)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    remove_partial(folder / CHECKPOINTS)
    if not (folder / CONFIG).exists():
        replace_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))
    set_aside_after(folder, step)
    tidy(folder, keep_last=None, keep_best=config.keep_best)


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drops log lines of steps that a killed start made after its last checkpoint; they are made again."""
    drop_lines_after(folder / METRICS, step)


def _occupied(folder: Path) -> str:
    last = next(reversed(checkpoints_of(folder)), None)
    content = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    run = f"a run at step {int(last.name)}" if last is not None else f"no run that can go on ({content})"
    if last is None and (folder / CONFIG).exists():
        run = "a run without a checkpoint yet"
    return (
        f"{folder}: expected an empty or new folder for a new run, found {run}. Give another output_dir, or "
        "resume=true to go on with that run, or delete the folder."
    )


def _check_same_run(config: TrainConfig, saved: dict[str, Any], folder: Path) -> None:
    asked = flatten(encode(config))
    before = {name: value for name, value in flatten(defaults(config)).items() if name in asked}
    expected = before | flatten(saved)  # a run from before a field existed had what is its default now
    silent = expected.get("simulation.every") == 0  # nothing was played yet that could be compared
    differing = [
        f"{name} (run: {expected.get(name)!r}, asked for: {asked.get(name)!r})"
        for name in sorted(expected.keys() | asked.keys())
        if expected.get(name) != asked.get(name)
        and name not in FREE_TO_CHANGE
        and not (silent and name.startswith("simulation."))
    ]
    if differing:
        raise RunFolderError(
            f"{folder} holds another run; resume=true goes on with the same run only. Differing: "
            f"{'; '.join(differing)}. Give those values again, or another output_dir."
        )


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Nested values by dotted path; lists and tuples are values.

    Args:
        node: A value or nested values.
        path: Dotted path of `node`.
    """
    if not isinstance(node, dict):
        return {path: list(node) if isinstance(node, tuple) else node}
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat
