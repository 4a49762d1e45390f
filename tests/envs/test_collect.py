"""Collecting demonstrations: what the dataset holds; kills, damage and dying workers change nothing."""

import io
import json
import logging
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.numpy import load_file

import envs
from envs import rendering
from envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEED
from envs.demos import DemonstrationOptions
from envs.demos import collect as collection
from envs.demos.collect import CollectionSettings, Job, Workers, collect, context
from envs.demos.shards import (
    CODECS,
    METADATA,
    Demonstrator,
    VisitedStates,
    is_holding,
    read_episodes,
    read_metadata,
    read_shard,
    record,
    write_shard,
)
from envs.demos.states import read_states
from vega_policy.config import is_own_error

SETTINGS = CollectionSettings(
    "lift_wide",
    episodes_per_task=3,
    episodes_per_shard=1,
    frame_size=32,
    demonstrator=Demonstrator(noise=0.2, options=DemonstrationOptions(follow_through=False)),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations") / "lift_wide"
    collect(SETTINGS, folder, processes=1)
    return folder


@pytest.fixture(scope="module")
def dataset(root):
    return LeRobotDataset(SETTINGS.repo_id, root=root, video_backend="pyav")


@pytest.fixture(scope="module")
def env():
    env = envs.make("lift_wide", 0, frame_size=32, rendering="fast")
    yield env
    env.close()


def table(root):
    """All numbers of a dataset, by column."""
    rows = LeRobotDataset(SETTINGS.repo_id, root=root, video_backend="pyav").hf_dataset.with_format("numpy")
    return {name: np.stack(list(rows[name])) for name in ("action", "observation.state", "episode_index")}


def assert_same_demonstrations(one, other):
    found = table(other)
    for name, values in table(one).items():
        assert np.array_equal(values, found[name]), name


def states_of(root):
    episodes = {}
    for path in (root / "states").iterdir():
        episodes |= load_file(path)
    return [episodes[name] for name in sorted(episodes)]


def test_the_dataset_holds_the_requested_episodes(root, dataset):
    assert dataset.num_episodes == 3
    assert dataset.fps == 20
    frame = dataset[0]
    assert frame["observation.images.image"].shape == frame["observation.images.image2"].shape == (3, 32, 32)
    assert frame["observation.state"].shape == (8,)
    assert frame["action"].shape == (7,)
    assert frame["task"] == "lift the red cube"
    assert len(list(root.glob("videos/**/*.mp4"))) == 3 * 2  # each shard's own: merging is copying
    assert np.abs(table(root)["action"]).max() <= 1.0


def test_the_metadata_holds_seeds_settings_and_failures(root, dataset):
    metadata = collection.read_metadata(root)
    assert metadata["settings"]["rendering"] == "fast"
    assert metadata["settings"]["demonstrator"]["noise"] == 0.2
    assert metadata["versions"]["mujoco"] == "3.3.7"
    counts = metadata["tasks"]["lift_wide"]
    assert counts["demonstrations"] == 3 == counts["attempts"] - counts["failures"]
    lengths = [episode["length"] for episode in metadata["episodes"]]
    assert lengths == np.bincount(table(root)["episode_index"]).tolist()
    assert all(episode["seed"] in DEMONSTRATION_SEEDS for episode in metadata["episodes"])
    assert DEMONSTRATION_SEEDS.stop <= EVALUATION_SEED


def test_every_frame_is_exactly_what_the_simulator_shows_of_its_state(root, dataset, env):
    states, episodes = np.concatenate(states_of(root)), read_metadata(root)["episodes"]
    assert len(states) == len(dataset)
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        frame = dataset[index]
        env.reset(seed=episodes[frame["episode_index"]]["seed"])  # decides the cube's size, too
        env.restore(states[index])
        expected = env.observe()
        assert np.array_equal(frame["observation.state"].numpy(), expected["agent_pos"])
        for camera, pixels in expected["pixels"].items():
            stored = frame[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
            assert np.array_equal(stored.round(), pixels)


def test_a_clean_demonstration_replays_to_success(env):
    recording = record(env, 11, Demonstrator())
    env.reset_blindly(seed=11)
    for state, action in zip(recording.states, recording.actions, strict=True):
        assert np.array_equal(env.simulator_state(), state)
        success, _ = env.step_blindly(action)
    assert success


def test_noise_is_executed_and_the_clean_action_is_recorded(env):
    noisy = record(env, 11, Demonstrator(noise=0.3))
    never_noisy = record(env, 11, Demonstrator(noise=0.3, noisy_fraction=0.0))
    assert not np.array_equal(noisy.states[5], never_noisy.states[5])
    assert np.array_equal(noisy.actions[0], never_noisy.actions[0])


def test_the_dataset_holds_the_executed_actions_beside_the_clean_ones(root, env):
    stored = read_episodes(root)[0].recording
    again = record(env, stored.seed, SETTINGS.demonstrator)
    assert np.array_equal(stored.executed, again.executed)
    assert np.array_equal(stored.actions, again.actions)
    assert not np.array_equal(stored.executed, stored.actions)


def test_a_dataset_from_before_executed_actions_were_stored_is_read_and_rendered_without(root, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(root, old)
    info = json.loads((old / "meta" / "info.json").read_text())
    del info["features"]["executed_action"]
    (old / "meta" / "info.json").write_text(json.dumps(info))
    for path in (old / "data").rglob("*.parquet"):
        rows = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(rows.drop_columns(["executed_action"]), path)
    metadata = json.loads((old / METADATA).read_text())
    metadata["episodes"] = metadata["episodes"][:2]  # the others are not rendered
    (old / METADATA).write_text(json.dumps(metadata))
    assert [episode.recording.executed for episode in read_episodes(old)] == [None, None]
    collection.render_again(old, tmp_path / "new", frame_size=48, rendering="fast", processes=1)
    assert "executed_action" not in LeRobotDataset(SETTINGS.repo_id, root=tmp_path / "new").features
    before, after = table(old), table(tmp_path / "new")
    for name, values in after.items():
        assert np.array_equal(values, before[name][before["episode_index"] < 2]), name


def test_a_finished_dataset_is_left_alone(root, caplog):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with caplog.at_level(logging.INFO):
        collect(SETTINGS, root, processes=1)
    assert "nothing to collect" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_dataset_from_before_a_setting_existed_has_its_default(root, tmp_path, caplog):
    folder = tmp_path / "older"
    shutil.copytree(root, folder)
    metadata = json.loads((folder / METADATA).read_text())
    del metadata["settings"]["demonstrator"]["options"]["missed_fraction"]
    (folder / METADATA).write_text(json.dumps(metadata))
    with caplog.at_level(logging.INFO):
        collect(SETTINGS, folder, processes=1)
    assert "nothing to collect" in caplog.text
    other = Demonstrator(0.2, options=DemonstrationOptions(follow_through=False, missed_fraction=0.5))
    with pytest.raises(ValueError, match=r"missed_fraction \(stored: 0\.0, received: 0\.5\)"):
        collect(replace(SETTINGS, demonstrator=other), folder, processes=1)


def test_other_settings_are_refused_by_name(root):
    other = replace(SETTINGS, frame_size=64, demonstrator=Demonstrator(noise=0.5))
    with pytest.raises(
        ValueError, match=r"demonstrator\.noise \(stored: 0\.2, .*frame_size \(stored: 32, received: 64\)"
    ):
        collect(other, root, processes=1)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write"):
        collect(SETTINGS, tmp_path, processes=1)


def interrupt(target, shards, monkeypatch):
    """Start a collection and interrupt it before its last shard."""
    collect_shard = collection.collect_shard

    def collect_all_but_the_last(job, report):
        if job.folder == shards[-1]:
            assert_in_use(target)
            raise KeyboardInterrupt
        return collect_shard(job, report)

    with monkeypatch.context() as patch:
        patch.setattr(collection, "collect_shard", collect_all_but_the_last)
        with pytest.raises(KeyboardInterrupt):
            collect(SETTINGS, target, processes=1)


def kill(target, shards, monkeypatch):
    """Start a collection in another process and kill it after two shards."""
    process = context().Process(target=collect, args=(SETTINGS, target), kwargs={"processes": 1})
    process.start()
    try:
        wait_for(shards[1].exists, process)
        assert_in_use(target)
    finally:
        process.kill()
        process.join()


def assert_in_use(target):
    with pytest.raises(RuntimeError, match="is in use by process"):
        collect(SETTINGS, target, processes=1)


@pytest.mark.parametrize("stop", [interrupt, pytest.param(kill, marks=pytest.mark.slow)])
def test_a_stopped_collection_resumes_and_a_damaged_shard_is_collected_again(
    root, tmp_path, monkeypatch, caplog, capsys, stop
):
    target = tmp_path / "lift_wide"
    shards = [target.with_name("lift_wide.partial") / f"000_lift_wide_0000{index}" for index in range(3)]
    stop(target, shards, monkeypatch)
    assert not target.exists()
    video = next(shards[0].rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:-100])
    assert read_shard(shards[0]) is None
    with pytest.raises(ValueError, match=r"frame_size \(stored: 32, received: 64\).*\(root=FOLDER\)\.$"):
        collect(replace(SETTINGS, frame_size=64), target, processes=1)
    with caplog.at_level(logging.INFO):
        collect(SETTINGS, target, processes=1)
    assert "damaged shards are collected again: 000_lift_wide_00000" in caplog.text
    assert "of 3 shards are complete" in caplog.text
    assert "merging 3 shards into one dataset" in caplog.text
    assert "Copy data and videos: 100%" in capsys.readouterr().err
    assert_same_demonstrations(root, target)
    assert not shards[0].parent.exists()


def wait_for(happened, process, seconds=400):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.is_alive(), f"the collection ended with {process.exitcode}"
        assert time.monotonic() < deadline, "the collection made no shard"
        time.sleep(0.05)


@dataclass(frozen=True)
class FatalOnce:
    """Seeds that kill the worker process that uses them first."""

    marker: Path
    seeds: range

    def __getitem__(self, chosen):
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.seeds[chosen]


@pytest.mark.slow
def test_a_worker_that_dies_costs_no_more_than_its_shard(root, tmp_path, caplog):
    jobs = [
        Job(task, tmp_path / str(shard), replace(SETTINGS, video="h264"), episodes=1, seeds=seeds)
        for task in envs.tasks("lift_wide")
        for shard, seeds in enumerate((FatalOnce(tmp_path / "died", range(1000)), range(1000, 2000)))
    ]
    with Workers(2, total=2) as pool:
        pool.run(jobs)
    assert "a worker process died" in caplog.text
    for job, expected in zip(jobs, states_of(root), strict=False):
        assert read_shard(job.folder).lengths == (len(expected),)
        assert np.array_equal(load_file(job.folder / "states.safetensors")["episode_000000"], expected)


def write_visits(folder, episodes, **settings):
    """What `vega-eval keep_states=true` leaves of LiftWide; episodes are (seed, states [t n])."""
    rows = [
        {"suite": "lift_wide", "task_index": 0, "index": index, "seed": seed, "perturbation": "none"}
        for index, (seed, _) in enumerate(episodes)
    ]
    (folder / "trajectories").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "episodes.parquet")
    (folder / "settings.json").write_text(json.dumps({"official_states": False, **settings}))
    for index, (_, states) in enumerate(episodes):
        np.save(folder / "trajectories" / f"{index:05d}_000_failure.npy", states)
    return folder


def collect_command(arguments):
    script = Path(__file__).parents[2] / "scripts" / "collect_demos.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


def test_a_demonstration_takes_over_where_a_policy_has_been(env, tmp_path):
    shown = record(env, 7, Demonstrator())
    held = [step for step, state in enumerate(shown.states) if (env.restore(state), is_holding(env))[1]]
    assert held == list(range(held[0], len(shown.states)))  # from the grasp to the end
    visited = VisitedStates(write_visits(tmp_path / "visits", [(7, shown.states)]))
    begun = [record(env, seed, Demonstrator(), visited=visited) for seed in (1, 2, 3)]
    assert {one.seed for one in begun} == {7}  # of the scene, which rendering resets
    steps = [np.flatnonzero((shown.states == one.states[0]).all(axis=1)).item() for one in begun]
    assert len(set(steps)) > 1
    assert max(steps) < held[0]


def test_a_collection_begins_in_visited_states_and_refuses_others_when_it_resumes(env, tmp_path):
    shown = record(env, 7, Demonstrator())
    visits = write_visits(tmp_path / "visits", [(7, shown.states[:5])])
    arguments = [
        *("env=lift_wide", "format=states", f"starts={visits}", "episodes_per_task=2", "processes=1"),
        f"root={tmp_path / 'after'}",
    ]
    collect_command(arguments)
    episodes = read_states(tmp_path / "after.safetensors")
    assert [episode.seed for episode in episodes] == [7, 7]
    for episode in episodes:
        assert (shown.states[:5] == episode.initial).all(axis=1).any()
    with pytest.raises(SystemExit, match=r"has no tasks \[\]"):  # which is not: those that the policy failed
        collect_command([*arguments[:-1], "tasks=[]", f"root={tmp_path / 'none'}"])
    shutil.rmtree(visits)
    write_visits(visits, [(8, shown.states[:5])])
    with pytest.raises(SystemExit, match="starts_hash"):
        collect_command(arguments)


@pytest.mark.parametrize(
    ("settings", "changed", "message"),
    [
        ({"official_states": True}, {}, "began in official initial states. Evaluate again: vega-eval"),
        ({}, {"perturbation": "camera"}, "were perturbed"),
        ({}, {"suite": "stack"}, "has no states of failed episodes of lift_wide. Leave this"),
    ],
)
def test_visits_that_teach_nothing_or_too_much_are_refused(env, tmp_path, settings, changed, message):
    env.reset_blindly(seed=7)
    folder = write_visits(tmp_path / "visits", [(7, env.simulator_state()[None])], **settings)
    rows = pyarrow.parquet.read_table(folder / "episodes.parquet").to_pylist()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | changed for row in rows]), folder / "episodes.parquet"
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        record(env, 1, Demonstrator(), visited=VisitedStates(folder))


