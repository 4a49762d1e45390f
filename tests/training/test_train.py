"""Training runs: exact resume, complete checkpoints, what learns and what does not, refused folders."""

import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file

from tests.synthetic_dataset import CAMERAS
from tests.training_runs import (
    assert_bitwise_equal,
    cache_of,
    saved_weights,
    stopped_run,
    tiny_backbone,
    tiny_policy,
    tiny_run,
)
from vega_policy import PACKAGE
from vega_policy.checkpoints import newest_intact
from vega_policy.model.config import FusionConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import FolderInUseError, OtherRunError, lock_folder, point_link
from vega_policy.training.train import train
from vega_policy.training.trainer import Trainer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dataset": {"cache": "none"}, "accumulate": 2, "average_decay": 0.0},
        {"policy": {"prior_noise": "fresh"}, "dataset": {"cached": ["frames", "semantic"]}},
    ],
    ids=["cache", "video and accumulation", "fresh noise"],
)
def test_two_steps_and_two_resumed_steps_equal_four_steps_bit_by_bit(root, tmp_path, fields):
    fields = dict(fields)
    noise = fields.pop("policy", {}).get("prior_noise", "fixed")

    def run(name, **more):
        policy = tiny_policy()
        policy.prior = type(policy.prior)(name="random", noise=noise)
        return train(tiny_run(root, tmp_path / name, policy=policy, **fields, **more))

    straight = run("straight")
    run("parts", stop_after=2)
    torch.manual_seed(99)  # whatever happened in between
    assert_bitwise_equal(straight, run("parts", resume=True))


def test_a_cached_batch_passes_through_twelve_files(root, tmp_path, monkeypatch):
    files, optimize = set(), Trainer.optimize

    def note(frame, event, argument):
        files.add(Path(frame.f_code.co_filename))

    def optimize_traced(*arguments):
        sys.setprofile(note)
        try:
            return optimize(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Trainer, "optimize", optimize_traced)
    train(tiny_run(root, tmp_path / "run"))
    passed = sorted(str(path.relative_to(PACKAGE)) for path in files if path.is_relative_to(PACKAGE))
    assert {"data/loader.py", "model/vega.py", "training/optim.py"} <= set(passed)
    assert len(passed) <= 12, passed


def test_a_gate_with_a_rate_of_its_own_has_it_in_the_log(root, tmp_path):
    train(tiny_run(root, tmp_path / "run", policy=tiny_policy(fusion=FusionConfig(gate_lr_scale=0.1))))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["learning_rate/gate"] == pytest.approx(0.1 * line["learning_rate"])
    assert lines[0]["learning_rate"] > lines[-1]["learning_rate"] > 0


def test_a_resumed_run_has_one_log_line_a_step(root, tmp_path, finished):
    stopped_run(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # after steps 3 and 4 of the stopped start
    train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "gate", "gradient_norm", "learning_rate", "steps_per_s", "data_wait_percent"} <= lines[
        0
    ].keys()


def test_another_seed_gives_other_weights(root, tmp_path, finished):
    other = train(tiny_run(root, tmp_path / "other", seed=4))
    name = "training_state/weights:model.head.embed_action.weight"
    assert not torch.equal(saved_weights(other)[name], saved_weights(finished / "checkpoints" / "last")[name])


def test_a_checkpoint_loads_as_a_lerobot_policy_with_its_processors(root, finished):
    folder = finished / "checkpoints" / "last" / "pretrained_model"
    policy = VegaPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    observation = {camera: torch.rand(3, 40, 40) for camera in CAMERAS}
    batch = before({**observation, "observation.state": torch.zeros(8), "task": "lift the cube"})
    action = after(policy.select_action(batch))
    assert action.shape == (1, 7)
    assert action.isfinite().all()


def test_a_checkpoint_is_safetensors_and_json_only(finished):
    suffixes = {path.suffix for path in (finished / "checkpoints" / "000004").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".md"}


def test_the_checkpoints_policy_holds_the_averaged_weights_and_the_state_the_raw_ones(finished):
    saved = saved_weights(finished / "checkpoints" / "last")
    name = "model.head.embed_action.weight"
    assert not torch.equal(saved[f"pretrained_model/model:{name}"], saved[f"training_state/weights:{name}"])


