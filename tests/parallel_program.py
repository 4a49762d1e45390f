"""Started by torch's launcher in one or two processes: trains the cases of test_training_parallel.py."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.training_runs import tiny_policy, tiny_run
from vega_policy.model.compilation import compile_blocks
from vega_policy.model.config import FusionConfig
from vega_policy.training import train as setup
from vega_policy.training.cuda_graph import check_capturable
from vega_policy.training.train import train

GLOBAL_BATCH = 8  # divided by processes and by accumulated batches
AUGMENTED = {"cached": ["frames"], "shift": 2, "brightness": 0.3, "contrast": 0.3, "state_dropout": 0.3}
CASES = {
    "plain": {},
    "accumulated": {"accumulate": 2, "batch_size": GLOBAL_BATCH // 2},
    "prior_only": {"fusion": "prior_only"},
    "semantic_only": {"fusion": "semantic_only"},
    "augmented": {"dataset": AUGMENTED},
    "compiled": {"compile": True, "dataset": AUGMENTED},
    "sharded": {"sharding": "full"},
    "sharded_augmented": {"sharding": "full", "dataset": AUGMENTED},
    "sharded_prior_only": {"sharding": "full", "fusion": "prior_only"},
}


def run(root: Path, output: Path, world: int, fusion: str = "token_gate", **fields):
    """One run whose processes together learn from as many samples a step as one would alone."""
    policy = tiny_policy(fusion=FusionConfig(name=fusion))
    batch = fields.pop("batch_size", GLOBAL_BATCH) // world
    dataset = {"held_out": 0.4} | fields.pop("dataset", {})
    return train(
        tiny_run(
            root, output, policy=policy, batch_size=batch, steps=6, save_every=3, dataset=dataset, **fields
        )
    )


def main() -> None:
    """Arguments: dataset, output folder, number of processes."""
    root, output, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    setup.compile_blocks = partial(compile_blocks, backend="aot_eager")  # the default takes minutes
    for name, fields in CASES.items():
        run(root, output / name, world, **fields)
    run(root, output / "resumed", world, sharding="full", stop_after=3)
    run(root, output / "resumed", world, sharding="full", resume=True)
    with pytest.raises(ValueError, match="a single process, without a launcher; got one of several"):
        check_capturable(tiny_run(root, output / "captured", capture=True), torch.device("cuda", 0), ["go"])


if __name__ == "__main__":
    main()
