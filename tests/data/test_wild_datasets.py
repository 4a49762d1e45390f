"""Datasets as they are in the wild: what can be read is read, the rest is refused in one line with advice."""

import json
import logging
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs import NormalizationMode

from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import tiny_policy, tiny_run
from vega_policy.data.dataset import DatasetConfig, open_folder
from vega_policy.data.dataset_files import DatasetError
from vega_policy.data.loader import VideoSource
from vega_policy.data.video import FrameRows, frames_in_order, read_video
from vega_policy.training.train import load_data

STATE, ACTION = "observation.state", "action"


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def load(folder, tmp_path, policy=None, **dataset):
    return load_data(tiny_run(folder, tmp_path / "run", policy=policy, dataset=dataset))


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_info(folder, change):
    edit_json(folder / "meta" / "info.json", change)


def edit_columns(folder, **columns):
    """Replace columns of the frames; None removes one."""
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    for name, change in columns.items():
        key = {"state": STATE}.get(name, name)
        place = table.schema.get_field_index(key)
        column = None if change is None else change(table[key])
        table = table.remove_column(place) if column is None else table.set_column(place, key, column)
    pq.write_table(table, file)


def reshape(folder, name, shape, names=None):
    """Give a feature another shape in the metadata and in the files."""

    def nest(column):
        values = np.array(column.to_pylist(), np.float32).reshape(-1, *shape)
        return pa.array(values.tolist() if shape else values[..., None].reshape(-1).tolist())

    edit_info(folder, lambda info: info["features"][name].update(shape=list(shape), names=names))
    edit_columns(folder, **{"state" if name == STATE else name: nest})


def write_tasks(folder, **columns):
    pq.write_table(pa.table(columns), folder / "meta" / "tasks.parquet")


def test_numbers_without_an_axis_are_vectors_of_one_entry(tmp_path):
    folder = write_dataset(tmp_path / "one", state_width=1, action_width=1, lengths=(4, 3))
    edit_columns(
        folder,
        state=lambda column: pa.array(
            [value[0] if isinstance(value, list) else value for value in column.to_pylist()]
        ),
        action=lambda column: pa.array(
            [value[0] if isinstance(value, list) else value for value in column.to_pylist()]
        ),
    )
    edit_info(folder, lambda info: [info["features"][name].update(shape=[]) for name in (STATE, ACTION)])
    data = load(folder, tmp_path)
    assert data.table.state.shape == data.table.action.shape == (7, 1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, None),
        ([["left", "right"], list("xyzabcg")], "left.x"),
        ({"motors": [f"m{index}" for index in range(14)]}, "m0"),
    ],
)
def test_two_arms_of_seven_joints_are_fourteen_numbers(tmp_path, names, expected):
    folder = write_dataset(tmp_path / "two", state_width=14, action_width=14, lengths=(4, 3))
    flat = load(folder, tmp_path).table
    for name in (STATE, ACTION):
        reshape(folder, name, (2, 7), names)
    config = tiny_run(folder, tmp_path / "run")
    table = load_data(config).table
    assert torch.equal(table.state, flat.state)
    assert torch.equal(table.action, flat.action)
    found = config.vega.action_feature_names
    assert (found and found[0]) == expected


@pytest.mark.parametrize(
    "tasks",
    [
        {"task_index": [0, 1], "task": ["lift the cube", "push the cube"]},
        {"task_index": [1, 0], "note": ["p", "l"], "task": ["push the cube", "lift the cube"]},
        {"task_index": [0, 1], "__index_level_0__": ["lift the cube", "push the cube"], "more": ["a", "b"]},
    ],
    ids=["plain column", "extra column and other order", "unnamed index"],
)
def test_instructions_are_found_in_every_form_of_tasks_parquet(copy, tmp_path, tasks):
    write_tasks(copy, **tasks)
    table = load(copy, tmp_path).table
    assert table.instructions(torch.tensor([0, 9])) == ["lift the cube", "push the cube"]


