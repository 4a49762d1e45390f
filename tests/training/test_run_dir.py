"""Files and folders are complete or absent, one process writes at a time, and only the same run resumes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vega_policy import run_dir
from vega_policy.run_dir import (
    DamagedFileError,
    DiskFullError,
    FolderInUseError,
    OtherRunError,
    atomic_file,
    atomic_folder,
    check_same_settings,
    check_space,
    delete_folder,
    drop_lines_after,
    flatten,
    is_disk_full,
    lock_draft,
    lock_folder,
    open_run,
    point_link,
    read_json,
    read_tensors,
    read_yaml,
    remove_partial,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_as_a_whole_and_their_folder_is_made(tmp_path):
    path = tmp_path / "new" / "file"
    for write, content, expected in (
        (write_bytes, b"\x00\xff", b"\x00\xff"),
        (write_text, "é", "é".encode()),
        (write_json, {"a": [1]}, b'{\n "a": [\n  1\n ]\n}\n'),
    ):
        write(path, content)
        assert path.read_bytes() == expected
    assert names(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_no_draft(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file") as draft:
        draft.rename(tmp_path / "nowhere" / "half")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("write", ["with atomic_file(path) as draft:", "with atomic_folder(path) as draft:"])
def test_a_kill_in_the_middle_of_a_write_leaves_only_a_draft(tmp_path, write):
    program = f"""
import os
from pathlib import Path
from vega_policy.run_dir import atomic_file, atomic_folder
path = Path({str(tmp_path)!r}) / "target"
{write}
    (draft / "half" if draft.is_dir() else draft).write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 9
    assert not (tmp_path / "target").exists()
    assert len(names(tmp_path)) == 1
    remove_partial(tmp_path)
    assert names(tmp_path) == []


def test_a_kill_in_the_middle_of_writing_tensors_leaves_only_a_draft(tmp_path):
    program = f"""
import resource, signal
from pathlib import Path
import torch
from vega_policy.run_dir import write_tensors
folder = Path({str(tmp_path)!r})
write_tensors(folder / "target", {{"a": torch.ones(3)}})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the limit kills within the write
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_tensors(folder / "target", {{"a": torch.zeros(10_000)}})
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGXFSZ
    remove_partial(tmp_path)
    assert names(tmp_path) == ["target"]
    assert read_tensors(tmp_path / "target")["a"].tolist() == [1, 1, 1]


def test_files_of_a_folder_are_as_readable_as_the_folder_and_no_draft_is_kept(tmp_path):
    with atomic_folder(tmp_path / "target") as draft:
        save_file({"a": torch.ones(3)}, draft / "private")
        (draft / "program").touch(0o755)
        (draft / ".half.1.partial").touch()
    assert names(tmp_path / "target") == ["private", "program"]
    readable = (tmp_path / "target").stat().st_mode & 0o666
    assert (tmp_path / "target" / "private").stat().st_mode & 0o777 == readable
    assert (tmp_path / "target" / "program").stat().st_mode & 0o777 == readable | 0o111


def test_a_folder_whose_writing_failed_does_not_exist(tmp_path):
    with pytest.raises(IsADirectoryError), atomic_folder(tmp_path / "target") as folder:
        folder.write_text("x")
    assert not (tmp_path / "target").exists()
    remove_partial(tmp_path)
    assert names(tmp_path) == []


def test_a_complete_folder_is_never_overwritten(tmp_path):
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "whole").write_text("x")
    with pytest.raises(FileExistsError, match="target exists already"), atomic_folder(tmp_path / "target"):
        raise AssertionError
    delete_folder(tmp_path / "target")
    assert names(tmp_path) == []


def test_a_link_is_replaced_by_a_relative_one(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        point_link(tmp_path / "last", tmp_path / name)
    assert (tmp_path / "last").readlink() == Path("second")
    assert names(tmp_path) == ["first", "last", "second"]


def test_later_lines_of_a_log_and_a_line_cut_short_are_dropped(tmp_path):
    log = tmp_path / "log"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_lines_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_lines_after(tmp_path / "none", 2)


def test_the_second_process_in_a_folder_is_refused_and_the_first_one_named(tmp_path):
    program = f"""
