"""Under which conditions evaluations were played, so that unlike ones are not compared unawares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vega_policy.evaluation.run_folder import SETTINGS_FILE

SHOWN = ("frame_size", "rendering", "action_steps")
"""Settings that change what a policy is shown or how often it is asked, and leave the episodes the same."""

Settings = Mapping[str, Any]


def read_conditions(folder: Path) -> dict[str, Any]:
    """Return the settings of an evaluation; none where its folder holds episodes alone.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} cannot be read: expected an object, got {type(settings).__name__}")
    return settings


def require_two(folders: Sequence[Path], controls: Sequence[str]) -> None:
    """Refuse to compare a folder with itself.

    Raises:
        ValueError: If two of the folders are one and the same, under the same control.
    """
    seen: dict[tuple[Path, str], Path] = {}
    for folder, control in zip(folders, controls, strict=True):
        place = (folder.resolve(), control)
        if twin := seen.get(place):
            raise ValueError(
                f"{twin} and {folder} are one folder under one control ({control}): every difference would "
                "be zero; give two folders, or another control for the last with --second-control"
            )
        seen[place] = folder


def same_checkpoint(first: Settings, second: Settings) -> bool:
    """Tell whether two evaluations are known to be of one and the same checkpoint."""
    known = first.get("checkpoint_sha256")
    return known is not None and known == second.get("checkpoint_sha256")


def unlike_conditions(pairs: Mapping[str, tuple[Settings, Settings]]) -> list[str]:
    """Return one sentence for each setting that the two sides of a comparison do not share.

    Args:
        pairs: Settings of the first and of the second evaluation, by the place where they lie.
    """
    places: dict[str, list[str]] = {}
    for place, (first, second) in pairs.items():
        if not (first and second):
            places.setdefault(
                f"whether it was is not known without {SETTINGS_FILE} on both sides", []
            ).append(place)
            continue
        for name in SHOWN:
            if first.get(name) != second.get(name):
                unlike = f"{name}: {first.get(name)} in the first, {second.get(name)} in the second"
                places.setdefault(unlike, []).append(place)
    return [f"Not played alike, {what} ({', '.join(where)})." for what, where in places.items()]
