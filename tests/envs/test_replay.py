"""Collected demonstrations are rendered again, replayed open loop, and refused when damaged."""

from dataclasses import replace

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from omegaconf import OmegaConf

from envs.demos.collect import CollectionSettings, collect, render_again
from envs.demos.shards import Demonstrator, read_episodes
from envs.demos.states import read_states, write_states
from vega_policy.cli import commands
from vega_policy.cli.render import render
from vega_policy.evaluation.env_pool import EnvironmentFactory, RecordedEpisode, WorkerPool


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("collected") / "lift"
    collect(CollectionSettings("lift", episodes_per_task=1, frame_size=32), root, processes=1)
    return root


def recorded(root):
    return [
        RecordedEpisode(
            e.task.suite,
            e.task.name,
            e.task.index,
            e.recording.seed,
            e.recording.states[0],
            e.recording.actions,
        )
        for e in read_episodes(root)
    ]


def test_recorded_actions_succeed_again_from_their_recorded_state_and_others_do_not(dataset):
    episodes = recorded(dataset)
    silent = RecordedEpisode(**{**vars(episodes[0]), "actions": np.zeros_like(episodes[0].actions)})
    with WorkerPool(EnvironmentFactory("envs.make", 32, "fast"), 1) as pool:
        outcomes = pool.replay([*episodes, silent])
    assert outcomes == [True, False]


def test_a_file_of_states_replays_with_the_actions_that_were_executed(tmp_path, capsys):
    settings = CollectionSettings(
        "lift", episodes_per_task=1, demonstrator=Demonstrator(noise=0.2), format="states"
    )
    collect(settings, tmp_path / "lift", processes=1)
    shown = capsys.readouterr().err
    assert 0 <= shown.find("Starting simulators:   0%") < shown.find("Demonstrations: 100%")
    assert "1/1 " in shown.rpartition("Demonstrations: 100%")[2]
    (one,) = read_states(tmp_path / "lift.safetensors")
    silent = np.zeros_like(one.actions)
    write_states(
        file := tmp_path / "two.safetensors",
        "lift",
        [replace(one, actions=silent), replace(one, executed=silent)],
        {},
    )
    options = OmegaConf.create({"source": str(file), "episodes": None, "processes": 1})
    failed = f"failed: lift, seed {one.seed}, {len(one)} actions"
    assert commands.replay.run(options) == f"{failed}\n1 of 2 replayed demonstrations succeed"
    shown = capsys.readouterr().err
    assert "Replaying:   0%" in shown
    assert "2/2 " in shown.rpartition("Replaying: 100%")[2]
    options.episodes = [0]
    assert commands.replay.run(options) == "1 of 1 replayed demonstrations succeed"
    options.episodes = [0, 2]
    with pytest.raises(ValueError, match=r"two.safetensors has the episodes 0 to 1, got \[2\]"):
        commands.replay.run(options)


@pytest.mark.slow
def test_a_dataset_is_rendered_again_at_another_size_with_the_same_states_and_actions(dataset, tmp_path):
    metadata = render_again(
        dataset, tmp_path / "larger", frame_size=64, rendering="full", video="lossless", processes=1
    )
    assert metadata["settings"]["frame_size"] == 64
    assert metadata["settings"]["video"] == "lossless"
    assert metadata["settings"]["rendering"] == "full"
    for one, other in zip(read_episodes(dataset), read_episodes(tmp_path / "larger"), strict=True):
        assert np.array_equal(one.recording.states, other.recording.states)
        assert np.array_equal(one.recording.actions, other.recording.actions)
        assert np.array_equal(one.recording.executed, other.recording.executed)
        assert one.recording.seed == other.recording.seed
    small, large = (
        LeRobotDataset("vega/lift", root=root, video_backend="pyav")
        for root in (dataset, tmp_path / "larger")
    )
    frame = large[0]["observation.images.image"]
    assert frame.shape == (3, 64, 64)
    coarse = frame.reshape(3, 32, 2, 32, 2).mean(dim=(2, 4))
    assert (coarse - small[0]["observation.images.image"]).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "empty",
            r"empty: expected the folder of a dataset .*, got one without meta/vega.json and states",
        ),
        (
            "none",
            r"none: expected the folder of a dataset .*, got no such folder\. Give another folder, or",
        ),
        (
            "file",
            r"file: expected the folder .*, got no such folder\. Did you mean \S+/file\.safetensors\?$",
        ),
        ("none.safetensors", r"expected a file of states .*, got no such file\. Give another file\.$"),
        ("empty.safetensors", r"expected a file of states .*, got no such file\. Did you mean \S+/empty\?$"),
        ("folder.safetensors", r"expected a file of states .*, got a folder\. Give another file\.$"),
    ],
)
def test_a_source_that_holds_no_demonstrations_is_refused(tmp_path, source, message):
    for folder in ("empty", "folder.safetensors"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=message):
        commands.replay.run(OmegaConf.create({"source": str(tmp_path / source), "episodes": None}))
    options = commands.OmegaConf.create(render.node | {"source": [str(tmp_path / source)], "repo_id": "a/b"})
    options.root = str(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=message):
        render.run(options)
    assert not (tmp_path / "new").exists()


def test_a_dataset_with_changed_simulator_states_is_refused(dataset):
    with pytest.raises(ValueError, match=r"has the episodes 0 to 0, got \[7\]"):
        read_episodes(dataset, [7])
    (states,) = (dataset / "states").glob("*.safetensors")
    content = states.read_bytes()
    states.unlink()
    with pytest.raises(ValueError, match=r"expected \d+ steps, found \d+ actions and 0 simulator states"):
        read_episodes(dataset)
    states.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"safetensors is damaged \(.*\); coll"):
        read_episodes(dataset)
    states.write_bytes(content)
