"""Demonstrations as states: files return what was written, and the shipped ones are complete and readable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import envs
from envs.demos import collect as collection
from envs.demos.collect import CollectionSettings, collect
from envs.demos.shards import Demonstrator
from envs.demos.states import (
    RESOLUTION,
    StateEpisode,
    drop_held_out,
    read_header,
    read_states,
    write_states,
)
from vega_policy.run_dir import OtherRunError

SHIPPED = Path(__file__).parents[2] / "assets" / "demonstrations" / "libero"
DEMONSTRATIONS = {  # of each task, and the instants of all
    "libero_spatial": ([50, 48, 49, 52, 48, 48, 50, 51, 53, 50], 59198),
    "libero_object": ([48, 40, 50, 40, 49, 41, 37, 32, 38, 50], 54359),
    "libero_goal": ([47, 43, 52, 50, 49, 48, 53, 39, 45, 42], 60621),
    "libero_10": ([50, 49, 42, 60, 39, 50, 60, 38, 51, 80], 128083),
}
LAYOUTS = {  # instants of 20 demonstrations of each task, from the first, the 20th and the 40th on
    "libero_spatial": {0: 22176, 20: 20801, 40: 21464},
    "libero_object": {0: 23962, 20: 23568, 40: 23861},
    "libero_goal": {0: 25612, 20: 25084, 40: 25273},
    "libero_10": {0: 51278, 20: 49938, 40: 50906},
}
PARTIAL = [
    *sorted((SHIPPED.parent / "libero_layouts").glob("partial_*")),
    *sorted((SHIPPED.parent / "libero_fixtures").glob("fixtures_*")),
]


def make_episode(task=0, length=7, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        name: rng.normal(size=(length, width)).cumsum(axis=0)
        for name, width in zip(RESOLUTION, (5, 4, 3, 3, 2), strict=True)
    }
    for name in ("actions", "executed", "proprioception"):
        values[name] = values[name].astype(np.float32)
    return StateEpisode(task, seed, 1, initial=rng.normal(size=11), **values)


def test_a_file_returns_trajectories_to_their_resolution_and_initial_states_exactly(tmp_path):
    file, episodes = (
        tmp_path / "a.safetensors",
        [make_episode(0, 7, 1), make_episode(0, 9, 2), make_episode(3, 4, 3)],
    )
    write_states(file, "lift", [episodes[2], *episodes[:2]], {"why": "test"})
    header = read_header(file)
    assert (header["suite"], header["origin"]) == ("lift", {"why": "test"})
    assert [entry["length"] for entry in header["episodes"]] == [7, 9, 4]
    for episode, read in zip(episodes, read_states(file), strict=True):
        assert (read.task, read.seed, read.attempts) == (episode.task, episode.seed, episode.attempts)
        assert np.array_equal(read.initial, episode.initial)
        for name, unit in RESOLUTION.items():
            expected = getattr(episode, name)
            np.testing.assert_allclose(getattr(read, name), expected, atol=0.51 * unit + 1e-6, rtol=0)
    assert [read.task for read in read_states(file, tasks=[3])] == [3]


def test_a_full_state_is_time_positions_velocities_and_the_rest_of_the_first_state():
    episode = make_episode()
    state = episode.state(2)
    assert np.array_equal(state[1:6], episode.positions[2])
    assert np.array_equal(state[6:10], episode.velocities[2])
    assert (state[0], state[10]) == (episode.initial[0], episode.initial[10])


def test_other_files_and_values_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="expected a file of demonstrations as states"):
        read_header(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="0/positions: expected finite values"):
        write_states(tmp_path / "a", "lift", [replace(make_episode(), positions=np.full((7, 5), np.nan))], {})
    assert not (tmp_path / "a").exists()
    write_states(tmp_path / "lift", "lift", [make_episode()], {})
    with pytest.raises(ValueError, match=r"expected one of the suites libero_spatial.*got 'lift'"):
        drop_held_out(tmp_path / "lift")


@pytest.mark.parametrize(
    ("suite", "counts", "instants"), [(suite, *counts) for suite, counts in DEMONSTRATIONS.items()]
)
def test_a_shipped_file_holds_the_demonstrations_of_its_card(suite, counts, instants):
    header = read_header(SHIPPED / f"{suite}.safetensors")
    assert header["suite"] == suite
    assert header["origin"]["settings"].get("layouts", "standard") == "standard"
    tasks = [entry["task"] for entry in header["episodes"]]
    assert tasks == [task for task, count in enumerate(counts) for _ in range(count)]
    assert sum(entry["length"] for entry in header["episodes"]) == instants


@pytest.mark.parametrize(
    ("suite", "skip", "instants"),
    [(suite, skip, instants) for suite, files in LAYOUTS.items() for skip, instants in files.items()],
)
def test_a_shipped_file_of_random_layouts_holds_a_block_of_seeds_for_each_demonstration(
    suite, skip, instants
):
    prefix = f"skip_{skip}_" if skip else ""
    header = read_header(SHIPPED.parent / "libero_layouts" / f"{prefix}{suite}.safetensors")
    settings = header["origin"]["settings"]
    assert (header["suite"], settings["layouts"], settings["skip"]) == (suite, "random", skip)
    assert settings["demonstrator"]["options"]["retries"] == (skip == 0)
    blocks = [(entry["task"], entry["seed"] // 1000) for entry in header["episodes"]]
    assert blocks == [(task, skip + k) for task in range(10) for k in range(20)]
    assert sum(entry["length"] for entry in header["episodes"]) == instants


@pytest.mark.parametrize("file", PARTIAL, ids=lambda file: file.stem)
def test_a_shipped_file_of_partial_layouts_counts_what_it_holds_and_not_what_was_dropped(file):
    header = read_header(file)
    origin = header["origin"]
    assert origin["settings"]["layouts"] == file.stem.partition("_")[0]
    tasks = origin["settings"]["tasks"] or range(10)
    names = {task.index: task.name for task in envs.tasks(header["suite"])}
    counts = {task: origin["tasks"][names[task]]["demonstrations"] for task in tasks}
    assert [entry["task"] for entry in header["episodes"]] == [
        task for task, count in counts.items() for _ in range(count)
    ]
    seeds = {(entry["task"], entry["seed"]) for entry in header["episodes"]}
    dropped = {(entry["task"], entry["seed"]) for entry in origin.get("held_out", [])}
    assert not seeds & dropped
    assert len(seeds) + len(dropped) == len(counts) * origin["settings"]["episodes_per_task"]


def test_a_shipped_demonstration_has_the_shapes_of_libero():
    episode = read_states(SHIPPED / "libero_object.safetensors", tasks=[0])[0]
    assert len(episode) == 141
    assert episode.initial.shape == (379,)
    assert episode.positions.shape == (141, 58)
    assert episode.velocities.shape == (141, 51)
    assert episode.actions.shape == episode.executed.shape == (141, 7)
    assert episode.proprioception.shape == (141, 8)
    assert np.abs(episode.executed).max() <= 1.0
    assert not np.array_equal(episode.actions, episode.executed)  # noise 0.2 on the executed ones
    np.testing.assert_allclose(episode.state(0), episode.initial, atol=1e-3)


@pytest.mark.slow
def test_a_shipped_demonstration_restores_and_succeeds_again():
    episode = read_states(SHIPPED / "libero_object.safetensors", tasks=[0])[0]
    env = envs.make("libero_object", 0, render=False)
    env.reset_blindly(seed=episode.seed)  # places bodies that no simulator state holds
    env.restore(episode.state(100))
    np.testing.assert_allclose(env.observe()["agent_pos"], episode.proprioception[100], atol=1e-5, rtol=0)
    env.restore(episode.initial)
    outcomes = [env.step_blindly(action)[0] for action in episode.executed]
    env.close()
    assert outcomes[-1]


@pytest.mark.slow
def test_collected_states_do_not_depend_on_processes_or_interruptions(tmp_path):
    settings = CollectionSettings(
        "lift", episodes_per_task=1, demonstrator=Demonstrator(noise=0.2), format="states"
    )
    collect(settings, tmp_path / "one", processes=1)
    settings = replace(settings, episodes_per_task=2)
    collect(settings, tmp_path / "two", processes=2)
    (one,), two = (read_states(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert [episode.seed // 1000 for episode in two] == [0, 1]  # a block of seeds each
    for name in ("initial", *RESOLUTION):
        assert np.array_equal(getattr(one, name), getattr(two[0], name))
    assert not np.array_equal(one.actions, one.executed)
    collect(replace(settings, skip=1, episodes_per_task=1), tmp_path / "second", processes=1)
    (second,) = read_states(tmp_path / "second.safetensors")
    assert second.seed == two[1].seed
    assert np.array_equal(second.executed, two[1].executed)
    with pytest.raises(OtherRunError, match=r"episodes_per_task \(stored: 2, received: 3\).*root=FOLDER"):
        collect(replace(settings, episodes_per_task=3), tmp_path / "two", processes=1)


def test_shards_of_states_resume_to_one_file(tmp_path, monkeypatch):
    collected, real = [], collection.collect_shard

    def fail_at_the_second(job, report):
        if len(collected) == 1:
            raise KeyboardInterrupt
        collected.append(job)
        return real(job, report)

    settings = CollectionSettings("lift", episodes_per_task=2, format="states")
    monkeypatch.setattr(collection, "collect_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        collect(settings, tmp_path / "lift", processes=1)
    assert not (tmp_path / "lift.safetensors").exists()
    resumed = []
    monkeypatch.setattr(
        collection, "collect_shard", lambda job, report: resumed.append(job) or real(job, report)
    )
    origin = collect(settings, tmp_path / "lift", processes=1)
    assert len(resumed) == 1
    assert origin["tasks"]["lift"]["demonstrations"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lift.safetensors"]
    env = envs.make("lift", 0, render=False)
    for episode in read_states(tmp_path / "lift.safetensors"):
        env.reset_blindly(seed=episode.seed)
        env.restore(episode.initial)
        assert [env.step_blindly(action)[0] for action in episode.executed][-1]
    env.close()
