"""Fixtures that several test files share, made once a process.

Heavy imports stay inside the fixtures: pytest-xdist's controller reads this file before it starts workers.
"""

import pytest

from vega_policy.cli import register_groups

register_groups()  # composed configs need the generated options


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A synthetic dataset of three episodes, two cameras, two tasks; not to be written to."""
    from tests.synthetic_dataset import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="session")
def wan_checkpoint(tmp_path_factory):
    """A randomly initialised Wan in the hub's folder layout; not to be written to."""
    import torch

    from tests.tiny_wan import write_wan

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(5)  # not the seed of the untrained copies that it is compared with
    write_wan(folder)
    return folder
