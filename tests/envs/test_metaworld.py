"""Meta-World: its suites, what an episode depends on, its own demonstrators, and LeRobot's view of it."""

import numpy as np
import pytest

import envs
from envs.demos import DemonstrationOptions, demonstrate
from envs.demos.shards import Demonstrator, dataset_features, record
from envs.metaworld import MT10

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (8, 4))
SIZE = 64


@pytest.fixture(scope="module")
def push():
    made = envs.make("metaworld_mt10", MT10.index("push-v3"), frame_size=SIZE, rendering="fast")
    yield made
    made.close()


def trajectory(env, seed, watched=False):
    env.reset_blindly(seed=seed)
    states = [env.simulator_state()]
    for action in ACTIONS:
        env.step_blindly(action)
        if watched:
            env.observe()
        states.append(env.simulator_state())
    return np.stack(states)


def test_fifty_tasks_fall_into_four_groups_and_ten_of_them_are_mt10():
    mt50 = envs.tasks("metaworld_mt50")
    sizes = {
        group: len(envs.tasks(f"metaworld_{group}")) for group in ("easy", "medium", "hard", "very_hard")
    }
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    for group, size in sizes.items():
        assert sum(task.group == group for task in mt50) == size
    assert [task.name for task in envs.tasks("metaworld_mt10")] == list(MT10)
    assert {task.name for task in mt50} >= set(MT10)
    assert {task.horizon for task in mt50} == {500}


def test_mt10_is_the_packages_own(push):
    from metaworld.env_dict import MT10_V3

    assert list(MT10_V3) == list(MT10)


def test_an_episode_depends_on_its_seed_alone_and_not_on_being_watched(push):
    first = trajectory(push, 3)
    assert not np.array_equal(first[0], trajectory(push, 4)[0])
    assert np.array_equal(first, trajectory(push, 3, watched=True))
    fresh = envs.make("metaworld_mt10", push.task.index, render=False)
    assert np.array_equal(first, trajectory(fresh, 3))
    fresh.close()


def test_a_restored_state_goes_on_to_the_same_bits(push):
    expected = trajectory(push, 3)
    push.reset_blindly(seed=3)
    push.restore(expected[4])
    for action, following in zip(ACTIONS[4:], expected[5:], strict=True):
        push.step_blindly(action)
        assert np.array_equal(push.simulator_state(), following)
    with pytest.raises(ValueError, match=r"a state of push-v3 has \d+ values, got shape \(2,\)"):
        push.restore(np.zeros(2))


def test_the_state_is_hand_and_gripper_and_knows_no_object(push):
    push.reset_blindly(seed=0)
    state = push.observe()["agent_pos"]
    np.testing.assert_allclose(state[:3], push.raw.get_endeff_pos(), atol=1e-6)
    push.raw._set_obj_xyz(np.array([0.1, 0.8, 0.02]))
    assert np.array_equal(push.observe()["agent_pos"], state)
    for effort, opening in ((1.0, 0.45), (-1.0, 0.95)):
        for _ in range(15):
            push.step_blindly(np.array([0, 0, 0, effort]))
        assert (push.observe()["agent_pos"][3] < opening) == (effort > 0)


def test_the_hand_goes_up_in_the_image_when_it_goes_up_in_the_world(push):
    push.reset_blindly(seed=0)
    rows = []
    for up in (1.0, -1.0):
        before = push.observe()["pixels"]["image"].astype(int)
        for _ in range(30):
            push.step_blindly(np.array([0, 0, up, -1.0]))
        after = push.observe()["pixels"]["image"].astype(int)
        model, data = push.raw.model, push.raw.data
        camera = model.camera("corner2").id
        _, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (push.raw.get_endeff_pos() - data.cam_xpos[camera])
        rows.append(SIZE / 2 + SIZE / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2) * y / -z)
        changed = np.nonzero(np.abs(after - before).sum(axis=-1) > 60)[0]
        assert changed.min() - 4 <= rows[-1] <= changed.max() + 4
    assert rows[0] < rows[1] - 3


def test_packaged_demonstrators_are_clipped_and_end_when_the_task_stays_done(push):
    recording = record(push, 0, Demonstrator())
    assert recording is not None
    assert np.abs(recording.actions).max() <= 1.0
    assert recording.actions.shape[1] == 4
    short = record(push, 0, Demonstrator(options=DemonstrationOptions(follow_through=False)))
    assert len(short.actions) == len(recording.actions) - 2
    names = {"observation.image", "observation.state", "action", "executed_action"}
    assert set(dataset_features(push)) == names


def test_options_that_the_packaged_demonstrators_do_not_have_are_refused(push):
    push.reset_blindly(seed=0)
    for options in (DemonstrationOptions(detour=(0.02, 0.1)), DemonstrationOptions(missed_fraction=0.2)):
        with pytest.raises(ValueError, match="support no detour"):
            next(demonstrate(push, rng=np.random.default_rng(0), options=options))


def test_there_are_no_official_states(push):
    with pytest.raises(ValueError, match="push-v3 has no official initial states"):
        push.reset(seed=0, options={"initial_state": 0})


@pytest.mark.slow
def test_images_are_those_of_lerobots_own_environment():
    from lerobot.envs.metaworld import MetaworldEnv

    theirs = MetaworldEnv("push-v3", obs_type="pixels_agent_pos", observation_width=480)
    expected, _ = theirs.reset(seed=5)
    ours = envs.make("metaworld_mt10", MT10.index("push-v3"), frame_size=480)
    observation, _ = ours.reset(seed=5)
    error = np.abs(observation["pixels"]["image"].astype(int) - expected["pixels"])
    np.testing.assert_allclose(observation["agent_pos"], expected["agent_pos"], atol=1e-6)
    assert error.mean() < 0.5
    assert (error > 10).mean() < 0.01
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_collected_demonstrations_are_a_dataset_of_lerobot_in_its_own_names(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from envs.demos.collect import CollectionSettings, collect

    settings = CollectionSettings("metaworld_mt10", tasks=(1, 9), episodes_per_task=1, frame_size=32)
    collect(settings, tmp_path / "mt", processes=1)
    dataset = LeRobotDataset("vega/mt", root=tmp_path / "mt", video_backend="pyav")
    assert (dataset.num_episodes, dataset.fps, dataset.meta.robot_type) == (2, 80, "sawyer")
    item = dataset[0]
    assert item["observation.image"].shape == (3, 32, 32)
    assert (len(item["observation.state"]), len(item["action"])) == (4, 4)
    assert item["task"] == "Push the puck to a goal"
