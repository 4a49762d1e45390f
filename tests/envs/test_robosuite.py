"""robosuite's tasks as environments: determinism, success, what is observed, and what is refused."""

import random

import mujoco
import numpy as np
import pytest

import envs
from envs.base import global_seed
from envs.robosuite import axis_angle, load_robosuite

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 7))


@pytest.fixture
def lift(robosuite_env):
    return robosuite_env("lift_wide")


def trajectory(env, seed, observed=False, actions=ACTIONS):
    env.reset_blindly(seed=seed)
    states = [env.simulator_state()]
    for action in actions:
        env.step_blindly(action)
        if observed:
            env.observe()
        states.append(env.simulator_state())
    return np.stack(states)


def test_an_episode_depends_on_its_seed_alone_whatever_was_rolled_out_before(lift):
    first = trajectory(lift, seed=3)
    assert not np.array_equal(first, trajectory(lift, seed=4))
    assert np.array_equal(first, trajectory(lift, seed=3))
    fresh = envs.make("lift_wide", 0, render=False)
    assert np.array_equal(first, trajectory(fresh, seed=3))
    fresh.close()


def test_observing_does_not_change_an_episode(lift):
    assert np.array_equal(trajectory(lift, seed=3), trajectory(lift, seed=3, observed=True))


def test_a_step_is_robosuites_own_step(robosuite_env):
    env = robosuite_env("lift")
    robosuite = load_robosuite()
    with global_seed(0):  # the cube's size is drawn here
        stock = robosuite.make(
            "Lift",
            robots="Panda",
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=20,
            hard_reset=False,
        )
    with global_seed(5):
        stock.reset()
    expected = [stock.sim.get_state().flatten()]
    actions = [*ACTIONS, *[np.array([0, 0, -1, 0, 0, 0, 1.0])] * 24]  # until the hand pushes the table
    for action in actions:
        stock.step(action)
        expected.append(stock.sim.get_state().flatten())
    assert np.array_equal(trajectory(env, seed=5, actions=actions), np.stack(expected))
    assert 0 < stock.sim.data.get_site_xpos("gripper0_grip_site")[2] - 0.8 < 0.03


def test_resetting_leaves_the_callers_random_numbers_alone(lift):
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].copy(), random.getstate()
    lift.reset(seed=7)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1]


def test_resets_without_a_seed_differ(lift):
    lift.reset(seed=7)
    lift.reset()
    one = lift.simulator_state()
    lift.reset()
    assert not np.array_equal(one, lift.simulator_state())


def test_the_cube_starts_anywhere_within_10_cm_with_any_yaw(lift):
    poses = []
    for seed in range(150):
        lift.reset_blindly(seed=seed)
        poses.append(lift.raw.sim.data.get_joint_qpos("cube_joint0").copy())
    poses = np.stack(poses)
    assert np.all(np.abs(poses[:, :2]) <= 0.10)
    assert np.all(np.abs(poses[:, :2]).max(axis=0) > 0.09)
    yaw = 2 * np.arctan2(poses[:, 6], poses[:, 3]) % (2 * np.pi)
    assert np.all(np.histogram(yaw, bins=8, range=(0, 2 * np.pi))[0] > 5)


def test_success_is_the_simulators_own_check(lift):
    lift.reset(seed=0)
    _, reward, terminated, _, info = lift.step(np.zeros(7))
    assert (reward, terminated, info["is_success"]) == (0.0, False, False)
    lift.raw.sim.data.set_joint_qpos("cube_joint0", [0, 0, 0.95, 1, 0, 0, 0])  # in the air above the table
    _, reward, terminated, _, info = lift.step(np.zeros(7))
    assert lift.raw._check_success()
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


def test_an_episode_is_cut_at_the_horizon(lift):
    lift.reset_blindly(seed=0)
    cut = [lift.step_blindly(np.zeros(7))[1] for _ in range(lift.task.horizon)]
    assert cut == [False] * (lift.task.horizon - 1) + [True]


