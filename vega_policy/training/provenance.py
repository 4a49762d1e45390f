"""What made a run: the code's revision, package versions and hardware, noted at each start."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from vega_policy.resources import PACKAGE
from vega_policy.training.folders import replace_text

PROVENANCE = "provenance.json"


def note_start(run: Path, step: int, processes: int) -> None:
    """Adds this start to the run's `provenance.json`.

    Args:
        run: The run's folder.
        step: Step it goes on from.
        processes: Training processes.
    """
    path = run / PROVENANCE
    starts = json.loads(path.read_text()) if path.is_file() else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"time": now, "from_step": step, "processes": processes, "command": sys.argv, **environment()}
    replace_text(path, json.dumps([*starts, start], indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Code, packages and hardware as plain values."""
    return {
        "code": code_revision(),
        "python": platform.python_version(),
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
        "hardware": hardware(),
    }


@cache
def code_revision() -> dict[str, Any]:
    """The git revision this package runs from, and whether files differ from it; None if installed."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {"revision": None, "changed": None}
    return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


@cache
def hardware() -> dict[str, Any]:
    """Processor, memory and accelerators."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def _git(*arguments: str) -> str | None:
    """What git says about the repository of this package; None if it lies in none."""
    if not (
        PACKAGE.parent / ".git"
    ).exists():  # an installed package may lie below somebody else's repository
        return None
    try:
        told = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=30
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