from pathlib import Path
from vega_policy.run_dir import lock_folder
with lock_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(FolderInUseError, match=rf"process {holder.pid} on .+ since \d{{4}}-"),
        lock_folder(tmp_path),
    ):
        raise AssertionError
    holder.kill()
    holder.communicate()
    with lock_folder(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_lock_leaves_no_trace(tmp_path):
    with lock_folder(tmp_path / "new"):
        assert names(tmp_path / "new") == [".lock"]
    assert names(tmp_path) == []
    with lock_folder(tmp_path):
        (tmp_path / "kept").touch()
    assert names(tmp_path) == ["kept"]


def test_the_draft_of_a_folder_has_one_writer(tmp_path):
    target = tmp_path / "export"
    with (
        lock_draft(target),
        pytest.raises(FolderInUseError, match=rf"export\.partial is in use by process {os.getpid()} on"),
        lock_draft(target),
    ):
        raise AssertionError
    with lock_draft(target), atomic_folder(target) as draft:
        (draft / "part").touch()
    assert names(tmp_path) == ["export"]


def test_the_same_settings_resume_and_the_folder_is_locked_meanwhile(tmp_path):
    settings = {"seed": 0, "sizes": (1, 2), "env": {"suite": "near"}}
    with (
        open_run(tmp_path / "run", settings) as resumed,
        pytest.raises(FolderInUseError),
        open_run(tmp_path / "run", settings),
    ):
        raise AssertionError
    assert not resumed
    with open_run(tmp_path / "run", settings) as resumed:
        assert resumed


def test_a_folder_with_other_files_is_refused_but_for_those_that_may_be_there(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(OtherRunError, match=r"found thesis\.tex; give another folder \(root=FOLDER\), or del"),
        open_run(tmp_path, {"seed": 0}, may_hold=["shards"], option="root"),
    ):
        raise AssertionError
    assert names(tmp_path) == ["shards", "thesis.tex"]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"seed": 1, "env": {"suite": "near"}}, {}, r"seed \(stored: 0, received: 1\)"),
        ({"seed": 0, "env": {"suite": "far"}}, {}, r"env\.suite \(stored: 'near', received: 'far'\)"),
        ({"seed": 0, "env": {"suite": "far"}}, {"free_to_change": ["env"]}, None),
        ({"seed": 0, "env": {"suite": "far"}}, {"free_to_change": ["env.suite"]}, None),
        ({"seed": 0, "env": {"suite": "far"}}, {"free_to_change": ["en"]}, "suite"),
        ({"seed": 0}, {}, r"env\.suite \(stored: 'near', received: None\)"),
        ({"seed": 0, "env": {"suite": "near"}, "new": 1}, {}, r"new \(stored: None, received: 1\)"),
        ({"seed": 0, "env": {"suite": "near"}, "new": 1}, {"defaults": {"new": 1, "newer": 2}}, None),
        ({"seed": 0, "env": {"suite": "near"}, "new": 2}, {"defaults": {"new": 1}}, "stored: 1, received: 2"),
    ],
)
def test_other_settings_are_refused_with_the_difference(settings, options, message):
    stored = {"seed": 0, "env": {"suite": "near"}}
    if message is None:
        check_same_settings(Path("run"), stored, settings, **options)
        return
    what_to_do = r"\. Give the stored values to resume it, or another folder .* \(output_dir=FOLDER\)\.$"
    with pytest.raises(OtherRunError, match=rf"^run holds .*{message}.*{what_to_do}"):
        check_same_settings(Path("run"), stored, settings, **options)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_settings_that_are_no_json_object_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with (
        pytest.raises(DamagedFileError, match=r"settings\.json: expected .*JSON.*restore it from a copy"),
        open_run(tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff" * 200])
def test_a_file_of_tensors_that_holds_none_is_named(tmp_path, content):
    path = tmp_path / "average.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"average\.safetensors: expected tensors, got .*restore it"):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"[]\n", b"a: [1", b"a: \xff\xfe", b"\x00\x9d" * 100])
def test_yaml_that_is_no_mapping_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"config\.yaml: expected .*YAML.*restore it from a copy"):
        read_yaml(path)
    path.write_text("steps: 3\n")
    assert read_yaml(path, "steps") == {"steps": 3}
    with pytest.raises(DamagedFileError, match=r"expected YAML with dataset, got \['steps'\]"):
        read_yaml(path, "dataset")


def test_json_without_a_field_is_named(tmp_path):
    (tmp_path / "step.json").write_text('{"steps": 3}')
    with pytest.raises(DamagedFileError, match=r"step\.json: expected JSON with step, got \['steps'\]"):
        read_json(tmp_path / "step.json", "step")


def test_settings_are_named_by_dotted_path_and_sequences_are_values():
    assert flatten({"a": {"b": (1, 2), "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}


def test_the_module_needs_only_the_standard_library():
    program = f"""
import sys
sys.modules |= dict.fromkeys(("numpy", "torch", "lerobot"))
exec(compile(open({run_dir.__file__!r}).read(), "run_dir", "exec"), {{"__name__": "run_dir"}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def in_namespace(script: str, program: str, folder: Path) -> str:
    """Run a shell script and a program where mounts are allowed; return what the program prints."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if subprocess.run([*mount, f"mount -t tmpfs tmpfs {folder}"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mounts")
    command = [*mount, f"{script}; exec {sys.executable} -c '{program}'"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_full_disk_keeps_what_is_finished_and_names_the_bytes(tmp_path):
    program = f"""
from pathlib import Path
from vega_policy.run_dir import DiskFullError, atomic_folder, lock_folder, write_bytes
root = Path("{tmp_path}")
with lock_folder(root / "run"):
    write_bytes(root / "run" / "first", bytes(1000))
    try:
        write_bytes(root / "run" / "second", bytes(300_000))
    except DiskFullError as error:
        print(error)
    try:
        with atomic_folder(root / "run" / "third") as draft:
            (draft / "part").write_bytes(bytes(20_000))
            (draft / "rest").write_bytes(bytes(300_000))
    except DiskFullError as error:
        print(error)
    print(sorted(path.name for path in (root / "run").iterdir()))
"""
    first, second, names = in_namespace(
        f"mount -t tmpfs -o size=128k tmpfs {tmp_path}", program, tmp_path
    ).splitlines()
    assert "second: the disk is full (it needs 300000 bytes, " in first
    assert "third: the disk is full (it needs more than " in second
    assert names == "['.lock', 'first']"


def test_a_folder_on_a_disk_that_cannot_be_written_to_is_refused(tmp_path):
    program = f"""
from pathlib import Path
from vega_policy.run_dir import atomic_folder, lock_folder, write_text
root = Path("{tmp_path}")
for write in (
    lambda: lock_folder(root / "run").__enter__(),
    lambda: atomic_folder(root / "run").__enter__(),
    lambda: write_text(root / "run", "text"),
):
    try:
        write()
    except PermissionError as error:
        print(error)
"""
    printed = in_namespace(
        f"mount -t tmpfs tmpfs {tmp_path}; mount -o remount,ro {tmp_path}", program, tmp_path
    )
    assert printed.count(": expected a folder that this process can write to, got: Read-only file sys") == 3


@pytest.mark.parametrize("below", [(), ("inner", "run")])
def test_a_file_in_place_of_the_folder_is_named(tmp_path, below):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=r"expected a folder, found the file .*file; give another"),
        lock_folder(tmp_path.joinpath("file", *below)),
    ):
        raise AssertionError


def test_a_link_does_not_replace_a_folder(tmp_path):
    for name in ("last", "second"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=r"last: expected a symbolic link or nothing, found a folder"):
        point_link(tmp_path / "last", tmp_path / "second")
    assert names(tmp_path) == ["last", "second"]


def test_a_disk_without_links_gets_none(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as vfat answers

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "first").mkdir()
    point_link(tmp_path / "last", tmp_path / "first")
    assert names(tmp_path) == ["first"]
    assert "no symbolic links" in caplog.text


def test_a_start_is_refused_where_what_it_writes_does_not_fit(tmp_path):
    with pytest.raises(DiskFullError, match=r"new: a checkpoint takes about 1000000000000000000 bytes, and "):
        check_space(tmp_path / "new", 10**18, "a checkpoint")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("shapes do not fit"), False),
        (None, False),
    ],
)
def test_a_full_disk_is_recognized_also_as_the_cause_of_another_error(error, full):
    assert is_disk_full(error) is full
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is full
