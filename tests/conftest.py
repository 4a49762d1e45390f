"""What several test files share, made once a process."""

import pytest

from tests.synthetic_dataset import write_dataset


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A synthetic dataset of three episodes, two cameras, two tasks; not to be written to."""
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")
