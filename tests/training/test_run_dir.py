"""Files and folders are complete or absent, one process writes at a time, and only the same run resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vega_policy import run_dir
from vega_policy.run_dir import (
    FolderInUseError,
    OtherRunError,
    atomic_file,
    atomic_folder,
    check_same_settings,
    delete_folder,
    drop_lines_after,
    flatten,
    lock_folder,
    open_run,
    point_link,
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
        pytest.raises(OtherRunError, match=r"found thesis\.tex;"),
        open_run(tmp_path, {"seed": 0}, may_hold=["shards"]),
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
    with pytest.raises(OtherRunError, match=message):
        check_same_settings(Path("run"), stored, settings, **options)


def test_settings_are_named_by_dotted_path_and_sequences_are_values():
    assert flatten({"a": {"b": (1, 2), "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}


def test_the_module_needs_only_the_standard_library():
    program = f"""
import sys
sys.modules |= dict.fromkeys(("numpy", "torch", "lerobot"))
exec(compile(open({run_dir.__file__!r}).read(), "run_dir", "exec"), {{"__name__": "run_dir"}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
