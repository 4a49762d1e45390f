"""Where a run's checkpoints lie, whether they are safe to load and intact, how they score, which are kept.

    <run>/scores.json                   measurements by step
          checkpoints/<step>/           LeRobot's layout; checksums.json over all files, and one of its own in
                                        pretrained_model/, which is copied and published without the rest
                      last, best        links
                      <step>.damaged    set aside when a run resumed from an earlier one

This module imports no torch and no LeRobot; `vega_policy.training.checkpoint` writes and reads the contents.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vega_policy import packaged_policies
from vega_policy.run_dir import DamagedFileError, delete_folder, point_link, read_json, write_json

logger = logging.getLogger(__name__)

CHECKPOINTS, PRETRAINED, STATE = "checkpoints", "pretrained_model", "training_state"
CHECKSUMS, SCORES = "checksums.json", "scores.json"
LAST, BEST, DAMAGED_SUFFIX = "last", "best", ".damaged"
MODEL_CARD = "README.md"

POLICY_TYPES = {
    *("vega", "act", "diffusion", "multi_task_dit", "pi0", "pi05", "smolvla", "tdmpc", "vqbet", "xvla"),
}
"""Types of checkpoints that load no code of their own; a plugin adds its type.

LeRobot's other types run code from repositories that the checkpoint names (`trust_remote_code`).
"""

PROCESSOR_STEPS = {
    *("absolute_actions_processor", "device_processor", "normalizer_processor", "observation_processor"),
    *("pi05_prepare_state_tokenizer_processor_step", "pi0_new_line_processor", "relative_actions_processor"),
    *("rename_observations_processor", "smolvla_new_line_processor", "to_batch_processor"),
    *("to_batch_processor_action", "to_batch_processor_complementary_data"),
    *("to_batch_processor_observation", "tokenizer_processor", "unnormalizer_processor"),
    *("xvla_add_domain_id", "xvla_image_scale", "xvla_image_to_float", "xvla_imagenet_normalize"),
    "xvla_rotation_6d_to_axis_angle",
}
"""Registered names of LeRobot's processor steps that load no code; a plugin adds the names of its steps.

LeRobot would import any class that a step names (`class`); its `action_tokenizer_processor` and
`reward_classifier_processor` run code from repositories that the checkpoint names.
"""

Scores = dict[int, dict[str, float]]
"""Measurements by step: `success` in [0, 1], `held_out_loss`, ..."""


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are not those that were written; the message names them."""


class UnsafeCheckpointError(ValueError):
    """A checkpoint would run code, or use an address or credentials, that its files name."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return every complete checkpoint of a run, oldest first."""
    found = [path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def fetch_checkpoint(source: str | Path, **hub: Any) -> Path:
    """Return the folder of a policy, downloaded if `source` is a name on the hub, after `check_checkpoint`.

    `source` may also be a folder of a policy or of a run's checkpoint, or the name of a packaged policy;
    `hub` are options of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        FileNotFoundError: If it is neither a folder nor available from the hub.
        DamagedCheckpointError: See `require_intact`.
        UnsafeCheckpointError: See `check_checkpoint`.
    """
    folder = packaged_policies().get(str(source), Path(source))
    if (folder / PRETRAINED).is_dir():
        folder = folder / PRETRAINED
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # imports an HTTP client, which is slow
        from huggingface_hub.errors import HfHubHTTPError

        patterns = ["*.json", "*.safetensors"]
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=patterns, **hub))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{source}: expected a checkpoint's folder or a name on the hub, found neither "
                f"({type(error).__name__}); give another path, or download it once (`hf download {source}`)."
            ) from error
    check_checkpoint(folder)
    return folder


def check_checkpoint(folder: Path) -> None:
    """Refuse a policy's folder that is damaged or names code; nothing of it is imported or loaded.

    Raises:
        DamagedCheckpointError: See `require_intact`.
        UnsafeCheckpointError: If the policy's type or a step of a processor is not on the list of those that
            load no code, or a file is outside the folder; names it.
    """
    _refuse_links(folder.resolve())
    require_intact(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):  # reads the header alone
                pass
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{path}: expected tensors, got {error}; copy it again.") from error
    for path in sorted(folder.glob("*.json")):
        if path.is_dir():
            raise DamagedCheckpointError(f"{path}: expected a file, got a folder.")
        try:
            content = read_json(path, kind=object)
        except DamagedFileError as error:
            raise DamagedCheckpointError(str(error)) from error
        if path.name == "config.json":
            _check_type(path, content)
        elif isinstance(content, dict) and isinstance(content.get("steps"), list):
            _check_steps(path, content["steps"])


def _refuse_links(folder: Path) -> None:
    """Refuse links that leave the folder, since an export would publish what they point to, and no files.

    In the hub's cache, files are links to its `blobs`.
    """
    homes = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    for path in sorted(folder.iterdir()):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(home) for home in homes):
            raise UnsafeCheckpointError(f"{path}: expected a file of the checkpoint, got a link to {target}.")
        if not target.is_file() and not target.is_dir():  # a pipe would block for ever
            raise DamagedCheckpointError(f"{path}: expected a file; copy the checkpoint again.")


