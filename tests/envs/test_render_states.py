"""Rendering from states: the simulator's own frames, resumable, and what training makes of them."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from envs.demos.planner_fixtures import displacements
from envs.demos.render import find_displacements, plan_rendering, render_episode, render_frames
from envs.demos.shards import Recording, dataset_features, dataset_frames
from envs.demos.states import StateEpisode, read_states, write_states
from tests.training_runs import tiny_policy
from vega_policy.cli.render import render as render_command
from vega_policy.cli.render import render_states
from vega_policy.data.dataset import DatasetConfig, DatasetError, read_table
from vega_policy.data.dataset_files import fingerprint_frames, read_info
from vega_policy.data.feature_cache import frames_stream, open_mean_frames, open_stream
from vega_policy.pretraining.clips import cut_clips, cut_instructions, open_shard
from vega_policy.training.config import TrainConfig
from vega_policy.training.train import train

SHIPPED = Path(__file__).parents[2] / "assets" / "demonstrations" / "libero"
SIZE, ROWS, CAMERAS = 32, 12, ["observation.images.image", "observation.images.image2"]


def simulate(env, seed, steps):
    """Return an episode of random actions and the frames [t v 3 h w] that the simulator shows."""
    rng = np.random.default_rng(seed)
    env.reset_blindly(seed=seed)
    states, actions, proprioception, frames = [], [], [], []
    for _ in range(steps):
        observation = env.observe()
        states.append(env.simulator_state())
        proprioception.append(observation["agent_pos"])
        frames.append(np.stack([frame.transpose(2, 0, 1) for frame in observation["pixels"].values()]))
        actions.append(rng.uniform(-1, 1, env.action_size).astype(np.float32))
        env.step_blindly(actions[-1])
    nq, nv, states, actions = env.model.nq, env.model.nv, np.stack(states), np.stack(actions)
    positions, velocities = states[:, 1 : 1 + nq], states[:, 1 + nq : 1 + nq + nv]
    values = states[0], positions, velocities, actions / 2, actions, np.stack(proprioception)
    return StateEpisode(0, seed, 1, *values), np.stack(frames)


@pytest.fixture(scope="module")
def lift(tmp_path_factory):
    """Return a file of two short episodes and their frames."""
    env = envs.make("lift", 0, frame_size=SIZE, rendering="fast")
    episodes, frames = zip(*(simulate(env, seed, steps) for seed, steps in ((1, 5), (2, 7))), strict=True)
    env.close()
    file = tmp_path_factory.mktemp("states") / "lift.safetensors"
    write_states(file, "lift", episodes, {})
    return file, np.concatenate(frames)


def render(file, folder, times=1, **options):
    """Render a file, listed `times` times, into `folder`/data and /cache; return frames and their means."""
    values = {"repo_id": "vega/lift", "frame_size": SIZE, "rendering": "fast", "processes": 1} | options
    root, cache = folder / "data", folder / "cache"
    render_states([file] * times, root=root, cache_root=cache, **values)
    key = {"repo_id": values["repo_id"], **fingerprint_frames(root)}
    stream = frames_stream(key, CAMERAS, SIZE)
    return open_stream(cache, stream, times * ROWS, None).numpy(), open_mean_frames(cache, stream)


@pytest.fixture(scope="module")
def rendering(lift, tmp_path_factory):
    """Return the folder into which `lift` is rendered, its frames and their means; not to be written to."""
    folder = tmp_path_factory.mktemp("rendered")
    return folder, *render(lift[0], folder)


def test_rendered_states_are_the_frames_of_the_simulator(lift, rendering):
    _, frames, mean = rendering
    assert np.mean(frames != lift[1]) < 1e-3  # positions are stored to 1e-7 m
    for view, camera in enumerate(CAMERAS):
        np.testing.assert_allclose(mean[camera], frames[:, view].mean(axis=0) / 255, atol=1e-6)


def test_an_interrupted_rendering_resumes_with_the_finished_episodes(lift, tmp_path):
    file, _ = lift
    plan, _ = plan_rendering([file], frame_size=SIZE, rendering="fast")
    target, notes = tmp_path / "values.bin", tmp_path / "notes"
    notes.mkdir()
    target.write_bytes(bytes(plan.rows * plan.row_bytes))
    whole = render_frames(plan, target, notes, processes=1)
    content = target.read_bytes()
    (record,) = notes.iterdir()
    first = record.read_text().splitlines(keepends=True)[0]
    for torn in (
        first,
        first + "5 12",
    ):  # killed after the first episode, and within the record of the second
        record.write_text(torn)
        target.write_bytes(content[: 5 * plan.row_bytes] + bytes(7 * plan.row_bytes))
        resumed = render_frames(plan, target, notes, processes=1)
        assert target.read_bytes() == content
        assert all(np.array_equal(resumed[camera], whole[camera]) for camera in CAMERAS)


def test_a_finished_episode_whose_frames_are_damaged_is_rendered_again(lift, tmp_path):
    plan, _ = plan_rendering([lift[0]], frame_size=SIZE, rendering="fast")
    target, notes = tmp_path / "values.bin", tmp_path / "notes"
    notes.mkdir()
    target.write_bytes(bytes(plan.rows * plan.row_bytes))
    render_frames(plan, target, notes, processes=1)
    content = target.read_bytes()
    target.write_bytes(bytes(len(content)))
    render_frames(plan, target, notes, processes=1)
    assert target.read_bytes() == content


def test_the_dataset_holds_clean_and_executed_actions_and_one_without_the_latter_has_the_same_frames(
    lift, rendering, tmp_path, monkeypatch
):
    (file, _), (folder, frames, _) = lift, rendering
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    root, options = tmp_path / "data", {"repo_id": "vega/lift", "frame_size": SIZE, "rendering": "fast"}
    table, episodes = read_table(root, executed=True), read_states(file)
    for found, name in ((table.action, "actions"), (table.executed, "executed")):
        assert np.array_equal(found, np.concatenate([getattr(episode, name) for episode in episodes]))
    torch.testing.assert_close(table.executed, 2 * table.action, atol=2e-5, rtol=0)  # as `simulate` made them
    assert read_table(root).executed is None
    monkeypatch.setattr("envs.demos.render.render_episode", None)  # nothing is rendered
    monkeypatch.setattr("envs.demos.render.dataset_features", partial(dataset_features, executed=False))
    render_states([file], root=tmp_path / "old", cache_root=tmp_path / "cache", **options)
    assert fingerprint_frames(tmp_path / "old") == fingerprint_frames(root)
    assert "executed_action" not in read_info(tmp_path / "old")["features"]
    monkeypatch.undo()
    again, _ = render(file, tmp_path)  # the old dataset's cache is that of the new one
    assert np.array_equal(again, frames)
    with pytest.raises(DatasetError, match=r"expected the columns .*, found no executed_action"):
        read_table(tmp_path / "old", executed=True)


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_frames(lift, tmp_path):
    one, _ = render(lift[0], tmp_path / "one", times=2)
    two, _ = render(lift[0], tmp_path / "two", times=2, processes=2)
    assert np.array_equal(one, two)


def count_simulators(monkeypatch):
    """Return a list to which each simulator that is built from now on adds its suite and task."""
    built, make = [], envs.make

    def count(suite, task, **options):
        built.append((suite, task))
        return make(suite, task, **options)

    monkeypatch.setattr(envs, "make", count)
    return built


def test_files_of_one_task_are_rendered_by_one_simulator(lift, tmp_path, monkeypatch):
    file, frames = lift
    env = envs.make("lift", 0, frame_size=SIZE, rendering="fast")
    episode, more = simulate(env, seed=3, steps=4)
    env.close()
    other, target = tmp_path / "other.safetensors", tmp_path / "values.bin"
    write_states(other, "lift", [episode], {})
    plan, _ = plan_rendering([other, file], frame_size=SIZE, rendering="fast")
    target.write_bytes(bytes(plan.rows * plan.row_bytes))
    built = count_simulators(monkeypatch)
    render_frames(plan, target, tmp_path, processes=1)
    assert built == [("lift", 0)]
    rendered = np.fromfile(target, np.uint8).reshape(4 + ROWS, *frames.shape[1:])
    assert np.mean(rendered != np.concatenate([more, frames])) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_displacements_of_several_files_are_those_of_each_episode_alone(processes, monkeypatch):
    names = ("libero_goal", "recovery_libero_goal", "libero_goal")
    files = [SHIPPED / f"{name}.safetensors" for name in names]
    tasks, alone = [1, 3], []
    options = {"tasks": tasks, "episodes_per_task": 1, "frame_stride": 50, "displacement": True}
    plan, _ = plan_rendering(files, frame_size=SIZE, rendering="fast", **options)
    for file, task in ((file, task) for file in files for task in tasks):
        episode = read_states(file, [task])[0]
        env = envs.make("libero_goal", task, render=False)
        env.reset_blindly(seed=episode.seed)
        alone.append(displacements(env, map(episode.state, range(len(episode)))))
        env.close()
    built = count_simulators(monkeypatch)
    found = find_displacements(plan, processes)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in alone]
    assert sorted(built) == ([("libero_goal", task) for task in tasks] if processes == 1 else [])


@pytest.mark.slow
def test_the_error_of_a_rendering_process_is_shown(lift, tmp_path):
    with pytest.raises(RuntimeError, match="MUJOCO_EGL_DEVICE_ID"):
        render(lift[0], tmp_path, processes=2, egl_devices=[99])


def test_frames_rendered_before_are_copied_into_a_joint_dataset(lift, rendering, tmp_path, monkeypatch):
    (file, _), (folder, frames, _) = lift, rendering
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    root, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setattr("envs.demos.render.render_episode", None)  # nothing is rendered
    options = {"frame_size": SIZE, "rendering": "fast", "cache_root": cache, "processes": 1}
    joint = tmp_path / "joint"
    render_states([file, file], root=joint, repo_id="vega/joint", reuse=[str(root)], **options)
    key = {"repo_id": "vega/joint", **fingerprint_frames(joint)}
    copied = open_stream(cache, frames_stream(key, CAMERAS, SIZE), 2 * ROWS, None).numpy()
    assert np.array_equal(copied, np.concatenate([frames, frames]))


def test_a_file_that_is_listed_twice_is_rendered_once(lift, rendering, tmp_path, monkeypatch):
    (file, _), (_, frames, means) = lift, rendering
    rendered, render_one = [], render_episode

    def count(env, episode, stride):
        rendered.append(episode.seed)
        return render_one(env, episode, stride)

    monkeypatch.setattr("envs.demos.render.render_episode", count)
    twice, found = render(file, tmp_path, times=2)
    assert rendered == [1, 2]
    assert np.array_equal(twice, np.concatenate([frames, frames]))
    for camera, mean in found.items():
        np.testing.assert_allclose(mean, means[camera], atol=1e-4)


@pytest.mark.slow
def test_libero_states_show_the_same_frames_without_the_reset_of_their_episode():
    stove = 2  # its burner's light is switched by the state, and the seed places the stove
    first, second = read_states(SHIPPED / "libero_10.safetensors", tasks=[stove])[:2]
    env = envs.make("libero_10", stove, frame_size=SIZE, rendering="fast")
    env.reset_blindly(seed=second.seed)
    states = [second.state(step) for step in (0, 100, len(second) - 1)]
    expected = np.concatenate(list(env.camera_rig.render_states(states, env.restore)))
    env.reset_blindly(seed=first.seed)
    env.restore(first.state(len(first) - 1))
    frames = np.concatenate(list(env.camera_rig.render_states(states, env.restore)))
    env.close()
    assert np.array_equal(frames, expected)
    assert not np.array_equal(frames[0], frames[2])


def test_displacement_is_stored_where_it_is_wanted_and_refused_where_no_target_is_known(lift, tmp_path):
    file, _ = lift
    with pytest.raises(ValueError, match=r"displacement=true: the targets of lift are not known"):
        plan_rendering([file], frame_size=SIZE, rendering="fast", displacement=True)
    shipped = SHIPPED / "libero_object.safetensors"
    for wanted in (False, True):
        plan, _ = plan_rendering(
            [shipped], frame_size=SIZE, rendering="fast", tasks=[0], episodes_per_task=1, displacement=wanted
        )
        assert ("displacement" in plan.features) is wanted


def displacement_now(env, body):
    """The way from the grip point to a body, or to a site, along the axes of the robot's base."""
    data = env.data
    target = data.site(body).xpos if body.endswith("_region") else data.body(body).xpos
    way = target - data.site("gripper0_grip_site").xpos
    return data.body("robot0_base").xmat.reshape(3, 3).T @ way


