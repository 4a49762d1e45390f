"""Checksums of a folder's files: one that was altered, cut off, lost or added is found and named."""

import hashlib
import json
from pathlib import Path

CHECKSUMS = "checksums.json"


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are not those that were written; the message names them."""


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of every file below `folder`, and of the note itself, in its `checksums.json`."""
    (folder / CHECKSUMS).write_bytes(_render({name: _digest(folder / name) for name in _files(folder)}))


def damage(folder: Path, *, below: str = "") -> list[str]:
    """What is wrong with the files of a folder that `write_checksums` left.

    Args:
        folder: The folder.
        below: Look only at this sub-folder's files; all by default.

    Returns:
        One phrase a file that names it; empty if all is as it was written.
    """
    note = folder / CHECKSUMS
    if not note.is_file():
        return [f"{CHECKSUMS} is missing"]
    expected = _read(note)
    if expected is None:
        return [f"{CHECKSUMS} is altered"]
    there = set(_files(folder))
    wrong = [
        f"{name} is {'altered' if name in there else 'missing'}"
        for name, digest in expected.items()
        if name.startswith(below) and (name not in there or _digest(folder / name) != digest)
    ]
    return wrong + [f"{name} does not belong there" for name in sorted(there - expected.keys())]


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(files: dict[str, str]) -> bytes:
    """The note in its only valid form, so that no byte of it can change unseen."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "own": own}, indent=1, sort_keys=True) + "\n").encode()


def _read(note: Path) -> dict[str, str] | None:
    """Digests by file; None if the note is not what `_render` gives."""
    content = note.read_bytes()
    try:
        files = json.loads(content)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) and _render(files) == content else None
