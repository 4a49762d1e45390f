"""`vega-doctor`: what works is reported as working, and each fault with a remedy."""

import shutil

import pytest

from tests.synthetic_dataset import write_dataset
from vega_policy import doctor
from vega_policy.cli.commands import doctor as command


def test_this_environment_passes_rendering_simulator_plugin_and_weights():
    checks = (doctor.check_weights, doctor.check_plugin, doctor.check_mujoco, doctor.check_rendering)
    assert [check().status for check in checks] == ["ok"] * 4


def test_another_mujoco_is_reported_with_the_version_to_install(monkeypatch):
    monkeypatch.setattr("envs.rendering.MUJOCO_VERSION", "0.0.1")
    check = doctor.check_mujoco()
    assert check.status == "warning"
    assert "pip install mujoco==0.0.1" in check.found


def test_black_frames_are_no_rendering(monkeypatch):
    monkeypatch.setattr(doctor, "MARKER", doctor.MARKER.replace('rgba="1 0 0 1"', 'rgba="0 0 0 1"'))
    check = doctor.check_rendering()
    assert check.status == "failed"
    assert "apt-get install" in check.remedy


def test_a_file_in_place_of_the_folder_fails(tmp_path):
    file = tmp_path / "runs"
    file.touch()
    assert doctor.check_disk(file / "outputs").status == "failed"
    assert doctor.check_disk(tmp_path / "outputs").status in ("ok", "warning")


@pytest.mark.parametrize(("status", "code"), [("ok", None), ("warning", None), ("failed", 1)])
def test_a_failed_check_ends_with_status_one(monkeypatch, capsys, status, code):
    checks = [doctor.Check("rendering", status, "found", "remedy")]
    monkeypatch.setattr("vega_policy.doctor.check_installation", lambda folder: iter(checks))
    if code is None:
        command.main([])
    else:
        with pytest.raises(SystemExit, match="1"):
            command.main([])
    assert "remedy" in capsys.readouterr().out


def test_offline_mode_names_the_models_that_need_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check = doctor.check_hub()
    assert check.status == "warning"
    assert "prior=wan_tiny" in check.remedy


def test_a_sound_dataset_would_start_and_its_cache_has_a_size(root, tmp_path, capsys):
    command.main(["dataset", str(root), f"folder={tmp_path}"])
    lines = capsys.readouterr().out
    assert "3 episodes, 27 frames at 10 a second" in lines
    assert "observation.images.image 48x64, observation.images.image2 32x32" in lines
    assert "observation.state 8, action 7" in lines
    assert "dataset.cached=[frames] takes 0.01 GB" in lines
    assert "vega-train would start; 0 warnings" in lines


def test_instructions_that_the_text_encoder_cannot_tell_apart_are_a_warning(tmp_path, capsys):
    tasks = ("拿起红色方块", "拿起蓝色方块")
    root = write_dataset(tmp_path / "data", lengths=(2, 2), tasks=tasks)
    command.main(["dataset", str(root), f"folder={tmp_path}"])
    lines = capsys.readouterr().out
    assert "2 of 2 instructions have words that the text encoder does not know, and 1 are read like" in lines
    assert "vega-train would start; 1 warnings" in lines


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "nowhere",
            "found no such folder. Give the folder of a dataset, or collect demonstrations first: vega-",
        ),
        ("empty", "found an empty folder. Give the folder of a dataset"),
        ("notes.txt", "found a file. Give the folder of a dataset"),
        ("some.safetensors", "found a file. Render a file of states first: vega-render"),
        (".", "Did you mean {}/data?"),
        ("data/meta", "Did you mean {}/data?"),
    ],
)
def test_a_path_that_holds_no_dataset_is_refused_with_what_is_there_and_what_to_do(
    root, place, message, tmp_path, capsys
):
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "some.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="1"):
        command.main(["dataset", str(tmp_path / place), f"folder={tmp_path}"])
    lines = capsys.readouterr().out
    assert f"No demonstrations in {tmp_path / place}: expected the folder of a finalized LeRobotData" in lines
    assert message.format(tmp_path) in lines


def test_a_dataset_on_which_training_would_not_start_ends_with_status_one(root, tmp_path, capsys):
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "meta" / "tasks.parquet").unlink()
    with pytest.raises(SystemExit, match="1"):
        command.main(["dataset", str(copy), f"folder={tmp_path}"])
    lines = capsys.readouterr().out
    assert "tasks.parquet is missing" in lines
    assert "vega-train would not start" in lines
