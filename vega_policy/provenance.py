"""Code, packages and hardware of a run, as plain values."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from vega_policy import PACKAGE

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def environment() -> dict[str, Any]:
    """Return code revision, Python version, versions of all packages, and hardware."""
    return {
        "code": code_revision(),
        "python": platform.python_version(),
        "packages": packages(),
        "hardware": hardware(),
    }


@cache
def packages() -> dict[str, str]:
    """Return the versions of all installed packages by name, read once a process."""
    found = (distribution.metadata for distribution in distributions())
    return dict(sorted((metadata["Name"], metadata["Version"]) for metadata in found))


@cache
def code_revision() -> dict[str, Any]:
    """Return the git revision of this package and whether tracked files are changed; None if installed."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {"revision": None, "changed": None}
    return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


@cache
def hardware() -> dict[str, Any]:
    """Return processor, memory (GB) and accelerators."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def available_cores() -> int:
    """Return the number of cores that this process may use; in a container, its quota."""
    cores = len(os.sched_getaffinity(0))
    if not _QUOTA.is_file():
        return cores
    limit, period = _QUOTA.read_text().split()
    return cores if limit == "max" else min(cores, max(1, int(limit) // int(period)))


def use_available_cores() -> None:
    """Set torch's threads to the available cores, unless OMP_NUM_THREADS is set.

    In a container torch counts the host's cores, which makes small models many times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())


def _git(*arguments: str) -> str | None:
    if not (PACKAGE.parent / ".git").exists():  # an installed package may lie inside another repository
        return None
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=30
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
