"""Crash-safe files and folders: atomic writes, one lock a folder, and the rule for resuming a run.

    with open_run(folder, settings) as resumed:        # lock, then same settings resume, others are refused
        write_json(folder / "summary.json", summary)   # the old content or the new one, whatever is killed
        with atomic_folder(folder / "shard") as draft: # complete or absent
            ...

Everything is written beside its target, flushed to disk and renamed. Names of drafts start with a dot and end
with `.partial`; `remove_partial` deletes those that a killed process left. This module imports no torch.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

LOCK, SETTINGS = ".lock", "settings.json"
_PARTIAL = ".partial"


class FolderInUseError(RuntimeError):
    """Another process writes into the folder; the message names it."""


class OtherRunError(ValueError):
    """The folder holds other files, or a run with other settings; the message names them."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft to write instead of `path`; on success it is flushed and renamed, on failure deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made if missing."""
    with atomic_file(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; its folder is made if missing."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically; its folder is made if missing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty draft folder beside `target`; on success it is flushed and renamed to `target`.

    Raises:
        FileExistsError: If `target` exists, before anything is written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; a complete folder is never overwritten.")
    draft = target.with_name(f".{target.name}{_PARTIAL}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    complete_folder(draft, target)


def complete_folder(draft: Path, target: Path) -> None:
    """Flush a draft folder to disk and rename it to `target`."""
    for path in sorted(draft.rglob("*"), reverse=True):
        _sync(path)
    _sync(draft)
    draft.rename(target)
    _sync(target.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that a kill leaves either all of it or nothing under its name."""
    draft = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(draft, ignore_errors=True)
    folder.rename(draft)
    shutil.rmtree(draft)


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target` in one step, replacing an earlier link."""
    draft = link.with_name(f".{link.name}{_PARTIAL}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(target, link.parent))
    draft.replace(link)
    _sync(link.parent)


def remove_partial(folder: Path) -> None:
    """Delete the drafts that a killed process left directly below `folder`."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def drop_lines_after(log: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log whose `step` is later, and a last line that a kill cut short."""
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if _step_of(line) <= step]
        write_text(log, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the advisory lock of `folder`; the end of the process frees it too.

    A missing folder is made; it is removed again if it is empty at the end.

    Raises:
        FolderInUseError: If another process holds the lock and `wait` is off.
    """
    existed = folder.exists()
    with _open_lock(folder, wait) as file:
        try:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()


def _open_lock(folder: Path, wait: bool) -> TextIO:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")  # not "w": the holder's name must not be truncated
        except FileNotFoundError:  # the last holder deleted the folder meanwhile
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise FolderInUseError(
                f"{folder} is in use by {holder}; wait for it, stop it, or give another folder."
            ) from None
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # the last holder deleted this file meanwhile: lock its successor


@contextmanager
def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    free_to_change: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    may_hold: Iterable[str] = (),
) -> Iterator[bool]:
    """Lock `folder` and begin a run in it, or resume the one that it holds; yield whether it resumes.

    Settings are kept as JSON in `settings.json`; drafts of a killed start are deleted.

    Args:
        folder: The run's folder, which is made if missing.
        settings: All that decides the results.
        free_to_change: See `check_same_settings`.
        defaults: See `check_same_settings`.
        may_hold: Names of entries that a folder may hold before its first run.

    Raises:
        FolderInUseError: If another process holds the lock.
        OtherRunError: If the folder holds a run with other settings, or files but no run.
    """
    record = folder / SETTINGS
    with lock_folder(folder):
        resumed = record.is_file()
        if resumed:
            stored = json.loads(record.read_text())
            check_same_settings(folder, stored, settings, free_to_change=free_to_change, defaults=defaults)
        else:
            require_empty(folder, may_hold=may_hold)
            write_json(record, settings)
        remove_partial(folder)
        yield resumed


def require_empty(folder: Path, *, may_hold: Iterable[str] = ()) -> None:
    """Refuse a folder that holds anything but a lock, drafts and the named entries; a missing one passes.

    Raises:
        OtherRunError: Lists what it holds.
    """
    found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    drafts = {name for name in found if name.startswith(".") and name.endswith(_PARTIAL)}
    if unexpected := sorted(found - drafts - {LOCK, *may_hold}):
        raise OtherRunError(
            f"{folder}: expected an empty or new folder, found {', '.join(unexpected[:8])}; "
            "give another folder, or delete this one."
        )


def check_same_settings(
    folder: Path,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    free_to_change: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to resume the run in `folder` with settings other than the stored ones.

    Args:
        folder: The run's folder, for the message.
        stored: Settings of the run, nested.
        settings: Settings of this start, nested.
        free_to_change: Dotted names that may differ, with all fields below them.
        defaults: Values of settings that runs from before a field existed had, nested.

    Raises:
        OtherRunError: Lists each difference.
    """
    received = flatten(settings)
    old = {name: value for name, value in flatten(defaults or {}).items() if name in received}
    expected = old | flatten(stored)
    free = tuple(free_to_change)
    differing = [
        f"{name} (stored: {expected.get(name)!r}, received: {received.get(name)!r})"
        for name in sorted(expected.keys() | received.keys())
        if expected.get(name) != received.get(name)
        and not any(name == other or name.startswith(f"{other}.") for other in free)
    ]
    if differing:
        raise OtherRunError(
            f"{folder} holds a run with other settings: {'; '.join(differing)}. Give the stored values to "
            "resume it, or another folder."
        )


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted path; lists and tuples are values."""
    if not isinstance(node, Mapping):
        return {path: list(node) if isinstance(node, tuple) else node}
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