def test_a_stored_displacement_is_the_simulators_to_the_bowl_and_while_it_is_held_to_the_plate(tmp_path):
    file, bowl, plate = SHIPPED / "libero_spatial.safetensors", "akita_black_bowl_1_main", "plate_1_main"
    options = {"root": tmp_path / "data", "repo_id": "vega/spatial", "cache_root": tmp_path / "cache"}
    options |= {"tasks": [0], "episodes_per_task": 2, "frame_size": SIZE, "rendering": "fast"}
    options |= {"frame_stride": 20, "processes": 1}
    render_states([file], **options, displacement=True)  # of all states, also of those not rendered
    with pytest.raises(ValueError, match=r"expected 2 episodes with .*, got 2 .* displacement=True "):
        render_states([file], **options)
    table = read_table(tmp_path / "data", displacement=True)
    env = envs.make("libero_spatial", 0, frame_size=SIZE, rendering="fast")
    switches = []
    for number, episode in enumerate(read_states(file, [0])[:2]):
        env.reset_blindly(seed=episode.seed)
        stored = table.displacement[table.episode == number].numpy()
        states = [episode.state(step) for step in range(len(episode))]
        ways, heights = [], []
        for state in states:
            env.restore(state)
            ways.append([displacement_now(env, name) for name in (bowl, plate)])
            heights.append(env.data.body(bowl).xpos[2])
        (to_bowl, to_plate), heights = np.moveaxis(ways, 1, 0), np.array(heights)
        goes_to_plate = np.isclose(stored, to_plate, atol=1e-5).all(axis=1)
        np.testing.assert_allclose(stored, np.where(goes_to_plate[:, None], to_plate, to_bowl), atol=1e-5)
        switches.append(np.flatnonzero(np.diff(goes_to_plate)) + 1)
        closing, lifted = (episode.actions[:, -1] > 0).argmax(), (heights > heights[0] + 0.01).argmax()
        assert 0 < closing < switches[-1][0] <= lifted
        recording = Recording(episode.seed, np.stack(states[:3]), episode.actions[:3])
        collected = [frame["displacement"] for frame in dataset_frames(env, recording)]
        assert np.array_equal(collected, stored[:3])
    env.close()
    # The second bowl is let go beside the middle of the plate: it is the target again until it stands there.
    assert [len(steps) for steps in switches] == [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task", "near"),
    [  # the parts that the closing or closed hand is at, in the order of the stages
        ("libero_goal", 3, ["akita_black_bowl_1_main", "handle", "akita_black_bowl_1_main"]),
        ("libero_goal", 7, ["flat_stove_1_button"]),
        ("libero_10", 9, ["white_yellow_mug_1_main", "handle"]),
    ],
)
def test_stages_with_fixtures_go_to_the_handle_knob_or_door(suite, task, near):
    episode = read_states(SHIPPED / f"{suite}.safetensors", [task])[0]
    env = envs.make(suite, task, render=False)
    env.reset_blindly(seed=episode.seed)
    states = [episode.state(step) for step in range(len(episode))]
    found = displacements(env, states)
    is_closed = episode.actions[:, -1] > 0
    closing = [step for step in range(1, len(states)) if is_closed[step] and not is_closed[step - 1]]
    for step, name in zip(closing, near, strict=True):
        if name != "handle":
            env.restore(states[step])
            expected = displacement_now(env, name)
            assert np.linalg.norm(expected) < 0.1
            np.testing.assert_allclose(found[step], expected, atol=1e-5)
        elif suite == "libero_goal":  # a door is pushed by a hand that has closed far from it
            assert np.linalg.norm(found[step]) < 0.02
    env.close()


