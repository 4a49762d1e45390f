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
WITH_CACHE = ["training", "cache", "rendering"]
NEED = r"(it needs (more than )?\d+ bytes, |takes about \d+ bytes, and )\d+ are free"


def run_program(how, program, folder, count, mount="true", **environment):
    """Interrupt a command, after the shell command `mount` in a mount namespace."""
    prefix = []
    if mount != "true" or how != "kill":
        prefix = ["unshare", "--map-root-user", "--mount", "sh", "-ec", f'{mount}; exec "$@"', "sh"]
        if subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", folder]).returncode != 0:
            pytest.skip("this machine allows no mounts")
    output = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.interruption_program", how, program, str(folder), str(count)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
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


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_a_full_disk_is_named_in_bytes_and_after_making_room_the_command_continues(tmp_path, program):
    counts = run_program("fill", program, tmp_path, 8)
    assert counts["in_write"] == 0  # unfinished files are deleted
    for message in counts["messages"]:
        assert re.match(r"DiskFullError: DISK/run", message), message
        assert re.search(NEED, message), message


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_an_output_or_a_cache_that_cannot_be_written_to_is_refused(tmp_path, program):
    places = 2 if program in WITH_CACHE else 1
    for message in run_program("protect", program, tmp_path, places)["messages"]:
        assert re.match(
            r"PermissionError: DISK.*can write to, got: Read-only file system\. Give another", message
        ), message


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_a_file_in_place_of_the_output_or_the_cache_is_named_and_kept(tmp_path, program):
    places = ["run", "run-cache"] if program in WITH_CACHE else ["run"]
    messages = run_program("misplace", program, tmp_path, len(places))["messages"]
    for place, message in zip(places, messages, strict=True):
        assert re.match(rf"(NotADirectoryError|FileExistsError): DISK/{place}\b", message), message


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_a_damaged_file_of_a_result_is_no_traceback(tmp_path, program):
    messages = run_program("damage", program, tmp_path, 30)["messages"]
    assert [message for message in messages if not message.startswith("message ")] == []


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RESUMABLE, "export"])
def test_of_two_starts_at_once_one_is_refused_and_the_other_ends_as_alone(tmp_path, program):
    for message in run_program("twice", program, tmp_path, 2)["messages"]:
        held = r"FolderInUseError: .* is in use by process WINNER on \S+ since 2"
        done = "FileExistsError: RUN exists already"  # an export may end before the other one starts
        assert re.match(f"{held}|{done}" if program == "export" else held, message), message


@pytest.mark.slow
@pytest.mark.parametrize("program", ["training", "evaluation", "collection", "pretraining"])
def test_nothing_needs_a_home_that_can_be_written_to(tmp_path, program):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "run").mkdir()
    mount = f"mount -t tmpfs tmpfs {home}; mount -o remount,ro {home}"
    run_program("kill", program, tmp_path / "run", 0, mount, HOME=str(home))


@pytest.mark.slow
def test_decoding_processes_are_refused_where_shared_memory_is_too_small(tmp_path):
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    (message,) = run_program("fail", "decoding", tmp_path, 1, mount)["messages"]
    assert re.match(
        r"ValueError: dataset\.workers=2 needs about \d+ bytes of shared memory, and /dev/shm has \d+ free",
        message,
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
