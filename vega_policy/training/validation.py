"""Loss and action error on episodes that training never sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vega_policy.checkpoints import PRETRAINED
from vega_policy.data.loader import Batch, Source
from vega_policy.evaluation.config import EvaluationSettings
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.evaluate import Evaluation
from vega_policy.evaluation.policies import checkpoint_fingerprint, load_lerobot_policy
from vega_policy.model.torch_compile import uncompiled
from vega_policy.training.checkpoint import TrainState, rng_state, set_rng_state
from vega_policy.training.config import SimulationConfig

Prepare = Callable[[Batch], Batch]


def spread(rows: Tensor, most: int | None) -> Tensor:
    """At most so many of the rows [m], evenly spaced; all for None."""
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


@torch.no_grad()
def held_out_scores(
    accelerator: Accelerator,
    learner: TrainState,
    source: Source,
    prepare: Prepare,
    rows: Tensor,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """What the averaged weights make of held-out rows, always with the same noise.

    To be called by all processes; each takes its share of the batches. Random states are left as they were.

    Args:
        accelerator: The processes.
        learner: Policy, averaged weights, processors.
        source: Batches of rows.
        prepare: What a batch passes before the policy.
        rows: The rows [m], m >= 1.
        batch_size: Rows at once.
        seed: Seed of the noise.

    Returns:
        `held_out_loss`, the mean training loss of a row, and `held_out_action_error`, the mean absolute
        difference between predicted and demonstrated actions in the dataset's units, padded ones left out.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = rows.split(batch_size)
    sums = torch.zeros(4)  # losses, rows, errors, action values
    with _lent(learner):
        for number in range(rank, -(-len(batches) // world) * world, world):
            # Shards compute in step: a process without a batch of its own repeats the last and counts none.
            own = number < len(batches)
            rows = batches[min(number, len(batches) - 1)]
            measured = _measure(accelerator, learner, source, prepare, rows, seed + number)
            sums += measured if own else 0.0
    reduced: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
    losses, count, errors, values = reduced.tolist()
    return {"held_out_loss": losses / count, "held_out_action_error": errors / values}


def _measure(
    accelerator: Accelerator, learner: TrainState, source: Source, prepare: Prepare, rows: Tensor, seed: int
) -> Tensor:
    """Sum of losses, rows, sum of errors, number of action values, [4]."""
    policy = learner.policy
    raw = source.batch(rows)
    actions, is_pad = raw["action"].clone(), raw["action_is_pad"]
    batch = prepare(raw)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(actions.shape, generator=generator)
    noise, time = policy.sample_noise_and_time(batch["action"], generator)
    with accelerator.autocast():
        loss, _ = policy(batch, noise=noise, time=time)
        predicted = policy.predict_action_chunk(batch, noise=start)
    error = (learner.processors[1](predicted).float().cpu() - actions).abs()[~is_pad]
    return torch.tensor([loss.item() * len(rows), len(rows), error.sum().item(), error.numel()])


@contextmanager
def _lent(learner: TrainState) -> Iterator[None]:
    """The policy with averaged weights, in evaluation mode."""
    policy = learner.policy
    policy.eval()
    try:
        with learner.average.applied(), uncompiled(policy):
            yield
    finally:
        policy.train()


SIMULATION = "simulation"


@dataclass(frozen=True)
class Played:
    """Outcome of a closed-loop evaluation over all processes.

    Attributes:
        scores: `success` in [0, 1] and `episodes`.
        films: This process's films, mp4 files.
    """

    scores: dict[str, float]
    films: list[Path]


def play(accelerator: Accelerator, config: SimulationConfig, checkpoint: Path, device: str) -> Played:
    """Plays the policy of a checkpoint, its averaged weights, in closed loop.

    To be called by all processes; random states are left as they were. Reports and films lie in the run's
    folder `simulation/<step>`, one folder a process; started again after a kill it goes on there.

    Args:
        accelerator: The processes.
        config: What is played.
        checkpoint: A complete checkpoint.
        device: Where the policy computes.

    Raises:
        ValueError: If the policy does not fit the environment.
        WorkerError: If a simulator failed.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = checkpoint.parents[1] / SIMULATION / checkpoint.name / str(rank)
    with kept_random_state():
        summary = _play_share(config, checkpoint / PRETRAINED, device, folder, rank, world)
    counts = [0.0, 0.0] if summary is None else [summary["successes"], summary["episodes"]]
    total: Any = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum")
    successes, episodes = total.tolist()
    films = sorted((folder / "videos").glob("*.mp4"))
    return Played({"success": successes / episodes, "episodes": episodes}, films)


def _play_share(
    config: SimulationConfig, pretrained: Path, device: str, folder: Path, rank: int, world: int
) -> dict[str, Any] | None:
    """Summary of this process's episodes; None if there are fewer episodes than processes and it has none."""
    settings = EvaluationSettings(
        suite=config.env.suite,
        episodes_per_task=config.episodes_per_task,
        seed=config.seed,
        num_envs=config.num_envs,
        processes=config.processes,
        videos=config.videos,
    )
    provenance = {
        "checkpoint_sha256": checkpoint_fingerprint(pretrained),
        "frame_size": config.env.frame_size,
        "rendering": config.env.rendering,
        "share": f"{rank} of {world}",
    }
    evaluation = Evaluation(settings, resolve(config.tasks)(config.env.suite), folder, provenance)
    evaluation.episodes = evaluation.episodes[rank::world]
    if not evaluation.episodes:
        return None
    factory = EnvironmentFactory(config.make, config.env.frame_size, config.env.rendering)
    with WorkerPool(factory, min(config.processes, config.num_envs)) as pool:
        evaluation.prepare(pool)
        summary = evaluation.run({"none": load_lerobot_policy(pretrained, device=device)}, pool)
    return summary["ablations"]["none"]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Gives this process's random states back as they were: a policy that is built draws from them."""
    draws = torch.Generator()
    state = rng_state(draws)
    try:
        yield
    finally:
        set_rng_state(state, draws)