def test_tasks_and_episodes_are_cut(lift):
    plan, values = plan_rendering([lift[0]], frame_size=SIZE, rendering="fast", episodes_per_task=1)
    assert [episode.length for episode in plan.episodes] == [len(value["action"]) for value in values] == [5]


@pytest.fixture(scope="module")
def rendered(rendering):
    folder = rendering[0]
    return {"repo_id": "vega/lift", "root": str(folder / "data"), "cache_root": str(folder / "cache")}


def test_clips_are_cut_from_rendered_episodes_and_resume(rendered, tmp_path):
    """Episodes of 5 and 7 states, in a shard each."""
    order = {"roots": [rendered["root"]], "suites": ["lift"], "cache_root": rendered["cache_root"]}
    order |= {"frames": 5, "frame_size": SIZE, "parts": 2, "clips_per_episode": 3, "every": [1, 2]}
    assert not cut_clips(tmp_path, processes=1, deadline=0.0, **order)
    assert cut_clips(tmp_path, processes=1, **order)
    key = {"repo_id": rendered["repo_id"], **fingerprint_frames(Path(rendered["root"]))}
    stored = open_stream(Path(rendered["cache_root"]), frames_stream(key, CAMERAS, SIZE), ROWS, None)
    frames = stored.numpy().transpose(0, 1, 3, 4, 2)  # [12 v h w 3]
    shards = [open_shard(tmp_path / f"data-00{part}.json") for part in range(2)]
    for shard, rows in zip(shards, (frames[:5], frames[5:]), strict=True):
        assert shard.frames.shape == (6, 5, SIZE, SIZE, 3)
        assert shard.shots == ["image"] * 3 + ["image2"] * 3
        for number, clip in enumerate(shard.frames):
            view = number // 3
            starts = [rows[start : start + 5, view] for start in range(len(rows) - 4)]
            assert any(np.array_equal(clip, known) for known in starts)  # too short for every second state
    texts = {text for shard in shards for text in shard.instructions}
    assert {text for text in texts if text} == {*cut_instructions(**order)}
    before = (tmp_path / "data-001.npy").read_bytes()
    (tmp_path / "data-001.json").unlink()
    assert cut_clips(tmp_path, processes=2, **order)
    assert (tmp_path / "data-001.npy").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no frames of 48 pixels .*vega-render .* frame_size=48"):
        cut_clips(tmp_path / "other", processes=1, **(order | {"frame_size": 48}))
    with pytest.raises(ValueError, match="expected fewest and most control steps; got \\[3, 2\\]"):
        cut_clips(tmp_path / "other", processes=1, **(order | {"every": [3, 2]}))