def test_indices_of_tasks_may_have_a_hole(copy, tmp_path):
    write_tasks(copy, task_index=[0, 5], task=["lift the cube", "push the cube"])
    edit_columns(copy, task_index=lambda column: pa.array([5 * value for value in column.to_pylist()]))
    table = load(copy, tmp_path).table
    assert table.instructions(torch.tensor([0, 9])) == ["lift the cube", "push the cube"]


def test_one_instruction_can_be_given_for_all_frames(copy, tmp_path):
    (copy / "meta" / "tasks.parquet").unlink()
    table = load(copy, tmp_path, task="drücke den Würfel").table
    assert set(table.instructions(torch.arange(len(table)))) == {"drücke den Würfel"}


def test_an_empty_instruction_is_used_with_a_warning(copy, tmp_path, caplog):
    assert load(copy, tmp_path, task=" ").table.tasks == (" ",)
    assert "dataset.task is empty" in caplog.text


BAD_STATS = {
    "missing": lambda stats: stats.clear(),
    "without action": lambda stats: stats.pop(ACTION),
    "NaN": lambda stats: stats[ACTION].update(max=[float("nan")] * 7),
    "another width": lambda stats: stats[ACTION].update(max=[1.0] * 5),
    "mean and std only": lambda stats: [stats[ACTION].pop(name) for name in ("min", "max")],
}


@pytest.mark.parametrize("change", BAD_STATS.values(), ids=BAD_STATS)
def test_statistics_that_cannot_be_used_are_computed_from_the_data(copy, tmp_path, caplog, change):
    edit_json(copy / "meta" / "stats.json", change)
    data = load(copy, tmp_path)
    assert data.stats[ACTION]["max"] == pytest.approx(data.table.action.amax(0).numpy())
    assert "for action (MIN_MAX); computed from the data" in caplog.text


def test_a_missing_statistics_file_is_no_hindrance(copy, tmp_path):
    (copy / "meta" / "stats.json").unlink()
    assert load(copy, tmp_path).stats[STATE]["mean"].shape == (8,)


def test_statistics_far_from_the_data_are_reported_with_figures_and_can_be_replaced(copy, tmp_path, caplog):
    edit_json(copy / "meta" / "stats.json", lambda stats: stats[ACTION].update(max=[90.0] * 7))
    assert load(copy, tmp_path).stats[ACTION]["max"][0] == 90.0
    assert "far from the data: action [0] min -" in caplog.text
    assert "max 90 (data: 0.9" in caplog.text
    caplog.clear()
    assert load(copy, tmp_path, stats="computed").stats[ACTION]["max"][0] < 1.0
    assert caplog.text == ""


def test_sound_statistics_are_kept_without_a_word(root, tmp_path, caplog):
    stored = json.loads((root / "meta" / "stats.json").read_text())
    assert load(root, tmp_path).stats[ACTION]["max"].tolist() == stored[ACTION]["max"]
    assert caplog.text == ""


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "IDENTITY"])
def test_state_and_action_can_be_normalised_in_each_of_lerobots_modes(copy, tmp_path, mode):
    edit_json(
        copy / "meta" / "stats.json", lambda stats: [stats[name].pop("q01") for name in (STATE, ACTION)]
    )
    policy = tiny_policy(
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode[mode],
            "ACTION": NormalizationMode[mode],
        }
    )
    stats = load(copy, tmp_path, policy=policy).stats
    assert ("q01" in stats[ACTION]) is (mode == "QUANTILES")


def test_a_byte_order_mark_is_skipped(copy, tmp_path):
    for name in ("info.json", "stats.json"):
        path = copy / "meta" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(copy, tmp_path).table) == 27


def test_the_files_that_macos_adds_are_ignored(copy, tmp_path):
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 no data")
    data = load(copy, tmp_path)
    assert len(list(frames_in_order(data.parts[0].dataset, list(CAMERAS), "pyav"))) == 3