def test_the_state_is_hand_position_axis_angle_and_fingers(lift):
    lift.reset(seed=1)
    for action in ACTIONS:
        state = lift.step(action)[0]["agent_pos"]
    data, robot = lift.raw.sim.data, lift.raw.robots[0]
    assert state.dtype == np.float32
    np.testing.assert_allclose(state[:3], data.site_xpos[robot.eef_site_id], atol=1e-6)
    quaternion, rotation = np.zeros(4), np.zeros(9)
    angle = np.linalg.norm(state[3:6])
    mujoco.mju_axisAngle2Quat(quaternion, state[3:6].astype(float) / angle, angle)
    mujoco.mju_quat2Mat(rotation, quaternion)
    hand = data.body_xmat[lift.raw.sim.model.body_name2id("robot0_right_hand")]
    np.testing.assert_allclose(rotation, hand, atol=1e-5)
    np.testing.assert_allclose(state[6:], data.qpos[robot._ref_gripper_joint_pos_indexes], atol=1e-6)


def test_axis_angle_agrees_with_mujoco_and_is_continuous_through_pi():
    for angle in (0.0, 0.3, 3.1, np.pi, 3.2):
        quaternion = np.zeros(4)
        mujoco.mju_axisAngle2Quat(quaternion, np.array([1.0, 0.0, 0.0]), angle)
        np.testing.assert_allclose(axis_angle(quaternion), [angle, 0, 0], atol=1e-9)


@pytest.mark.parametrize("rendering", ["full", "fast"])
def test_an_object_that_no_camera_sees_changes_no_observation(rendering):
    env = envs.make("lift_wide", 0, frame_size=64, rendering=rendering)
    env.reset(seed=0)
    seen, *unseen = [(0.05, 0.05, 0.85), (0.3, 0.2, -4.0), (-0.5, 3.0, -6.0)]  # the others: under the floor
    observations = []
    for position in (seen, *unseen):
        env.raw.sim.data.set_joint_qpos("cube_joint0", [*position, 1, 0, 0, 0])
        observations.append(env.observe())
    visible, *hidden = observations
    assert not np.array_equal(visible["pixels"]["image"], hidden[0]["pixels"]["image"])
    for camera in ("image", "image2"):
        assert np.array_equal(hidden[0]["pixels"][camera], hidden[1]["pixels"][camera])
    for observation in observations:
        assert np.array_equal(observation["agent_pos"], visible["agent_pos"])
    env.close()


@pytest.mark.parametrize("suite", ["stack", "pick_place_can", "nut_assembly_square"])
def test_every_task_can_be_rolled_out_and_repeated(robosuite_env, suite):
    env = robosuite_env(suite)
    first = trajectory(env, seed=2)
    assert np.array_equal(first, trajectory(env, seed=2))
    assert env.task_description == env.task.instruction != ""
    assert env.observe()["agent_pos"].shape == (8,)


def test_actions_of_another_shape_or_not_finite_are_refused(lift):
    lift.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected 7 finite action values.*\(6,\)"):
        lift.step(np.zeros(6))
    with pytest.raises(ValueError, match="finite"):
        lift.step(np.full(7, np.nan))


def test_actions_outside_their_range_are_clipped(lift):
    states = []
    for scale in (1.0, 5.0):
        lift.reset_blindly(seed=0)
        lift.step_blindly(np.ones(7) * scale)
        states.append(lift.simulator_state())
    assert np.array_equal(*states)


def test_official_initial_states_are_refused_where_there_are_none(lift):
    with pytest.raises(ValueError, match="no official initial states"):
        lift.reset(options={"initial_state": 3})


def test_a_state_of_another_model_is_refused(lift):
    with pytest.raises(ValueError, match=r"a state of lift_wide has 32 values, got shape \(5,\)"):
        lift.restore(np.zeros(5))


def test_the_robosuite_suite_holds_every_task_and_each_is_a_suite_too():
    names = [task.name for task in envs.tasks("robosuite")]
    assert names == ["lift", "lift_wide", "stack", "pick_place_can", "nut_assembly_square"]
    for name in names:
        (task,) = envs.tasks(name)
        assert (task.suite, task.index, task.name) == (name, 0, name)
    assert [task.index for task in envs.tasks("robosuite")] == list(range(5))


def test_an_unknown_suite_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"Unknown suite 'lift_wyde'. Did you mean 'lift_wide'"):
        envs.make("lift_wyde", 0)


def test_an_unknown_task_is_refused_with_the_suites_tasks():
    with pytest.raises(
        ValueError, match=r"suite 'robosuite' has no task 9; its tasks are: 0 lift, 1 lift_wide"
    ):
        envs.make("robosuite", 9)
