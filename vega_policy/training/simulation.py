"""Closed-loop evaluation of a checkpoint while training: each process plays its share of the episodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vega_policy.evaluation.evaluate import Evaluation
from vega_policy.evaluation.lerobot_policy import checkpoint_fingerprint, load_lerobot_policy
from vega_policy.evaluation.pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.settings import EvaluationSettings
from vega_policy.evaluation.worker import resolve
from vega_policy.training.checkpoints import PRETRAINED, rng_state, set_rng_state
from vega_policy.training.options import SimulationConfig

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
        slots=config.slots,
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
    with WorkerPool(factory, min(config.processes, config.slots)) as pool:
        evaluation.prepare(pool)
        summary = evaluation.run({"none": load_lerobot_policy(pretrained, device=device)}, pool)
    return summary["controls"]["none"]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Gives this process's random states back as they were: a policy that is built draws from them."""
    draws = torch.Generator()
    state = rng_state(draws)
    try:
        yield
    finally:
        set_rng_state(state, draws)
