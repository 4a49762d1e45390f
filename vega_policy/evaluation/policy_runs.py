"""Reading the evaluations of policies from their folders, `<seed>/<suite>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pyarrow

from vega_policy.evaluation.conditions import Settings, read_conditions, require_two, same_checkpoint
from vega_policy.evaluation.episodes import EpisodeResult
from vega_policy.evaluation.run_folder import EPISODES_FILE, SHARD_FOLDER, read_episodes

RunKey = tuple[str, str]
"""Seed folder ("." where there is none) and suite of an evaluation."""


@dataclass(frozen=True)
class PolicyRuns:
    """All evaluations of one policy.

    Attributes:
        name: How the policy is called in tables.
        folder: Where its evaluations lie.
        control: Control under which they were played.
        runs: Episodes of each evaluation, sorted by their keys.
        settings: Settings of each evaluation, empty where they are not known.
    """

    name: str
    folder: str
    control: str
    runs: Mapping[RunKey, Sequence[EpisodeResult]]
    settings: Mapping[RunKey, Settings]


def is_evaluation(folder: Path) -> bool:
    """Tell whether a folder is one evaluation itself."""
    return (folder / EPISODES_FILE).is_file()


def evaluations_below(folder: Path) -> list[Path]:
    """Return the evaluations in a folder that is none itself; the shards of an evaluation are not listed."""
    if is_evaluation(folder):
        return []
    files = sorted(folder.rglob(EPISODES_FILE))
    return [file.parent for file in files if SHARD_FOLDER not in file.relative_to(folder).parts]


def read_policies(folders: Sequence[Path], controls: Sequence[str]) -> list[PolicyRuns]:
    """Read several policies, called by their folders' names, or by the paths where two names are the same.

    Args:
        folders: Folder of each policy.
        controls: Control of each policy; named where it is not `none`.

    Raises:
        FileNotFoundError: If a folder holds no evaluation.
        ValueError: If two are one folder under one control, and as `read_policy` says.
    """
    require_two(folders, controls)
    of = ["" if control == "none" else f" ({control})" for control in controls]
    names = [folder.resolve().name + control for folder, control in zip(folders, of, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{folder}{control}" for folder, control in zip(folders, of, strict=True)]
    return [read_policy(*policy) for policy in zip(folders, controls, names, strict=True)]


def read_policy(folder: Path, control: str, name: str) -> PolicyRuns:
    """Read all evaluations of a policy.

    Args:
        folder: Holds `<seed>/<suite>/episodes.parquet`, or `<suite>/episodes.parquet` for a single seed.
        control: The control whose episodes are taken; evaluations without it are passed over.
        name: How the policy is called in tables.

    Raises:
        FileNotFoundError: If it holds no evaluation.
        ValueError: If an evaluation lies elsewhere, cannot be read or is of another suite than its folder's
            name, if two seeds are one and the same evaluation or of one checkpoint, or none has the control.
    """
    evaluations = evaluations_below(folder)
    if not evaluations:
        kind = "is one evaluation itself" if is_evaluation(folder) else "holds no evaluation"
        raise FileNotFoundError(
            f"{folder} {kind}; expected the folder of a policy, with <seed>/<suite>/{EPISODES_FILE} in it"
        )
    runs: dict[RunKey, list[EpisodeResult]] = {}
    settings: dict[RunKey, Settings] = {}
    played: set[str] = set()
    for evaluation in evaluations:
        key, episodes = _read_evaluation(folder, evaluation)
        played |= {result.control for result in episodes}
        if chosen := [result for result in episodes if result.control == control]:
            runs[key], settings[key] = sorted(chosen, key=lambda r: r.key), read_conditions(evaluation)
    if not runs:
        raise ValueError(
            f"{folder} has no episodes under the control {control!r}; it has {', '.join(sorted(played))}"
        )
    policy = PolicyRuns(name, str(folder), control, runs, settings)
    _require_own_trainings(policy)
    return policy


def _require_own_trainings(policy: PolicyRuns) -> None:
    for one, other in combinations(policy.runs, 2):
        if one[1] != other[1]:
            continue  # one training may play many suites
        places = " and ".join(f"{policy.folder}/{'/'.join(key)}" for key in (one, other))
        # To the last simulator state, as no two trainings act.
        if policy.runs[one] == policy.runs[other]:
            raise ValueError(
                f"{places} are the same episodes to the last; expected one training in each seed's folder"
            )
        if same_checkpoint(policy.settings[one], policy.settings[other]):
            raise ValueError(
                f"{places} are of one checkpoint ({policy.settings[one]['checkpoint_sha256']}); expected one "
                "training in each seed's folder: move one of them away"
            )


def _read_evaluation(folder: Path, evaluation: Path) -> tuple[RunKey, list[EpisodeResult]]:
    place = evaluation.relative_to(folder)
    if len(place.parts) > 2:
        raise ValueError(
            f"{evaluation} lies too deep in {folder}: expected <seed>/<suite>; give the folder of one policy"
        )
    try:
        episodes = read_episodes(evaluation)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{evaluation / EPISODES_FILE} cannot be read: {error}") from error
    suites = sorted({result.suite for result in episodes})
    if suites != [place.name]:
        raise ValueError(
            f"{evaluation} holds episodes of {', '.join(suites) or 'no suite'}; "
            "expected the folder to be named as its suite"
        )
    return (str(place.parent), place.name), episodes
