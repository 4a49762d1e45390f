"""Started by torch's launcher in one or two processes: trains the cases of test_training_parallel.py."""

import sys
from dataclasses import replace
from pathlib import Path

from tests.training_runs import tiny_policy, tiny_run
from vega_policy.model.config import FusionConfig
from vega_policy.training.train import train

GLOBAL_BATCH = 8  # divided by processes and by accumulated batches
CASES = {
    "plain": {},
    "accumulated": {"accumulate": 2, "batch_size": GLOBAL_BATCH // 2},
    "prior_only": {"fusion": "prior_only"},
    "semantic_only": {"fusion": "semantic_only"},
    "sharded": {"sharding": "full"},
    "sharded_prior_only": {"sharding": "full", "fusion": "prior_only"},
}


def run(root: Path, output: Path, world: int, fusion: str = "token_gate", **fields):
    """One run whose processes together learn from as many samples a step as one would alone."""
    policy = tiny_policy(fusion=FusionConfig(name=fusion))
    batch = fields.pop("batch_size", GLOBAL_BATCH) // world
    config = tiny_run(root, output, policy=policy, batch_size=batch, steps=6, save_every=3, **fields)
    return train(replace(config, dataset=replace(config.dataset, held_out=0.4)))


def main() -> None:
    """Arguments: dataset, output folder, number of processes."""
    root, output, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for name, fields in CASES.items():
        run(root, output / name, world, **fields)
    run(root, output / "resumed", world, sharding="full", stop_after=3)
    run(root, output / "resumed", world, sharding="full", resume=True)


if __name__ == "__main__":
    main()