def test_a_depth_stream_is_ignored_with_a_line(copy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    depth = {"dtype": "video", "shape": [32, 32, 1], "names": None, "info": {"is_depth_map": True}}
    edit_info(copy, lambda info: info["features"].update({"observation.images.depth": depth}))
    config = tiny_run(copy, tmp_path / "run")
    load_data(config)
    assert list(config.vega.image_features) == list(CAMERAS)
    assert "observation.images.depth is a depth stream" in caplog.text


def test_openpi_names_are_read_with_the_rename_that_the_refusal_names(tmp_path):
    folder = write_dataset(tmp_path / "openpi", cameras=("image", "wrist_image"), lengths=(4, 3))
    plain = load(write_dataset(tmp_path / "plain", lengths=(4, 3)), tmp_path)
    edit_info(
        folder,
        lambda info: info.update(
            features={
                {STATE: "state", ACTION: "actions"}.get(name, name): kept
                for name, kept in info["features"].items()
            }
        ),
    )
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(
        table.rename_columns(
            [{STATE: "state", ACTION: "actions"}.get(name, name) for name in table.column_names]
        ),
        file,
    )
    with pytest.raises(DatasetError) as refusal:
        load(folder, tmp_path)
    override = str(refusal.value).partition("'dataset.rename={")[2].rstrip("}'")
    rename = dict(pair.split(": ") for pair in override.split(","))
    assert rename == {
        "image": "observation.images.image",
        "wrist_image": "observation.images.wrist_image",
        "state": STATE,
        "actions": ACTION,
    }
    rename["wrist_image"] = CAMERAS[1]
    data = load(folder, tmp_path, rename=rename)
    assert torch.equal(data.table.action, plain.table.action)
    first, expected = (
        next(frames_in_order(one.parts[0].dataset, list(CAMERAS), "pyav")) for one in (data, plain)
    )
    assert all(torch.equal(first[camera], expected[camera]) for camera in CAMERAS)


def test_a_video_of_another_rate_is_refused_alike_with_and_without_a_cache(copy, tmp_path):
    edit_info(copy, lambda info: info.update(fps=14))
    data = load(copy, tmp_path, cache="none")
    frames = FrameRows(data.parts[0].dataset, data.table, list(CAMERAS), "pyav")
    with pytest.raises(DatasetError, match="damaged or missing at 14 frames a second"):
        frames[1]
    with pytest.raises(DatasetError, match="damaged or missing at 14 frames a second"):
        list(frames_in_order(data.parts[0].dataset, list(CAMERAS), "pyav"))


def test_a_video_that_is_a_tenth_of_a_frame_late_is_read_alike_with_and_without_a_cache(copy, tmp_path):
    (episodes,) = (copy / "meta" / "episodes").rglob("*.parquet")
    table = pq.read_table(episodes)
    name = f"videos/{CAMERAS[0]}/from_timestamp"
    place = table.schema.get_field_index(name)
    late = pa.array([value + 0.01 for value in table[name].to_pylist()])
    pq.write_table(table.set_column(place, name, late), episodes)
    data = load(copy, tmp_path, cache="none")
    source = VideoSource(
        data.table, FrameRows(data.parts[0].dataset, data.table, [CAMERAS[0]], "pyav"), 4, 0, 0
    )
    cached = torch.cat(
        [clip[CAMERAS[0]] for clip in frames_in_order(data.parts[0].dataset, [CAMERAS[0]], "pyav")]
    )
    live = source.batch(torch.arange(27))[CAMERAS[0]]
    assert torch.equal((live * 255).round().to(torch.uint8), cached)
    assert read_video(*data.parts[0].dataset.video_start(CAMERAS[0], 0), 10, 2).shape[0] == 2


def lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def ragged(column):
    values = column.to_pylist()
    return pa.array([values[0][:-1], *values[1:]])


REFUSED = {
    "v2.1": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v2.1")),
        r"expected a LeRobotDataset v3\.0, got v2\.1\. .*convert_dataset_v21_to_v30 --repo-id=tests",
    ),
    "v2.0": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v2.0")),
        r"got v2\.0\. Convert it to v2\.1 with",
    ),
    "metadata is no JSON": (
        lambda root: (root / "meta" / "info.json").write_text("{"),
        r"info\.json is no JSON",
    ),
    "metadata is a list": (
        lambda root: (root / "meta" / "info.json").write_text("[]"),
        r"expected a LeRobotDataset v3\.0, got None",
    ),
    "metadata without features": (
        lambda root: edit_info(root, lambda info: info.pop("features")),
        r"info\.json: expected total_frames and features with a dtype each",
    ),
    "a feature without a type": (
        lambda root: edit_info(root, lambda info: info["features"]["action"].pop("dtype")),
        r"info\.json: expected total_frames and features with a dtype each",
    ),
    "frames elsewhere on the disk": (
        lambda root: edit_info(root, lambda info: info.update(video_path="../../{video_key}.mp4")),
        r"info\.json: expected video_path to be inside the dataset, got '\.\./\.\./\{video_key\}\.mp4'",
    ),
    "rows elsewhere on the disk": (
        lambda root: edit_info(root, lambda info: info.update(data_path="/home/{file_index}.parquet")),
        r"info\.json: expected data_path to be inside the dataset, got '/home/",
    ),
    "metadata is an LFS pointer": (
        lambda root: lfs(root / "meta" / "info.json"),
        r"info\.json is a Git LFS pointer, not the file\. Download the files: git -C .* lfs pull",
    ),
    "videos are LFS pointers": (
        lambda root: [lfs(path) for path in root.glob("videos/**/*.mp4")],
        r"mp4 is a Git LFS pointer.*git -C .* lfs pull",
    ),
    "no episodes": (
        lambda root: shutil.rmtree(root / "meta" / "episodes"),
        r"expected meta/episodes/chunk-\*/file-\*\.parquet, found none",
    ),
    "a camera without videos": (
        lambda root: shutil.rmtree(root / "videos" / CAMERAS[1]),
        r"incomplete: expected videos/observation\.images\.image2/.*mp4, found no such file",
    ),
    "no tasks": (
        lambda root: (root / "meta" / "tasks.parquet").unlink(),
        r"tasks\.parquet is missing.*dataset\.task=",
    ),
    "tasks without sentences": (
        lambda root: write_tasks(root, task_index=[0, 1], number=[3, 4]),
        r"expected the columns task_index and task, got task_index, number",
    ),
    "frames of an unknown task": (
        lambda root: write_tasks(root, task_index=[0], task=["lift the cube"]),
        r"frames have task_index 1, meta/tasks\.parquet names 0",
    ),
    "no actions in the files": (
        lambda root: edit_columns(root, action=None),
        r"expected the columns .*found no action",
    ),
    "actions of several widths": (
        lambda root: edit_columns(root, action=ragged),
        r"expected action of one width in every frame, got 188 numbers in 27 frames",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(copy, tmp_path, spoil, message):
    spoil(copy)
    with pytest.raises(DatasetError, match=message) as refusal:
        load(copy, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"video_backend": "opencv"},
            r"dataset\.video_backend: expected one of pyav, torchcodec; got 'opencv'",
        ),
        ({"stats": "guessed"}, r"dataset\.stats: expected one of stored, computed; got 'guessed'"),
    ],
)
def test_unknown_choices_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig("a/b", **fields)


def test_a_rename_of_a_feature_that_is_not_there_lists_those_that_are(root):
    with pytest.raises(DatasetError, match=r"has no front; its features are observation\.images\.image,"):
        open_folder(root, "a/b", {"front": CAMERAS[0]})


def test_a_dataset_that_is_neither_here_nor_on_the_hub_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_run(tmp_path, tmp_path / "run", dataset={"root": None, "repo_id": "nobody/nothing"})
    with pytest.raises(
        DatasetError, match=r"nobody/nothing: the dataset is neither on this machine nor"
    ) as error:
        load_data(config)
    assert "\n" not in str(error.value)


def test_a_decoder_that_cannot_be_loaded_is_refused_with_the_other_one(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        DatasetError, match=r"torchcodec cannot be loaded \(.*Set dataset\.video_backend=pyav"
    ):
        load(root, tmp_path, video_backend="torchcodec")