@pytest.mark.parametrize("cached", [["frames"], ["frames", "prior"]])
def test_a_dataset_without_videos_trains(rendered, tmp_path, cached):
    data = DatasetConfig(**rendered, cache="ram", cached=cached)
    run = tmp_path / "run"
    config = TrainConfig(policy=tiny_policy(), dataset=data, output_dir=str(run), steps=1, batch_size=4)
    assert (train(config) / "pretrained_model" / "model.safetensors").is_file()


def test_a_stride_renders_what_training_with_it_observes(lift, tmp_path):
    """Episodes of 5 and 7 states."""
    file, root, cache = lift[0], tmp_path / "data", tmp_path / "cache"
    values = {"root": root, "repo_id": "vega/lift", "cache_root": cache, "frame_size": SIZE, "processes": 1}
    render_states([file], rendering="fast", frame_stride=2, **values)
    key = {"repo_id": "vega/lift", **fingerprint_frames(root)}
    frames = open_stream(cache, frames_stream(key, CAMERAS, SIZE, stride=2), 7, None).numpy()
    assert np.mean(frames != lift[1][[0, 2, 4, 5, 7, 9, 11]]) < 1e-3
    fields = {"repo_id": "vega/lift", "root": str(root), "cache_root": str(cache), "cache": "ram"}
    for cached in (["frames"], ["semantic", "prior"]):
        data = DatasetConfig(**fields, cached=cached, frame_stride=2)
        run = {"output_dir": str(tmp_path / cached[0]), "steps": 1, "batch_size": 4}
        assert train(TrainConfig(policy=tiny_policy(), dataset=data, **run)).is_dir()
    data = DatasetConfig(**fields, frame_stride=3)
    with pytest.raises(DatasetError, match=r"holds no frames of it.*frame_size=32 frame_stride=3"):
        train(TrainConfig(policy=tiny_policy(), dataset=data, output_dir=str(tmp_path / "run"), steps=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "none"}, "dataset.cache=none reads videos, but .* has none"),
        (
            {"cache_root": "elsewhere"},
            "holds no frames of it as vega/lift with 32 pixels. Render them: vega-render",
        ),
        ({"repo_id": "vega/other"}, "holds no frames of it as vega/other"),
    ],
)
def test_training_without_frames_is_refused(rendered, tmp_path, change, message):
    data = DatasetConfig(**rendered | {"cache": "ram", "cached": ["frames"]} | change)
    config = TrainConfig(policy=tiny_policy(), dataset=data, output_dir=str(tmp_path / "run"), steps=1)
    with pytest.raises(DatasetError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": None}, "add root=FOLDER repo_id=ORG/NAME"),
        ({"repo_id": None}, "add root=FOLDER repo_id=ORG/NAME"),
        ({"tasks": [7]}, "hold none of the tasks"),
        ({"rendering": "full"}, "holds something else than .* rendering=full .*, got .* rendering=fast "),
        ({"episodes_per_task": 1}, "holds something else than these states"),
        ({"processes": 0, "repo_id": "vega/lift", "cache_root": "new"}, "at least 1 process"),
        ({"reuse": ["nothing"]}, "reuse: expected a dataset of frame_size=32 rendering=fast frame_stride=1"),
        ({"frame_stride": 0}, "frame_stride must be at least 1; got 0"),
        ({"frame_stride": 2}, "holds something else than these states"),
    ],
)
def test_what_cannot_be_rendered_is_refused(lift, rendered, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    values = rendered | {"frame_size": SIZE, "rendering": "fast", "processes": 1} | change
    with pytest.raises(ValueError, match=message):
        render_states([lift[0]], **values)


def test_a_folder_of_states_is_answered_with_the_pattern_of_its_files(lift, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vega-render", str(lift[0].parent)])
    with pytest.raises(SystemExit, match=r"name the files of that folder: .*/\*\.safetensors"):
        render_command.main()