def test_the_mean_frames_are_the_mean_of_the_datasets_frames(finished):
    frames = load_file(finished / "checkpoints" / "last" / "pretrained_model" / "mean_frames.safetensors")
    assert {camera: tuple(frame.shape) for camera, frame in frames.items()} == {
        CAMERAS[0]: (3, 48, 64),
        CAMERAS[1]: (3, 32, 32),
    }
    for frame in frames.values():
        assert frame[:, :4].mean().item() == pytest.approx(40 / 255, abs=0.02)  # where no square ever is
        middle = frame[0, frame.shape[1] // 2 + 1]
        assert 60 / 255 < middle.max() < 220 / 255  # the square passes, so no place is always bright


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parts_stay_frozen_and_the_rest_learns(root, tmp_path, frozen):
    policy = tiny_policy(backbone=tiny_backbone(freeze_image_encoder=frozen))
    cached = ["semantic", "prior"] if frozen else ["frames", "prior"]
    last = train(tiny_run(root, tmp_path / "run", policy=policy, dataset={"cached": cached}))
    first, now = saved_weights(last.with_name("000002")), saved_weights(last)
    changed = [name for name in now if ":model." in name and not torch.equal(first[name], now[name])]

    def learned(part):
        return any(f":model.{part}." in name for name in changed)

    assert learned("backbone.image_encoder") is not frozen
    assert not learned("backbone.text_encoder")
    assert all(
        map(learned, ("project", "fusion", "head.output", "backbone.blocks", "backbone.project_state"))
    )
    assert not any(":model.prior." in name for name in now)


def test_the_held_out_loss_is_logged_and_does_not_change_the_weights(root, tmp_path):
    often = train(tiny_run(root, tmp_path / "often", evaluate_every=1, dataset={"held_out": 0.4}))
    once = train(tiny_run(root, tmp_path / "once", evaluate_every=100, dataset={"held_out": 0.4}))
    assert_bitwise_equal(often, once)
    lines = [json.loads(line) for line in (tmp_path / "often" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "held_out_loss" in line]) == 4


def test_a_complete_run_is_left_alone(root, finished):
    def times():
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}

    before = times()
    assert train(tiny_run(root, finished, resume=True, dataset=cache_of(finished))).name == "000004"
    assert times() == before


def test_a_checkpoint_that_was_cut_off_is_not_taken_for_one(root, tmp_path, finished):
    stopped_run(finished, tmp_path / "run")
    partial = tmp_path / "run" / "checkpoints" / ".000004.partial" / "pretrained_model"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    last = newest_intact(tmp_path / "run")
    assert last is not None
    assert last.name == "000002"
    resumed = train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished)))
    assert_bitwise_equal(finished / "checkpoints" / "last", resumed)
    assert not list(resumed.parent.glob(".*partial"))


def test_a_kill_between_a_checkpoint_and_its_link_loses_nothing(root, tmp_path, finished):
    checkpoints = shutil.copytree(finished, tmp_path / "run", symlinks=True) / "checkpoints"
    point_link(checkpoints / "last", checkpoints / "000002")
    assert train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished))).name == "000004"
    shutil.rmtree(checkpoints / "000004")
    resumed = train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished)))
    assert (checkpoints / "last").resolve() == resumed.resolve()
    assert_bitwise_equal(finished / "checkpoints" / "last", resumed)


def test_a_folder_that_holds_another_run_is_refused(root, finished):
    with pytest.raises(OtherRunError, match=r"expected an empty or new folder.*step 4.*resume=true"):
        train(tiny_run(root, finished))


