"""Fixtures that several test files share, made once a process.

Heavy imports stay inside the fixtures: pytest-xdist's controller reads this file before it starts workers.
"""

import gc
import importlib.metadata
import sys
from functools import cache

import pytest
from hydra.core.config_store import ConfigStore

from vega_policy.cli import register_groups

register_groups()  # composed configs need the generated options
# Hydra copies all options at each composition, and then those that it loads once more.
ConfigStore.__deepcopy__ = lambda self, memo: self
# diffusers and transformers each read the files of all installed packages
importlib.metadata.packages_distributions = cache(importlib.metadata.packages_distributions)
FROZEN: dict[str, int] = {}  # number of modules that the collector no longer walks through
gc.disable()  # until all is imported: the collector would walk through the imported modules again and again


def pytest_collectstart():
    # timm imports wandb, which walks through all loaded modules: import it while there are few
    import wandb  # noqa: F401


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown():
    # robosuite collects garbage whenever a simulator is closed, in all modules that tests have imported
    if len(sys.modules) > FROZEN.get("modules", 0) + 100:
        FROZEN["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A synthetic dataset of three episodes, two cameras, two tasks; not to be written to."""
    from tests.synthetic_dataset import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="session")
def finished(root, tmp_path_factory):
    """A training run of four steps with a checkpoint every two; not to be written to."""
    from tests.training_runs import tiny_run
    from vega_policy.training.train import train

    return train(tiny_run(root, tmp_path_factory.mktemp("runs") / "straight")).parents[1]


@pytest.fixture(scope="session")
def robosuite_env():
    """Return the environment of a suite without cameras, made at first use; reset it, do not close it."""
    import envs

    made = {}

    def env_of(suite):
        if suite not in made:
            made[suite] = envs.make(suite, 0, render=False)
        return made[suite]

    yield env_of
    for env in made.values():
        env.close()


@pytest.fixture(scope="session")
def wan_checkpoint(tmp_path_factory):
    """A randomly initialised Wan in the hub's folder layout; not to be written to."""
    import torch

    from tests.tiny_wan import write_wan

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(5)  # not the seed of the untrained copies that it is compared with
    write_wan(folder)
    return folder


@pytest.fixture(scope="session")
def prior_checkpoint(tmp_path_factory):
    """Return the folder of a prior's small checkpoint, written at first use; not to be written to."""
    from tests.prior_checkpoints import write_checkpoint

    root, made = tmp_path_factory.mktemp("priors"), {}

    def written(name):
        if name not in made:
            made[name] = write_checkpoint(name, root / name)
        return made[name]

    return written
