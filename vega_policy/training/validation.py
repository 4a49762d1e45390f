"""Measurements during training: loss and action error on held-out episodes, and closed-loop success."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vega_policy.checkpoints import PRETRAINED
from vega_policy.data.loader import Batch, Source
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.evaluate import Evaluation, EvaluationSettings, choose_frames, default_batch_size
from vega_policy.evaluation.policies import checkpoint_fingerprint, load_lerobot_policy
from vega_policy.model.compilation import uncompiled
from vega_policy.training.checkpoint import TrainState, rng_state, set_rng_state
from vega_policy.training.config import SimulationConfig

SIMULATION = "simulation"


def spread_evenly(rows: Tensor, most: int | None) -> Tensor:
    """Return at most `most` (None: all) of the rows [m], evenly spaced."""
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


@torch.no_grad()
def held_out_scores(
    accelerator: Accelerator,
    state: TrainState,
    source: Source,
    prepare: Callable[[Batch], Batch],
    rows: Tensor,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Measure the averaged weights on held-out rows [m], m >= 1, always with the same noise.

    All processes call it; each measures its share of the batches. Random states are left unchanged. Returns
    `held_out_loss`, the mean training loss of a row, and `held_out_action_error`, the mean absolute
    difference between predicted and demonstrated actions in the dataset's units without padded ones.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = rows.split(batch_size)
    sums = torch.zeros(4)  # losses, rows, errors, action values
    with _averaged_weights(state):
        for number in range(rank, -(-len(batches) // world) * world, world):
            # Shards compute in step: a process without a batch of its own repeats the last and counts none.
            own = number < len(batches)
            rows = batches[min(number, len(batches) - 1)]
            measured = _measure(accelerator, state, source, prepare, rows, seed + number)
            sums += measured if own else 0.0
    reduced: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
    losses, count, errors, values = reduced.tolist()
    return {"held_out_loss": losses / count, "held_out_action_error": errors / values}


def _measure(
    accelerator: Accelerator,
    state: TrainState,
    source: Source,
    prepare: Callable[[Batch], Batch],
    rows: Tensor,
    seed: int,
) -> Tensor:
    """Return the sum of losses, rows, sum of errors and number of action values, [4]."""
    policy = state.policy
    raw = source.batch(rows)
    actions, is_pad = raw["action"].clone(), raw["action_is_pad"]
    batch = prepare(raw)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(actions.shape, generator=generator)
    noise, time = policy.sample_noise_and_time(batch["action"], generator)
    with accelerator.autocast():
        loss, _ = policy(batch, noise=noise, time=time)
        predicted = policy.predict_action_chunk(batch, noise=start)
    error = (state.processors[1](predicted).float().cpu() - actions).abs()[~is_pad]
    return torch.tensor([loss.item() * len(rows), len(rows), error.sum().item(), error.numel()])


@contextmanager
def _averaged_weights(state: TrainState) -> Iterator[None]:
    """Put the averaged weights into the policy, uncompiled and in evaluation mode."""
    state.policy.eval()
    try:
        with state.average.applied(), uncompiled(state.policy):
            yield
    finally:
        state.policy.train()


def evaluate_closed_loop(
    accelerator: Accelerator, config: SimulationConfig, checkpoint: Path, device: str
) -> tuple[dict[str, float], list[Path]]:
    """Evaluate the averaged weights of a complete checkpoint in closed loop.

    All processes call it; random states are left unchanged. Reports and videos lie in the run's folder
    `simulation/<step>`, one folder a process; after a kill the evaluation resumes there. Returns `success` in
    [0, 1] and `episodes` over all processes, and this process's videos (mp4).

    Raises:
        ValueError: If the policy does not fit the environment.
        WorkerError: If a simulator failed.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = checkpoint.parents[1] / SIMULATION / checkpoint.name / str(rank)
    with _kept_random_state():
        summary = _evaluate_share(config, checkpoint / PRETRAINED, device, folder, rank, world)
    counts = [0.0, 0.0] if summary is None else [summary["successes"], summary["episodes"]]
    total: Any = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum")
    successes, episodes = total.tolist()
    return {"success": successes / episodes, "episodes": episodes}, sorted((folder / "videos").glob("*.mp4"))


def _evaluate_share(
    config: SimulationConfig, pretrained: Path, device: str, folder: Path, rank: int, world: int
) -> dict[str, Any] | None:
    """Return the summary of this process's episodes, None if there are more processes than episodes."""
    settings = EvaluationSettings(
        suite=config.env.suite,
        episodes_per_task=config.episodes_per_task,
        seed=config.seed,
        batch_size=default_batch_size(device),
        processes=config.processes,
        videos=config.videos,
    )
    frames = choose_frames(pretrained, asdict(config.env))
    provenance = {
        "checkpoint_sha256": checkpoint_fingerprint(pretrained),
        **frames,
        "share": f"{rank} of {world}",
    }
    evaluation = Evaluation(settings, resolve(config.tasks)(config.env.suite), folder, provenance)
    evaluation.episodes = evaluation.episodes[rank::world]
    if not evaluation.episodes:
        return None
    factory = EnvironmentFactory(config.make, **frames)
    with WorkerPool(factory, min(config.processes, len(evaluation.episodes))) as pool:
        evaluation.prepare(pool)
        summary = evaluation.run({"none": load_lerobot_policy(pretrained, device=device)}, pool)
    return summary["ablations"]["none"]


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore this process's random states, from which building a policy draws."""
    generator = torch.Generator()
    state = rng_state(generator)
    try:
        yield
    finally:
        set_rng_state(state, generator)
