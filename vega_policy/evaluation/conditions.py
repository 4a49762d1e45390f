"""Under which conditions evaluations were played, so that unlike ones are not compared unawares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vega_policy.evaluation.run_folder import SETTINGS_FILE, SUMMARY_FILE

SHOWN = ("frame_size", "rendering", "action_steps")
"""Settings that change what a policy is shown or how often it is asked, and no initial state."""

Settings = Mapping[str, Any]


def read_conditions(folder: Path) -> dict[str, Any]:
    """Return the settings of an evaluation; none where its folder holds episodes alone.

    `action_steps` are those that were executed, where the summary tells: the settings say null for the
    policy's own number.

    Raises:
        ValueError: If a file cannot be read.
    """
    settings, summary = (_read(folder / name) for name in (SETTINGS_FILE, SUMMARY_FILE))
    return {**settings, **{name: summary[name] for name in ("action_steps",) if name in summary}}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} cannot be read: expected an object, got {type(values).__name__}; copy it again"
        )
    return values


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
                "be zero; give other folders, or other controls (--first-control, --second-control)"
            )
        seen[place] = folder


def same_checkpoint(first: Settings, second: Settings) -> bool:
    """Tell whether two evaluations are known to be of one and the same checkpoint."""
    known = first.get("checkpoint_sha256")
    return known is not None and known == second.get("checkpoint_sha256")


def unlike_conditions(names: tuple[str, str], pairs: Mapping[str, tuple[Settings, Settings]]) -> list[str]:
    """Return one sentence for each setting that the two sides of a comparison do not share.

    Args:
        names: What the first and the second side are called.
        pairs: Settings of the first and of the second evaluation, by the place where they lie.
    """
    unlike: dict[str, list[str]] = {}
    for place, settings in pairs.items():
        for name in SHOWN if all(settings) else ():
            shown = ["not recorded" if of.get(name) is None else of[name] for of in settings]
            if shown[0] != shown[1]:
                sides = ", ".join(f"{side} {value}" for side, value in zip(names, shown, strict=True))
                unlike.setdefault(f"Not played alike, {name}: {sides}", []).append(place)
    for side, name in enumerate(names):
        if unknown := [place for place, settings in pairs.items() if not settings[side]]:
            unlike[f"Whether it was played alike is not known: {name} lacks {SETTINGS_FILE}"] = unknown
    return [f"{what} ({', '.join(places)})." for what, places in unlike.items()]
