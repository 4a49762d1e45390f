"""Folders and links that are complete or absent, whatever kills the process in between."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINTS = "checkpoints"
PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write into; on success it is flushed and renamed to `target`.

    Args:
        target: Folder that must not exist yet; its parent is made.

    Yields:
        The temporary folder, empty.

    Raises:
        FileExistsError: If `target` exists, before anything is written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; a complete folder is never written over.")
    temporary = target.with_name(f".{target.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    flush(temporary)
    temporary.rename(target)
    _sync(target.parent)


def flush(folder: Path) -> None:
    """Forces every file below `folder`, then the folders themselves, onto the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def point_link(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target` in one step, replacing an earlier link."""
    temporary = link.with_name(f".{link.name}{PARTIAL_SUFFIX}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)
    _sync(link.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that it is never seen half-written."""
    temporary = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def drop_lines_after(path: Path, step: int) -> None:
    """Drops the lines of a JSON log, if there is one, whose `step` is a later one; they are made again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        replace_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """Step of a log line; a line cut short by a kill counts as later than all."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def remove_partial(folder: Path) -> None:
    """Deletes what a killed process left half-written directly below `folder`."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a lock on `folder` (made if missing) against other processes; a killed holder frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
