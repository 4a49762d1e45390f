"""Killed at any moment and resumed, a command ends with the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import assert_bitwise_equal, tiny_run
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ["training", "cache", "evaluation", "collection", "pretraining"]


def run_program(*arguments):
    output = subprocess.run(
        [sys.executable, "-m", "tests.kill_program", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=3000,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_twenty_kills_change_no_bit_and_lose_nothing_that_was_finished(tmp_path, program):
    counts = run_program(program, tmp_path, 20)
    assert counts["kills"] == 20
    assert counts["same"], counts
    assert counts["finished"] == sorted(counts["finished"]), counts


@pytest.mark.slow
def test_two_decoding_processes_change_no_bit_of_a_resumed_run(root, tmp_path):
    def run(name, workers=2, **fields):
        return train(tiny_run(root, tmp_path / name, dataset={"cache": "none", "workers": workers}, **fields))

    alone, straight = run("alone", workers=0), run("straight")
    run("parts", stop_after=2)
    resumed = run("parts", resume=True)
    assert_bitwise_equal(straight, resumed)
    assert_bitwise_equal(alone, straight)
