"""Killed at any moment, or on a full disk at any size, and resumed, a command ends with the same result."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import assert_bitwise_equal, tiny_run
from vega_policy.training.train import train

logger = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parents[2]
RESUMABLE = ["training", "cache", "evaluation", "collection", "rendering", "features", "pretraining"]
NEED = r"(it needs (more than )?\d+ bytes, |takes about \d+ bytes, and )\d+ are free"


def run_program(how, program, folder, count):
    prefix = ["unshare", "--map-root-user", "--mount"] if how == "fill" else []
    if prefix and subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", folder]).returncode != 0:
        pytest.skip("this machine allows no mounts")
    output = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.interruption_program", how, program, str(folder), str(count)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=3000,
        check=True,
    ).stdout
    counts = json.loads(output.splitlines()[-1])
    logger.info("%s", counts)
    assert counts["tried"] == count
    assert counts["same"], counts
    assert counts["finished"] == sorted(counts["finished"]), counts
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("program", RESUMABLE)
def test_twenty_kills_change_no_bit_and_lose_nothing_that_was_finished(tmp_path, program):
    counts = run_program("kill", program, tmp_path, 20)
    assert counts["in_write"] > 0
    if program == "collection":
        assert counts["pixels"]["by"] <= 1  # a renderer may round a pixel after other frames otherwise


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_a_full_disk_is_named_in_bytes_and_after_making_room_the_command_continues(tmp_path, program):
    counts = run_program("fill", program, tmp_path, 8)
    assert counts["in_write"] == 0  # unfinished files are deleted
    for message in counts["messages"]:
        assert re.match(r"DiskFullError: DISK/run", message), message
        assert re.search(NEED, message), message


@pytest.mark.slow
def test_two_decoding_processes_change_no_bit_of_a_resumed_run(root, tmp_path):
    def run(name, workers=2, **fields):
        return train(tiny_run(root, tmp_path / name, dataset={"cache": "none", "workers": workers}, **fields))

    alone, straight = run("alone", workers=0), run("straight")
    run("parts", stop_after=2)
    resumed = run("parts", resume=True)
    assert_bitwise_equal(straight, resumed)
    assert_bitwise_equal(alone, straight)
