"""A dataset whose files are not whole is refused by name, before anything is built."""

import json
import shutil

import pytest

from tests.training_runs import tiny_run
from vega_policy.data.dataset_files import DatasetError, find_damaged_files
from vega_policy.training.train import load_data


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def test_a_whole_dataset_has_no_find_damaged_files(root):
    assert find_damaged_files(root) == []


@pytest.mark.parametrize("pattern", ["data/**/*.parquet", "meta/episodes/**/*.parquet", "videos/**/*.mp4"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_file_is_named(copy, tmp_path, pattern, left):
    path = next(copy.glob(pattern))
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(DatasetError, match=f"damaged or only partly written: {path.relative_to(copy)} "):
        load_data(tiny_run(copy, tmp_path / "run"))


def test_fewer_rows_than_announced_are_found(copy):
    info = copy / "meta" / "info.json"
    announced = json.loads(info.read_text())
    info.write_text(json.dumps(announced | {"total_frames": announced["total_frames"] + 1}))
    (finding,) = find_damaged_files(copy)
    assert finding.endswith(f"meta/info.json announces {announced['total_frames'] + 1}")