def test_a_folder_that_holds_anything_else_is_refused(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OtherRunError, match=r"notes\.txt.*another output_dir"):
        train(tiny_run(root, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_with_another_config_is_refused_and_names_the_field(root, finished):
    with pytest.raises(OtherRunError, match=r"batch_size \(stored: 5, received: 6\)"):
        train(tiny_run(root, finished, resume=True, batch_size=6, log_every=7))
    with pytest.raises(OtherRunError, match=r"dataset\.frame_stride \(stored: 1, received: 2\)"):
        train(tiny_run(root, finished, resume=True, dataset=cache_of(finished) | {"frame_stride": 2}))


def test_a_second_start_is_refused_and_names_the_process_that_trains(root, tmp_path, finished):
    stopped_run(finished, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    holder = rf"run is in use by process {os.getpid()} on {socket.gethostname()} since 2"
    with lock_folder(tmp_path / "run"), pytest.raises(FolderInUseError, match=holder):
        train(tiny_run(root, tmp_path / "run", resume=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_place_of_the_link_to_the_last_checkpoint_is_refused_before_the_first_step(
    root, tmp_path, finished
):
    run = stopped_run(finished, tmp_path / "run")
    (run / "checkpoints" / "last").unlink()
    shutil.copytree(run / "checkpoints" / "000002", run / "checkpoints" / "last")
    with pytest.raises(FileExistsError, match=r"last: expected a symbolic link or nothing, found a folder"):
        train(tiny_run(root, run, resume=True, dataset=cache_of(finished)))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "last"]
    shutil.rmtree(run / "checkpoints" / "last")
    resumed = train(tiny_run(root, run, resume=True, dataset=cache_of(finished)))
    assert_bitwise_equal(finished / "checkpoints" / "last", resumed)


def test_on_a_disk_without_links_a_run_is_trained_and_resumed(root, tmp_path, finished, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as vfat answers

    monkeypatch.setattr(Path, "symlink_to", refuse)
    cache = cache_of(finished)
    train(tiny_run(root, tmp_path / "run", stop_after=2, dataset=cache))
    resumed = train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache))
    assert_bitwise_equal(finished / "checkpoints" / "last", resumed)
    assert sorted(path.name for path in resumed.parent.iterdir()) == ["000002", "000004"]
    assert "This disk has no symbolic links" in caplog.text


def rewrite_column(path, name, change):
    table = pq.read_table(path)
    values = change(table[name].to_pylist())
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(
        table.set_column(table.schema.get_field_index(name), table.schema.field(name), column), path
    )


def change_actions(root):
    (path,) = (root / "data").rglob("*.parquet")
    rewrite_column(path, "action", lambda rows: [[row[0] + 1e-3, *row[1:]] for row in rows])


def change_states(root):
    (path,) = (root / "data").rglob("*.parquet")
    rewrite_column(path, "observation.state", lambda rows: [*rows[1:], rows[0]])


def change_statistics(root):
    path = root / "meta" / "stats.json"
    statistics = json.loads(path.read_text())
    statistics["action"]["min"][0] -= 1
    path.write_text(json.dumps(statistics))


def change_instructions(root):
    path = root / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    name = next(column for column in table.column_names if column != "task_index")
    rewrite_column(path, name, lambda rows: [row.replace("cube", "ball") for row in rows])


def change_frames(root):
    path = next((root / "videos").rglob("*.mp4"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_does_not_resume_over_changed_data(root, tmp_path):
    data = Path(shutil.copytree(root, tmp_path / "data"))
    train(tiny_run(data, tmp_path / "run", stop_after=2))
    shutil.copytree(root, tmp_path / "copy")  # with other modification times: the same data all the same
    for part, change in (
        (None, lambda root: None),
        ("actions", change_actions),
        ("states", change_states),
        ("statistics", change_statistics),
        ("instructions", change_instructions),
        ("frames", change_frames),
    ):
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "copy", data, copy_function=shutil.copy)
        change(data)
        if part is None:
            resumed = train(tiny_run(data, tmp_path / "run", stop_after=3, resume=True))
            assert resumed.name == "000003"
            continue
        changed = rf"000003: dataset {part} was [0-9a-f]{{16}}, is [0-9a-f]{{16}};"
        with pytest.raises(ValueError, match=changed):
            train(tiny_run(data, tmp_path / "run", resume=True))


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(root, tmp_path, finished):
    stopped_run(finished, tmp_path / "run")
    saved = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    del values["compile"], values["policy"]["capture"], values["dataset"]["workers"]
    saved.write_text(yaml.safe_dump(values))
    assert (
        train(tiny_run(root, tmp_path / "run", stop_after=2, resume=True, dataset=cache_of(finished))).name
        == "000002"
    )
    with pytest.raises(OtherRunError, match=r"compile \(stored: False, received: True\)"):
        train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished), compile=True))


@pytest.mark.parametrize("wrote", ["write_text", "prune_checkpoints"])
def test_a_start_that_was_killed_before_its_first_step_goes_on(root, tmp_path, monkeypatch, finished, wrote):
    def die(*_, **__):
        raise SystemExit

    with monkeypatch.context() as killed:
        killed.setattr(f"vega_policy.training.checkpoint.{wrote}", die)
        with pytest.raises(SystemExit):
            train(tiny_run(root, tmp_path / "run", resume=True))
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / ".config.yaml.1.partial").touch()
    resumed = train(tiny_run(root, tmp_path / "run", resume=True))
    assert_bitwise_equal(finished / "checkpoints" / "last", resumed)


def test_resuming_where_nothing_is_yet_starts_at_step_zero(root, tmp_path, finished):
    started = train(tiny_run(root, tmp_path / "new", resume=True))
    assert_bitwise_equal(finished / "checkpoints" / "last", started)
