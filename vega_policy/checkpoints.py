"""Where a run's checkpoints lie, whether their files are intact, how they score and which ones are kept.

    <run>/scores.json                   measurements by step
          checkpoints/<step>/           LeRobot's layout, with checksums.json over all files
                      last, best        links
                      <step>.damaged    set aside when a run resumed from an earlier one

This module imports no torch and no LeRobot; `vega_policy.training.checkpoint` writes and reads the contents.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from vega_policy.run_dir import delete_folder, point_link, write_json

logger = logging.getLogger(__name__)

CHECKPOINTS, PRETRAINED, STATE = "checkpoints", "pretrained_model", "training_state"
CHECKSUMS, SCORES = "checksums.json", "scores.json"
LAST, BEST, DAMAGED_SUFFIX = "last", "best", ".damaged"

Scores = dict[int, dict[str, float]]
"""Measurements by step: `success` in [0, 1], `held_out_loss`, ..."""


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are not those that were written; the message names them."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return every complete checkpoint of a run, oldest first."""
    found = [path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder`, and of the list itself, to its `checksums.json`."""
    (folder / CHECKSUMS).write_bytes(_render({name: _digest(folder / name) for name in _files(folder)}))


def find_damage(folder: Path, *, below: str = "") -> list[str]:
    """Return one phrase for each file that differs from what `write_checksums` saw; empty if intact.

    Files outside the sub-folder `below` (`""` for none) may be altered or missing.
    """
    note = folder / CHECKSUMS
    if not note.is_file():
        return [f"{CHECKSUMS} is missing"]
    expected = _read(note)
    if expected is None:
        return [f"{CHECKSUMS} is altered"]
    present = set(_files(folder))
    wrong = [
        f"{name} is {'altered' if name in present else 'missing'}"
        for name, digest in expected.items()
        if name.startswith(below) and (name not in present or _digest(folder / name) != digest)
    ]
    return wrong + [f"{name} does not belong there" for name in sorted(present - expected.keys())]


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(files: dict[str, str]) -> bytes:
    """Return the list in its only valid form: a change of any of its bytes is detected."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "own": own}, indent=1, sort_keys=True) + "\n").encode()


def _read(note: Path) -> dict[str, str] | None:
    """Return digests by file, None if the list is not what `_render` gives."""
    content = note.read_bytes()
    try:
        files = json.loads(content)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) and _render(files) == content else None


def newest_intact(run: Path) -> Path | None:
    """Return the newest intact checkpoint, None before the first one; newer damaged ones are logged.

    Raises:
        DamagedCheckpointError: If there are checkpoints, but none is intact.
    """
    findings = []
    for checkpoint in reversed(list_checkpoints(run)):
        wrong = find_damage(checkpoint)
        if not wrong:
            return checkpoint
        findings.append(f"{checkpoint}: {', '.join(wrong)}")
        logger.warning("Damaged checkpoint, skipped. %s.", findings[-1])
    if findings:
        raise DamagedCheckpointError(
            f"No checkpoint of {run} is intact. {'; '.join(findings)}. Restore these files from a copy, or "
            "delete the folder to start over."
        )
    return None


def require_intact(folder: Path) -> None:
    """Refuse a checkpoint, its `pretrained_model` or an exported policy whose files were altered.

    A folder without checksums, such as LeRobot's own, passes.

    Raises:
        DamagedCheckpointError: Names the files, and the newest intact checkpoint of the same run.
    """
    folder = folder.resolve()
    named, below = (folder, "") if (folder / CHECKSUMS).is_file() else (folder.parent, f"{folder.name}/")
    wrong = find_damage(named, below=below) if (named / CHECKSUMS).is_file() else []
    if not wrong:
        return
    if named.parent.name != CHECKPOINTS:
        raise DamagedCheckpointError(f"{named} is damaged: {', '.join(wrong)}. Copy or export it again.")
    intact = [
        path for path in list_checkpoints(named.parent.parent) if path != named and not find_damage(path)
    ]
    offer = f"Use {intact[-1]} instead" if intact else "No other checkpoint of this run is intact"
    raise DamagedCheckpointError(f"{named} is damaged: {', '.join(wrong)}. {offer}.")


def set_aside_after(run: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `<step>.damaged`, replacing earlier ones of that name."""
    for checkpoint in list_checkpoints(run):
        if int(checkpoint.name) > step:
            aside = checkpoint.with_name(checkpoint.name + DAMAGED_SUFFIX)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def read_scores(run: Path) -> Scores:
    """Return all measurements of a run by step."""
    path = run / SCORES
    return {int(step): row for step, row in json.loads(path.read_text()).items()} if path.is_file() else {}


def add_scores(run: Path, step: int, measured: dict[str, float]) -> None:
    """Add measurements of a step."""
    scores = read_scores(run)
    write_json(run / SCORES, scores | {step: scores.get(step, {}) | measured})


def rank_by_score(steps: list[int], scores: Scores) -> list[int]:
    """Return the steps with a score, best first: by success, then by held-out loss, then the later one."""

    def key(step: int) -> tuple[float, float, int]:
        row = scores[step]
        return row.get("success", -1.0), -row.get("held_out_loss", float("inf")), step

    scored = [step for step in steps if scores.get(step, {}).keys() & {"success", "held_out_loss"}]
    return sorted(scored, key=key, reverse=True)


def prune_checkpoints(run: Path, *, keep_last: int | None, keep_best: int) -> None:
    """Point `last` and `best`, and delete the checkpoints that are neither recent nor good.

    Args:
        run: The run's folder.
        keep_last: Newest ones to keep, at least 1; None keeps all.
        keep_best: Best ones to keep besides; the one that `best` points to is always kept.
    """
    steps = [int(path.name) for path in list_checkpoints(run)]
    ranked = rank_by_score(steps, read_scores(run))
    for name, found in ((LAST, steps[-1:]), (BEST, ranked[:1])):
        if found:
            point_link(run / CHECKPOINTS / name, checkpoint_path(run, found[0]))
    if keep_last is None:
        return
    for step in set(steps) - {*steps[-keep_last:], *ranked[: max(keep_best, 1)]}:
        delete_folder(checkpoint_path(run, step))