def _check_type(path: Path, content: Any) -> None:
    found = content.get("type") if isinstance(content, dict) else None
    if found == "vega_remote":
        raise UnsafeCheckpointError(
            f"{path}: a checkpoint of type 'vega_remote' would choose the address and the token file of a "
            "policy server; give them yourself, as server.url and server.token_file of vega-deploy."
        )
    if not isinstance(found, str) or found not in POLICY_TYPES:
        raise UnsafeCheckpointError(
            f"{path}: expected a policy type that loads no code ({', '.join(sorted(POLICY_TYPES))}), got "
            f"{found!r}. If you trust its source, add the type to vega_policy.checkpoints.POLICY_TYPES."
        )


def _check_steps(path: Path, steps: list[Any]) -> None:
    for step in steps:
        entry = step if isinstance(step, dict) else {}
        name, file = entry.get("registry_name"), entry.get("state_file", "")
        if not isinstance(name, str) or name not in PROCESSOR_STEPS:
            raise UnsafeCheckpointError(
                f"{path}: expected registered processor steps that load no code, got the step "
                f"{name or entry.get('class', step)!r}; nothing was imported. If you trust its source, add "
                "its registry_name to vega_policy.checkpoints.PROCESSOR_STEPS."
            )
        if not isinstance(file, str) or Path(file).name != file:
            raise UnsafeCheckpointError(
                f"{path}: expected the step {name!r} to name a state file in {path.parent}, got {file!r}."
            )


def find_checkpoint(path: Path) -> Path:
    """Return the folder with `config.json` of a run's checkpoint, or of a packaged policy given by name.

    Raises:
        FileNotFoundError: If there is none; lists what is there and the names of packaged policies.
    """
    for folder in (path / PRETRAINED, path):
        if (folder / "config.json").is_file():
            return folder
    packaged = packaged_policies()
    if str(path) in packaged:
        return packaged[str(path)]
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "nothing"
    raise FileNotFoundError(
        f"no checkpoint at {path}: expected {PRETRAINED}/config.json or config.json there, found "
        f"{found}; give a folder such as outputs/<run>/checkpoints/last, or the name of a packaged policy "
        f"({', '.join(packaged) or 'this version has none'})"
    )


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the SHA-256 of files below `folder`, and of the list itself, to its `checksums.json`.

    A sub-folder with a list of its own contributes that list instead of its files. The model card and hidden
    files are left out: they may be edited, and the hub adds some. None for `names` takes all files.
    """
    listed = _files(folder) if names is None else names
    (folder / CHECKSUMS).write_bytes(_render({name: _digest(folder / name) for name in listed}))


def find_damage(folder: Path) -> list[str]:
    """Return one phrase for each file that differs from what `write_checksums` saw; empty if intact.

    Files that were added since are not reported: LeRobot and the hub put theirs beside the weights.
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
        if name != MODEL_CARD and (name not in present or _digest(folder / name) != digest)
    ]
    for nested in _nested(folder):
        name = nested.relative_to(folder).as_posix()
        if f"{name}/{CHECKSUMS} is altered" not in wrong:
            wrong += [f"{name}/{phrase}" for phrase in find_damage(nested)]
    return wrong


def _nested(folder: Path) -> list[Path]:
    """Return the sub-folders with a list of their own."""
    return sorted(path.parent for path in folder.rglob(CHECKSUMS) if path.parent != folder)


def _files(folder: Path) -> list[str]:
    nested, names = set(_nested(folder)), []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        covered = path.name != CHECKSUMS and any(parent in nested for parent in path.parents)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not covered and not hidden and name.as_posix() not in (CHECKSUMS, MODEL_CARD):
            names.append(name.as_posix())
    return sorted(names)


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
    """Return the newest intact checkpoint; newer damaged ones are logged.

    None before the first one; DamagedCheckpointError if there are checkpoints, but none is intact.
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
    step = folder.parent if folder.name == PRETRAINED else folder
    listed = next((path for path in (folder, step) if (path / CHECKSUMS).is_file()), None)
    wrong = [] if listed is None else find_damage(listed)
    if not wrong:
        return
    if step.parent.name != CHECKPOINTS:
        raise DamagedCheckpointError(f"{folder} is damaged: {', '.join(wrong)}. Copy or export it again.")
    intact = [path for path in list_checkpoints(step.parent.parent) if path != step and not find_damage(path)]
    offer = f"Use {intact[-1]} instead" if intact else "No other checkpoint of this run is intact"
    raise DamagedCheckpointError(f"{folder} is damaged: {', '.join(wrong)}. {offer}.")


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
    return {int(step): row for step, row in read_json(path).items()} if path.is_file() else {}


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
    """Point `last` and `best`, and delete the checkpoints of a run that are neither recent nor good.

    The newest `keep_last` (None: all) and the best `keep_best` are kept, and always the one that `best`
    points to.
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
