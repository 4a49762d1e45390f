"""Crash-safe files and folders, one lock a folder, the rule for resuming, and a run's code and hardware.

    with open_run(folder, settings) as resumed:        # lock, then same settings resume, others are refused
        write_json(folder / "summary.json", summary)   # the old content or the new one, whatever is killed
        with atomic_folder(folder / "shard") as draft: # complete or absent
            ...

Everything is written beside its target, flushed to disk and renamed. Names of drafts start with a dot and end
with `.partial`; `remove_partial` deletes those that a killed process left. A full disk is a `DiskFullError`
wherever these functions write or hold a lock. Torch is imported by the functions that need it.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

from vega_policy import PACKAGE

logger = logging.getLogger(__name__)

LOCK, SETTINGS = ".lock", "settings.json"
_PARTIAL = ".partial"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class FolderInUseError(RuntimeError):
    """Another process writes into the folder; the message names it."""


class OtherRunError(ValueError):
    """The folder holds other files, or a run with other settings; the message names them."""


class DamagedFileError(ValueError):
    """A file holds something else than was written into it; the message names it."""


class DiskFullError(RuntimeError):
    """A file could not be written for want of space; the message names the bytes needed and free."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is a full disk."""
    return _is_caused_by(error, _DISK_FULL)


def _is_caused_by(error: BaseException | None, codes: set[int]) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return True
        text = str(error)  # some libraries give nothing else
        if any(f"(os error {code})" in text or os.strerror(code) in text for code in codes):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_guard(target: Path, draft: Path | None = None, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk into a DiskFullError that names `target`.

    `draft` is the file or folder that is written instead; its size is the least that is needed, unless
    `needed` gives the bytes of `target`.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:  # libraries turn the OSError of a write into one of any type
        if not is_disk_full(error):
            raise
        files = [] if draft is None else [draft, *draft.rglob("*")]
        written = sum(path.stat().st_size for path in files if path.is_file())
        free = free_space(target) + written  # since the draft is deleted
        # A quota or a limit on the size of files may leave more free than is needed.
        least = free if _is_caused_by(error, {errno.ENOSPC}) else written
        need = f"it needs {needed} bytes" if needed else f"it needs more than {least} bytes"
        raise DiskFullError(
            f"{target}: the disk is full ({need}, {free} are free). What was finished before is complete; "
            "make room, then start the same command again to resume."
        ) from error


@contextmanager
def _require_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise PermissionError(
            f"{folder}: expected a folder that this process can write to, got: {error.strerror}. Give "
            "another folder, or make it writable."
        ) from error


def free_space(path: Path) -> int:
    """Return the free bytes of the disk on which a path is, or would be."""
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


def check_space(path: Path, needed: int, what: str) -> None:
    """Refuse to start where `what` of `needed` bytes does not fit.

    Raises:
        DiskFullError: If less is free.
    """
    free = free_space(path)
    if free < needed:
        raise DiskFullError(
            f"{path}: {what} takes about {needed} bytes, and {free} are free. Make room or give a folder on "
            "another disk."
        )


@contextmanager
def atomic_file(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a draft to write instead of `path`; on success it is flushed and renamed, on failure deleted.

    `needed` is its size in bytes if that is known, for the message of a full disk.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with disk_guard(path, draft, needed):
            with _require_writable(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.touch()
            yield draft
            _sync(draft)
            draft.replace(path)
    finally:
        if draft.exists():  # an unlink on a read-only disk fails
            draft.unlink()
    _sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made if missing."""
    with atomic_file(path, len(content)) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; its folder is made if missing."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically; its folder is made if missing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; its folder is made if missing.

    The library's own `save_file` writes a temporary file beside its target, whose name is no draft's: a kill
    leaves it.
    """
    from safetensors.torch import save

    write_bytes(path, save(dict(tensors), metadata))


def read_json(path: Path, *fields: str, kind: type = dict) -> Any:
    """Return the content of a JSON file: an object with some fields, or another kind of value.

    Other content is a DamagedFileError that names the file, here and in the next two functions.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got {error}; restore it from a copy.") from error
    return _checked(path, content, "JSON", fields, kind)


def read_yaml(path: Path, *fields: str) -> dict[str, Any]:
    """Return the content of a YAML file, a mapping with some fields.

    Raises:
        DamagedFileError: If the file holds something else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFileError(f"{path}: expected YAML, got {reason}; restore it from a copy.") from error
    return _checked(path, content, "YAML", fields, dict)


def _checked(path: Path, content: Any, format: str, fields: Iterable[str], kind: type) -> Any:
    if not isinstance(content, kind):
        found = type(content).__name__
        raise DamagedFileError(
            f"{path}: expected a {format} {kind.__name__}, got {found}; restore it from a copy."
        )
    if missing := [field for field in fields if field not in content]:
        raise DamagedFileError(
            f"{path}: expected {format} with {', '.join(missing)}, got {sorted(content)}; "
            "restore it from a copy."
        )
    return content


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Raises:
        DamagedFileError: If the file holds something else; the library's own error does not name it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: expected tensors, got {error}; restore it from a copy.") from error


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
    try:
        with disk_guard(target, draft):
            with _require_writable(target.parent):
                draft.mkdir(parents=True)
            yield draft
            complete_folder(draft, target)
    except DiskFullError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def complete_folder(draft: Path, target: Path) -> None:
    """Flush a draft folder to disk and rename it to `target`, without the lock and drafts that it may hold.

    Its files are as readable as the folder: safetensors' `save_file` leaves them to their owner alone.
    """
    remove_partial(draft)
    readable = draft.stat().st_mode & 0o666
    for path in sorted(draft.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | readable)
        _sync(path)
    (draft / LOCK).unlink(missing_ok=True)
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
    """Make `link` a relative symbolic link to `target` in one step, replacing an earlier link.

    A disk without symbolic links gets none, which is logged.

    Raises:
        FileExistsError: If `link` is a file or a folder.
    """
    if link.exists() and not link.is_symlink():
        raise FileExistsError(
            f"{link}: expected a symbolic link or nothing, found a {'folder' if link.is_dir() else 'file'}. "
            "Rename it, then start the same command again; all checkpoints are complete."
        )
    draft = link.with_name(f".{link.name}{_PARTIAL}")
    draft.unlink(missing_ok=True)
    try:
        draft.symlink_to(os.path.relpath(target, link.parent))
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        logger.warning("This disk has no symbolic links, so there is no %s; give %s itself.", link, target)
        return
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
        NotADirectoryError: If the path is a file, or leads through one.
        PermissionError: If this process cannot write there.
        DiskFullError: If a write inside failed for want of space.
    """
    existed = folder.exists()
    with disk_guard(folder), _open_lock(folder, wait) as file:
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


def lock_draft(target: Path) -> AbstractContextManager[None]:
    """Hold the lock of a folder that is only going to be written by `atomic_folder`, as `<target>.partial`.

    Without it, a second process would delete the draft of the first one.
    """
    return lock_folder(target.with_name(f"{target.name}{_PARTIAL}"))


def _open_lock(folder: Path, wait: bool) -> TextIO:
    path = folder / LOCK
    while True:
        require_folder(folder)
        try:
            with _require_writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
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
    option: str = "output_dir",
) -> Iterator[bool]:
    """Lock `folder` and begin a run in it, or resume the one that it holds; yield whether it resumes.

    Settings, all that decides the results, are kept as JSON in `settings.json`; drafts of a killed start are
    deleted. `may_hold` names entries that a folder may hold before its first run. For `free_to_change`,
    `defaults` and `option` see `check_same_settings`.

    Raises:
        FolderInUseError: If another process holds the lock.
        OtherRunError: If the folder holds a run with other settings, or files but no run.
    """
    record = folder / SETTINGS
    with lock_folder(folder):
        resumed = record.is_file()
        if resumed:
            stored = read_json(record)
            may_differ = {"free_to_change": free_to_change, "defaults": defaults}
            check_same_settings(folder, stored, settings, **may_differ, option=option)
        else:
            require_empty(folder, may_hold=may_hold, option=option)
            write_json(record, settings)
        remove_partial(folder)
        yield resumed


def require_folder(folder: Path) -> None:
    """Refuse a path that is a file, or leads through one; a missing one passes.

    Raises:
        NotADirectoryError: Names the file.
    """
    found = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not found.is_dir() and found.exists():
        raise NotADirectoryError(f"{folder}: expected a folder, found the file {found}; give another path.")


def require_empty(folder: Path, *, may_hold: Iterable[str] = (), option: str = "output_dir") -> None:
    """Refuse a folder that holds anything but a lock, drafts and the named entries; a missing one passes.

    `option` is the field of the command line that gave the folder.

    Raises:
        OtherRunError: Lists what it holds.
    """
    found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    drafts = {name for name in found if name.startswith(".") and name.endswith(_PARTIAL)}
    if unexpected := sorted(found - drafts - {LOCK, *may_hold}):
        raise OtherRunError(
            f"{folder}: expected an empty or new folder, found {', '.join(unexpected[:8])}; "
            f"give another folder ({option}=FOLDER), or delete this one."
        )


def check_same_settings(
    folder: Path,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    free_to_change: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    option: str = "output_dir",
) -> None:
    """Refuse to resume the run in `folder` with settings, nested, other than the stored ones.

    `free_to_change` are dotted names that may differ, with all fields below them. `defaults` are the values,
    nested, of settings that runs from before a field existed had. `option` is the field of the command line
    that gave the folder.

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
            f"resume it, or another folder for a new run ({option}=FOLDER)."
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


def environment() -> dict[str, Any]:
    """Return code revision, Python version, versions of all packages, and hardware."""
    return {
        "code": code_revision(),
        "python": platform.python_version(),
        "packages": packages(),
        "hardware": hardware(),
    }


@cache
def packages() -> dict[str, str]:
    """Return the versions of all installed packages by name, read once a process."""
    found = (distribution.metadata for distribution in distributions())
    return dict(sorted((metadata["Name"], metadata["Version"]) for metadata in found))


@cache
def code_revision() -> dict[str, Any]:
    """Return the git revision of this package and whether tracked files are changed; None if installed."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {"revision": None, "changed": None}
    return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


@cache
def hardware() -> dict[str, Any]:
    """Return processor, memory (GB) and accelerators."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def available_cores() -> int:
    """Return the number of cores that this process may use; in a container, its quota."""
    cores = len(os.sched_getaffinity(0))
    if not _QUOTA.is_file():
        return cores
    limit, period = _QUOTA.read_text().split()
    return cores if limit == "max" else min(cores, max(1, int(limit) // int(period)))


def use_available_cores(spare: int = 0) -> None:
    """Set torch's threads to the available cores but `spare` ones, unless OMP_NUM_THREADS is set.

    In a container torch counts the host's cores, which makes small models many times slower. So does other
    work on one of the cores: torch's threads wait for each other at every layer.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, available_cores() - spare))


def _git(*arguments: str) -> str | None:
    if not (PACKAGE.parent / ".git").exists():  # an installed package may lie inside another repository
        return None
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=30
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
