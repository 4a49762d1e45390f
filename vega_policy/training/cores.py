"""How many cores this process may use, and torch told of it."""

import os
from pathlib import Path

import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores that this process may use; in a container, not the host's."""
    cores = len(os.sched_getaffinity(0))
    if not QUOTA.is_file():
        return cores
    limit, period = QUOTA.read_text().split()
    return cores if limit == "max" else min(cores, max(1, int(limit) // int(period)))


def use_cores() -> None:
    """Uses the cores this process may use; a user's OMP_NUM_THREADS stands.

    In a container torch counts the host's cores, which slows small models down many times over.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
