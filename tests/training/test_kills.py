"""Killed at any moment and resumed, a training ends with the weights of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import assert_bitwise_equal, tiny_run
from vega_policy.checkpoints import checkpoint_path
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_twenty_kills_some_inside_a_checkpoints_write_change_no_bit(root, tmp_path):
    output = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "kill_program.py", root, tmp_path, "20"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=3000,
        check=True,
    ).stdout
    counts = json.loads(output.splitlines()[-1])
    assert counts["kills"] == 20
    assert counts["in_write"] >= 3, output
    assert counts["checkpoints"] == sorted(counts["checkpoints"])
    assert counts["checkpoints"][-1] > counts["checkpoints"][0], output
    assert_bitwise_equal(
        checkpoint_path(tmp_path / "straight", 240), checkpoint_path(tmp_path / "killed", 240)
    )


@pytest.mark.slow
def test_two_decoding_processes_change_no_bit_of_a_resumed_run(root, tmp_path):
    def run(name, workers=2, **fields):
        return train(tiny_run(root, tmp_path / name, dataset={"cache": "none", "workers": workers}, **fields))

    alone, straight = run("alone", workers=0), run("straight")
    run("parts", stop_after=2)
    resumed = run("parts", resume=True)
    assert_bitwise_equal(straight, resumed)
    assert_bitwise_equal(alone, straight)
