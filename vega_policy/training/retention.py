"""Which checkpoints of a run there are, which is the last and which the best, and which are kept.

outputs/<run>/checkpoints/<step>/    complete, with checksums
              checkpoints/last       -> newest one
              checkpoints/best       -> highest closed-loop success, else lowest held-out loss
              scores.json            what was measured after each step
"""

import json
import logging
import shutil
from pathlib import Path

from vega_policy.training.folders import PARTIAL_SUFFIX, point_link, replace_text
from vega_policy.training.integrity import CHECKSUMS, DamagedCheckpointError, damage

logger = logging.getLogger(__name__)

CHECKPOINTS, LAST, BEST, SCORES = "checkpoints", "last", "best", "scores.json"
DAMAGED_SUFFIX = ".damaged"

Scores = dict[int, dict[str, float]]
"""What was measured, by step: `success` in [0, 1], `held_out_loss`, ..."""


def checkpoint_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """Every checkpoint of a run that was written to its end, oldest first."""
    there = [path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit()]
    return sorted(there, key=lambda path: int(path.name))


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose files are those that were written, None before the first one.

    Damaged ones that are newer are named in the log and passed over.

    Raises:
        DamagedCheckpointError: If there are checkpoints, but none is sound; names what is wrong with each.
    """
    complaints = []
    for checkpoint in reversed(checkpoints_of(run)):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        complaints.append(f"{checkpoint}: {', '.join(wrong)}")
        logger.warning("Damaged checkpoint, passed over. %s.", complaints[-1])
    if complaints:
        raise DamagedCheckpointError(
            f"No checkpoint of {run} is sound. {'; '.join(complaints)}. Restore these files from a copy, or "
            "delete the folder to start the run anew."
        )
    return None


def set_aside_after(run: Path, step: int) -> None:
    """Renames the checkpoints after `step`, which `newest_sound` passed over, so that theirs can be written.

    They become `<step>.damaged`; an earlier one of that name is deleted.
    """
    for checkpoint in checkpoints_of(run):
        if int(checkpoint.name) > step:
            aside = checkpoint.with_name(checkpoint.name + DAMAGED_SUFFIX)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def require_sound(folder: Path) -> None:
    """Refuses a checkpoint, or a checkpoint's `pretrained_model`, whose files were altered.

    A folder that came without checksums, such as LeRobot's own, is let pass.

    Args:
        folder: What a user named.

    Raises:
        DamagedCheckpointError: Names the files, and the newest sound checkpoint of the same run.
    """
    folder = folder.resolve()
    named, below = (folder, "") if (folder / CHECKSUMS).is_file() else (folder.parent, f"{folder.name}/")
    wrong = damage(named, below=below) if (named / CHECKSUMS).is_file() else []
    if not wrong:
        return
    siblings = [path for path in checkpoints_of(named.parent.parent) if path != named and not damage(path)]
    offer = f"Use {siblings[-1]} instead" if siblings else "No other checkpoint of this run is sound"
    raise DamagedCheckpointError(f"{named} is damaged: {', '.join(wrong)}. {offer}.")


def read_scores(run: Path) -> Scores:
    """What was measured so far, by step."""
    path = run / SCORES
    return {int(step): row for step, row in json.loads(path.read_text()).items()} if path.is_file() else {}


def add_scores(run: Path, step: int, measured: dict[str, float]) -> None:
    """Notes what was measured after a step."""
    scores = read_scores(run)
    scores[step] = scores.get(step, {}) | measured
    replace_text(run / SCORES, json.dumps(scores, indent=1) + "\n")


def by_merit(steps: list[int], scores: Scores) -> list[int]:
    """The steps that have a score, best first: by success, then by held-out loss, then the later one."""

    def merit(step: int) -> tuple[float, float, int]:
        row = scores[step]
        return row.get("success", -1.0), -row.get("held_out_loss", float("inf")), step

    scored = [step for step in steps if scores.get(step, {}).keys() & {"success", "held_out_loss"}]
    return sorted(scored, key=merit, reverse=True)


def tidy(run: Path, *, keep_last: int | None, keep_best: int) -> None:
    """Points `last` and `best`, and deletes the checkpoints that are neither recent nor good.

    Args:
        run: The run's folder.
        keep_last: So many newest ones are kept, at least 1; None keeps all.
        keep_best: So many best ones are kept besides; the one that `best` points to always is.
    """
    steps = [int(path.name) for path in checkpoints_of(run)]
    ranked = by_merit(steps, read_scores(run))
    links = {LAST: steps[-1:], BEST: ranked[:1]}
    for name, found in links.items():
        if found:
            point_link(run / CHECKPOINTS / name, checkpoint_of(run, found[0]))
    if keep_last is None:
        return
    kept = {*steps[-keep_last:], *ranked[: max(keep_best, 1)]}
    for step in set(steps) - kept:
        doomed = checkpoint_of(run, step)
        partial = doomed.with_name(f".{doomed.name}{PARTIAL_SUFFIX}")
        doomed.rename(partial)  # from here on a kill leaves nothing that looks like a checkpoint
        shutil.rmtree(partial)