def test_only_states_of_failed_episodes_are_taken_over(env, tmp_path):
    env.reset_blindly(seed=7)
    kept = env.simulator_state()[None]
    folder = write_visits(tmp_path / "visits", [(7, kept), (8, kept)])
    (folder / "trajectories" / "00001_000_failure.npy").rename(
        folder / "trajectories" / "00001_000_success.npy"
    )
    visited = VisitedStates(folder)
    assert visited.tasks("lift_wide") == (0,)
    assert {visited.begin(env, np.random.default_rng(draw)) for draw in range(8)} == {7}
    (folder / "trajectories" / "00000_000_failure.npy").unlink()
    with pytest.raises(FileNotFoundError, match="more episodes if the policy solved all"):
        visited.tasks("lift_wide")


def test_starts_without_an_evaluation_say_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation. Make one: vega-eval checkpoint="):
        VisitedStates(tmp_path)


def test_a_demonstrator_that_never_succeeds_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "record", lambda env, seed, demonstrator, **options: None)
    monkeypatch.setattr(collection, "MAX_ATTEMPTS", 4)
    with pytest.raises(RuntimeError, match=r"demonstrations of lift_wide.* 0 of 4 episodes \(seeds 0 to 3\)"):
        collect(SETTINGS, tmp_path / "none", processes=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes_per_task": 0}, "episodes_per_task of at least 1, got 0"),
        ({"episodes_per_task": 2000, "episodes_per_shard": 1}, "suffice for 1000 episodes"),
        ({"episodes_per_task": 1, "episodes_per_shard": 1, "skip": 1000}, "suffice for 1000 episodes"),
        ({"skip": 5, "episodes_per_shard": 10}, "skip to be a multiple of episodes_per_shard"),
        ({"rendering": "quick"}, "Unknown rendering profile 'quick'"),
        ({"frame_size": 16}, "frame_size above 16 for videos, got 16"),
        ({"video": "gif"}, "video: expected one of lossless, h264; got 'gif'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize("size", [17, 32, 64])
def test_a_lossless_video_has_every_pixel_whenever_it_is_encoded(size):
    frames = np.random.default_rng(0).integers(100, 130, (12, size, size, 3), dtype=np.uint8)
    options = RGBEncoderConfig(**CODECS["lossless"]).get_codec_options(1, as_strings=True)
    for _ in range(10):
        with av.open(content := io.BytesIO(), "w", format="mp4") as video:
            stream = video.add_stream("hevc", rate=20, options=options)
            stream.width, stream.height, stream.pix_fmt = size, size, "gbrp"
            for frame in frames:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            video.mux(stream.encode())
        content.seek(0)
        with av.open(content) as video:
            decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        np.testing.assert_array_equal(np.stack(decoded), frames)


@pytest.mark.parametrize("device", ["99", "x"])
def test_a_device_that_does_not_exist_ends_a_collection_before_its_workers_start(
    tmp_path, monkeypatch, device
):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
    with pytest.raises(RuntimeError, match=r"rendering cannot start with .*MUJOCO_EGL_DEVICE_ID"):
        collect(SETTINGS, tmp_path / "none", processes=2)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_of_an_episode_stops_the_encoders(env, tmp_path, monkeypatch):
    recording, observe, shown = record(env, 11, Demonstrator()), env.observe, []

    def fails():
        shown.append(None)
        if len(shown) == 5:
            raise RuntimeError("the driver was reset")
        return observe()

    monkeypatch.setattr(env, "observe", fails)
    with pytest.raises(
        RuntimeError, match="the driver was reset"
    ) as failed:  # it holds the unfinished dataset
        write_shard(tmp_path / "shard", env, [recording], SETTINGS.repo_id, "lossless")
    assert failed.traceback
    assert [thread for thread in threading.enumerate() if "Encoder" in type(thread).__name__] == []
    assert not (tmp_path / "shard").exists()


class SeedsWithoutDriver:
    """Seeds of a worker process that cannot render."""

    def __getitem__(self, chosen):
        with rendering.explained_back_end():
            raise AttributeError("no driver")


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_collection_with_its_message(tmp_path):
    task = envs.tasks("lift_wide")[0]
    jobs = [
        Job(task, tmp_path / str(index), SETTINGS, episodes=1, seeds=SeedsWithoutDriver())
        for index in range(4)
    ]
    with Workers(2, total=4) as workers, pytest.raises(RuntimeError, match="no driver") as failed:
        workers.run(jobs)
    assert is_own_error(failed.value)  # a command prints its message only


def test_another_mujoco_is_one_error_and_not_the_death_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering.importlib.metadata, "version", lambda name: "3.9.9")
    with pytest.raises(RuntimeError, match=r"mujoco.*3\.9\.9"):
        collect(SETTINGS, tmp_path / "none", processes=2)
    assert not (tmp_path / "none").exists()


def test_tasks_outside_the_suite_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tasks \[7\]; its tasks are: 0 lift_wide"):
        collect(replace(SETTINGS, tasks=(7,)), tmp_path / "none", processes=1)


def test_the_script_skips_a_finished_dataset_and_reports_errors_in_one_line(root, capsys):
    arguments = [
        "env=lift_wide",
        f"root={root}",
        f"repo_id={SETTINGS.repo_id}",
        "episodes_per_task=3",
        "episodes_per_shard=1",
        "demonstrator.noise=0.2",
        "demonstrator.options.follow_through=false",
    ]
    collect_command([*arguments, "env.frame_size=32"])
    printed = capsys.readouterr().out
    assert "nothing to collect" in printed
    assert "lift_wide: 3 demonstrations" in printed
    message = rf"^[^\n]*{root} holds a run with other settings: frame_size \(stored: 32[^\n]*root=FOLDER\)\.$"
    with pytest.raises(SystemExit, match=message):
        collect_command([*arguments, "env.frame_size=64"])
