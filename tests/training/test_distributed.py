"""Two gloo processes on the CPU learn what one learns; what is sharded is saved and loaded whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel_program import CASES
from tests.training_runs import assert_bitwise_equal

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def launch(root: Path, output: Path, world: int) -> None:
    program = REPOSITORY / "tests" / "parallel_program.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    outcome = subprocess.run(
        [sys.executable, *launcher, program, root, output, str(world)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-6000:]


@pytest.fixture(scope="module")
def folders(root, tmp_path_factory):
    """The cases trained by one and by two processes."""
    output = tmp_path_factory.mktemp("parallel")
    for world in (1, 2):
        launch(root, output / str(world), world)
    return output / "1", output / "2"


def curve(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_at_half_the_batch_have_the_losses_of_one(folders, case):
    one, two = folders
    for name, count in (("loss", 6), ("gradient_norm", 6)):
        expected, found = curve(one / case, name), curve(two / case, name)
        assert len(expected) == len(found) == count
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_they_end_with_the_weights_of_one(folders, case):
    one, two = (folder / case / "checkpoints" / "000006" / "pretrained_model" for folder in folders)
    expected, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_prior_is_in_no_optimizer_and_no_checkpoint_of_shards(folders):
    for name in ("model.safetensors", "../training_state/optimizer_state.safetensors"):
        one, two = (f / "sharded" / "checkpoints" / "000006" / "pretrained_model" / name for f in folders)
        expected, found = load_file(one), load_file(two)
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in expected.items()
        }
        assert not any(".prior." in key for key in found)


def test_shards_that_were_saved_and_loaded_go_on_bit_by_bit(folders):
    _, two = folders
    assert_bitwise_equal(
        two / "sharded" / "checkpoints" / "000006", two / "resumed" / "checkpoints" / "000006"
    )


def test_processes_that_share_a_step_draw_other_random_numbers(folders):
    _, two = folders
    state = two / "plain" / "checkpoints" / "000006" / "training_state"
    first, second = (load_file(state / f"rng_state{rank}.safetensors") for rank in ("", "_1"))
    assert not torch.equal(first["torch_rng_state"], second["torch_rng_state"])
    assert torch.equal(first["generator"], second["generator"])
