"""Frames in order: LeRobot's bytes, whatever the codec and however episodes share files; damage is named."""

import shutil
import threading

import pytest
import torch
from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.synthetic_dataset import CAMERAS, REPO_ID, write_dataset
from vega_policy.data import video as frames
from vega_policy.data.dataset import open_folder, read_table
from vega_policy.data.dataset_files import DatasetError
from vega_policy.data.video import FrameRows, frames_in_order, read_video

SIZES = ((32, 32), (32, 48))


def opened(root):
    return open_folder(root, REPO_ID)


@pytest.fixture(scope="module", params=["lossless", "h264"])
def merged(request, tmp_path_factory):
    """Two datasets merged into one, whose videos hold the episodes of both; not to be written to."""
    folder = tmp_path_factory.mktemp(request.param)
    parts = [
        write_dataset(folder / str(part), lengths=lengths, frame_shapes=SIZES, video=request.param)
        for part, lengths in enumerate([(5, 7), (8, 4)])
    ]
    aggregate_datasets([REPO_ID] * 2, REPO_ID, roots=parts, aggr_root=folder / "merged")
    return opened(folder / "merged")


def test_datasets_that_keep_their_videos_when_they_are_merged_read_the_same(merged, tmp_path):
    parts = [merged.root.with_name(str(part)) for part in range(2)]
    aggregate_datasets(
        [REPO_ID] * 2, REPO_ID, roots=parts, aggr_root=tmp_path / "apart", concatenate_videos=False
    )
    apart = opened(tmp_path / "apart")
    assert len({apart.video_start(CAMERAS[0], episode)[0] for episode in range(4)}) == 2
    readers = [frames_in_order(dataset, list(CAMERAS), "pyav") for dataset in (merged, apart)]
    for together, alone in zip(*readers, strict=True):
        assert all(torch.equal(together[camera], alone[camera]) for camera in CAMERAS)


def test_every_frame_has_the_bytes_of_lerobots_own_decoding(merged, monkeypatch):
    monkeypatch.setattr(frames, "STRETCH", 4)  # episodes end within stretches, at their ends, and beyond
    monkeypatch.setattr(frames, "available_cores", lambda: 3)
    starts = merged.episodes[f"videos/{CAMERAS[0]}/from_timestamp"]
    assert len(list(merged.root.glob("videos/**/*.mp4"))) == 2  # one a camera: all but one start later
    assert sorted(start > 0 for start in starts) == [False, True, True, True]
    found = list(frames_in_order(merged, list(CAMERAS), "pyav"))
    assert [len(clips[CAMERAS[0]]) for clips in found] == [4, 1, 4, 3, 4, 4, 4]
    lerobot = LeRobotDataset(REPO_ID, root=merged.root, video_backend="pyav", return_uint8=True)
    for camera in CAMERAS:
        expected = torch.stack([lerobot[row][camera] for row in range(len(lerobot))])
        assert expected.dtype == torch.uint8
        assert torch.equal(torch.cat([clips[camera] for clips in found]), expected)


def test_chosen_episodes_come_in_the_order_asked_for(merged):
    last, first = frames_in_order(merged, [CAMERAS[1]], "pyav", [3, 0])
    rows = FrameRows(merged, read_table(merged.root), [CAMERAS[1]], "pyav")
    assert torch.equal(last[CAMERAS[1]][-1], rows[23][CAMERAS[1]])
    assert torch.equal(first[CAMERAS[1]][0], rows[0][CAMERAS[1]])


def test_a_row_with_a_history_ends_at_its_own_frame_and_repeats_the_episodes_first(merged):
    table = read_table(merged.root)
    single = FrameRows(merged, table, [CAMERAS[0]], "pyav")
    history = FrameRows(merged, table, [CAMERAS[0]], "pyav", history=3)
    first = int(table.rows_of([1])[0])
    clip = history[first + 1][CAMERAS[0]]
    expected = [single[row][CAMERAS[0]] for row in (first, first, first + 1)]
    assert torch.equal(clip, torch.stack(expected))


def test_a_damaged_video_is_refused_by_name(merged, tmp_path):
    copy = opened(shutil.copytree(merged.root, tmp_path / "copy"))
    path = copy.video_start(CAMERAS[1], 0)[0]
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 3
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{CAMERAS[1]}/.*mp4.*damaged.*collect or download it again"):
        list(frames_in_order(copy, list(CAMERAS), "pyav"))


def test_times_that_a_video_does_not_have_are_refused(merged):
    path = merged.video_start(CAMERAS[0], 0)[0]
    with pytest.raises(DatasetError, match=r"27 frames from 0\.000 s on: 3 are damaged or missing"):
        read_video(path, 0.0, 10, 27)
    with pytest.raises(DatasetError, match="2 are damaged or missing"):
        read_video(path, 0.05, 10, 2)  # between two frames there is none


def test_little_is_held_ahead_and_who_stops_early_leaves_no_thread(merged, monkeypatch):
    monkeypatch.setattr(frames, "STRETCH", 1)
    monkeypatch.setattr(frames, "HELD_BYTES", 3 * 3 * 32 * (32 + 48))  # three instants of both cameras
    begun = []
    read = frames.read_video
    monkeypatch.setattr(frames, "read_video", lambda *clip: begun.append(1) or read(*clip))
    reader = frames_in_order(merged, list(CAMERAS), "pyav")
    next(reader)
    assert 1 <= len(begun) <= 6  # three instants of two cameras
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("in_parallel")]
