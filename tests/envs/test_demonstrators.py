"""The demonstrators on the live simulator: they succeed, and their actions are what they say."""

from itertools import islice
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

import envs
from envs import demos as demonstrators
from envs.demos import DemonstrationOptions, demonstrate, planner_arm
from envs.demos import planner_grasping as grasping
from envs.demos.collect import (
    TaskSuccess,
    code_version,
    load_results,
    measure_success,
    measure_task,
    merge_result,
    save_results,
    success_table,
)
from envs.demos.planner_arm import (
    CLOSED,
    OPEN,
    PASSING,
    Arm,
    Reach,
    UnreachableStartError,
    down,
    start_after_a_miss,
    widen_start,
)
from envs.demos.planner_grasping import NEAREST, Workcell, away_from_base, plan_grasp
from envs.demos.shards import Demonstrator, record


@pytest.fixture
def lift_wide(robosuite_env):
    return robosuite_env("lift_wide")


def rollout(env, seed, **kwargs):
    """Roll out one demonstration; returns the actions [t 2 7] and whether the last step was a success."""
    env.reset_blindly(seed=seed)
    actions, success = [], False
    for executed, clean in demonstrate(env, rng=np.random.default_rng(seed), **kwargs):
        actions.append((executed, clean))
        success, _ = env.step_blindly(executed)
    return np.array(actions), success


@pytest.mark.parametrize("seed", range(3))
def test_lift_wide_succeeds_in_about_two_seconds_and_is_still_lifted_at_the_end(lift_wide, seed):
    actions, success = rollout(lift_wide, seed)
    assert success
    assert 30 <= len(actions) <= 60


@pytest.mark.parametrize("suite", ["lift", "stack", "pick_place_can", "nut_assembly_square"])
def test_every_robosuite_task_is_demonstrated_within_its_horizon(robosuite_env, suite):
    env = robosuite_env(suite)
    actions, success = rollout(env, 0)
    assert success
    assert len(actions) < env.task.horizon


def test_without_noise_the_executed_action_is_the_clean_one(lift_wide):
    actions, _ = rollout(lift_wide, 0)
    np.testing.assert_array_equal(actions[:, 0], actions[:, 1])
    assert actions.dtype == np.float32


def test_noise_moves_the_executed_action_only_and_never_the_gripper(lift_wide):
    lift_wide.reset_blindly(seed=0)
    plain, _ = next(iter(demonstrate(lift_wide, rng=np.random.default_rng(0))))
    executed, clean = next(iter(demonstrate(lift_wide, rng=np.random.default_rng(0), noise=0.35)))
    np.testing.assert_array_equal(clean, plain)
    assert np.count_nonzero(executed[:6] - clean[:6]) >= 3  # the limit may swallow the noise of the others
    assert executed[6] == clean[6]


def test_noisy_demonstrations_recover_and_stay_within_the_action_limits(lift_wide):
    for seed in range(3):
        actions, success = rollout(lift_wide, seed, noise=0.35)
        assert success
        assert np.abs(actions).max() <= 1.0


def test_the_same_seed_gives_the_same_demonstration_rendered_or_not(lift_wide):
    first, _ = rollout(lift_wide, 3, noise=0.2)
    lift_wide.reset_blindly(seed=3)
    second = []
    for pair in demonstrate(lift_wide, rng=np.random.default_rng(3), noise=0.2):
        second.append(pair)
        lift_wide.step_blindly(pair[0])
        lift_wide.observe()
    np.testing.assert_array_equal(first, np.array(second))


def test_without_follow_through_the_recording_ends_at_the_first_success(lift_wide):
    full, _ = rollout(lift_wide, 0)
    short, success = rollout(lift_wide, 0, options=DemonstrationOptions(follow_through=False))
    assert success
    assert len(short) < len(full)
    np.testing.assert_array_equal(short, full[: len(short)])


def test_a_widened_start_moves_the_hand_by_the_drawn_shift_and_nothing_else(lift_wide):
    lift_wide.reset_blindly(seed=0)
    raw = lift_wide.raw
    arm, cube = Arm(raw.sim), Workcell.of(raw).scene.position("cube_main")
    before, turned = arm.position, arm.rotation
    expected = np.random.default_rng(1).uniform([-0.1, -0.1, 0.0], [0.1, 0.1, 0.1])
    widen_start(raw, np.array([0.1, 0.1, 0.1]), np.random.default_rng(1))
    np.testing.assert_allclose(arm.position - before, expected, atol=1e-3)
    np.testing.assert_allclose(arm.rotation, turned, atol=1e-2)
    np.testing.assert_array_equal(Workcell.of(raw).scene.position("cube_main"), cube)


def test_a_demonstration_from_a_widened_start_succeeds(lift_wide):
    options = DemonstrationOptions(start_spread=(0.08, 0.08, 0.08))
    assert all(rollout(lift_wide, seed, options=options)[1] for seed in range(3))


def test_a_start_after_a_miss_is_an_empty_closed_hand_above_the_cube_and_the_grasp_is_tried_again(lift_wide):
    options = DemonstrationOptions(missed_fraction=1.0)
    for seed in range(3):
        recording = record(lift_wide, seed, Demonstrator(options=options))
        assert recording is not None
        lift_wide.restore(recording.states[0])
        raw = lift_wide.raw
        above = Arm(raw.sim).position - Workcell.of(raw).scene.position("cube_main")
        assert np.all((above > [-0.042, -0.042, 0.038]) & (above < [0.042, 0.042, 0.142]))
        assert Workcell.of(raw).clearance.touched(Arm(raw.sim).position, Arm(raw.sim).rotation) == set()
        fingers = raw.sim.data.qpos[raw.robots[0]._ref_gripper_joint_pos_indexes]
        np.testing.assert_allclose(fingers, [0.001, -0.001])
        assert recording.actions[0, -1] == OPEN
        assert recording.actions[-1, -1] == CLOSED


def test_the_given_fraction_of_the_episodes_begins_after_a_miss(lift_wide, monkeypatch):
    missed = []
    monkeypatch.setattr(demonstrators, "start_after_a_miss", lambda *_: missed.append(True))
    for seed in range(100):
        rng, options = np.random.default_rng(seed), DemonstrationOptions(missed_fraction=0.3)
        next(demonstrate(lift_wide, rng=rng, options=options))
    assert 20 <= len(missed) <= 40


@pytest.mark.parametrize(("share", "draws"), [(0.0, 0), (1e-9, 1)])
def test_a_fraction_of_zero_draws_nothing_so_that_older_recordings_stay_as_they_are(lift_wide, share, draws):
    rng = MagicMock(wraps=np.random.default_rng(0))
    lift_wide.reset_blindly(seed=0)
    next(demonstrate(lift_wide, rng=rng, options=DemonstrationOptions(missed_fraction=share)))
    assert rng.random.call_count == draws


def test_a_start_that_the_arm_does_not_reach_is_a_failed_demonstration(lift_wide, monkeypatch):
    monkeypatch.setattr(planner_arm, "START_ITERATIONS", 1)
    with pytest.raises(UnreachableStartError, match=r"no nearer than 0\.\d+ m"):
        start_after_a_miss(lift_wide.raw, np.array([0.1, 0.1, 0.83]), np.random.default_rng(0))
    assert record(lift_wide, 0, Demonstrator(options=DemonstrationOptions(missed_fraction=1.0))) is None


def test_the_arm_servo_reaches_a_pose_and_its_yaw(lift_wide):
    lift_wide.reset_blindly(seed=0)
    cell = Workcell.of(lift_wide.raw)
    goal = cell.arm.position + np.array([0.05, -0.05, 0.03])
    for command in cell.arm.move(goal, down(0.4), OPEN, Reach(0.004, 0.03)):
        lift_wide.step_blindly(command.action)
        cell.scene.refresh()
    np.testing.assert_allclose(cell.arm.position, goal, atol=4e-3)
    assert cell.arm.yaw == pytest.approx(0.4, abs=0.03)


def test_the_arm_touches_nothing_where_it_is_and_the_table_where_its_palm_would_be_in_it(lift_wide):
    lift_wide.reset_blindly(seed=0)
    cell = Workcell.of(lift_wide.raw)
    before = lift_wide.simulator_state()
    assert cell.clearance.touched(cell.arm.position, cell.arm.rotation) == set()
    sunken = cell.arm.position
    sunken[2] = cell.scene.top("table") - 0.06
    assert "table" in cell.clearance.touched(sunken, down(0.0))
    np.testing.assert_array_equal(lift_wide.simulator_state(), before)


def test_a_blocked_grasp_is_replaced_by_the_next_best_and_if_all_are_blocked_by_the_cheapest(lift_wide):
    lift_wide.reset_blindly(seed=0)
    scene = Workcell.of(lift_wide.raw).scene
    cheapest = plan_grasp(scene, "cube_main")
    other = plan_grasp(scene, "cube_main", is_blocked=lambda planned: abs(planned.yaw - cheapest.yaw) < 0.1)
    assert abs(other.yaw - cheapest.yaw) >= 0.1
    assert plan_grasp(scene, "cube_main", is_blocked=lambda planned: True).yaw == cheapest.yaw


def test_where_no_grasp_fits_the_demonstration_ends_without_an_error(lift_wide, monkeypatch):
    def lost(cell):
        yield from islice(cell.arm.hold(cell.arm.position, down(0.0), OPEN, 3), 3)
        raise grasping.NoGraspError("no centre grasp of 'cube_main'")

    monkeypatch.setattr(demonstrators, "_program", lambda env: lost)
    actions, success = rollout(lift_wide, 3)
    assert (len(actions), success) == (3, False)
    lift_wide.reset_blindly(seed=0)
    monkeypatch.setattr(grasping, "centre_grasps", lambda *_: [])
    monkeypatch.setattr(grasping, "handle_grasps", lambda *_: [])
    monkeypatch.setattr(grasping, "rim_grasps", lambda *_: [])
    with pytest.raises(grasping.NoGraspError, match="no possible grasp of 'cube_main'"):
        plan_grasp(Workcell.of(lift_wide.raw).scene, "cube_main")


@pytest.mark.parametrize("retries", [True, False])
def test_without_retries_a_demonstration_ends_with_its_first_failed_attempt(lift_wide, monkeypatch, retries):
    def fails(cell):
        for _ in cell.attempts(3):
            yield from cell.arm.hold(cell.arm.position, down(0.0), OPEN, 2)

    monkeypatch.setattr(demonstrators, "_program", lambda env: fails)
    actions, success = rollout(lift_wide, 3, options=DemonstrationOptions(retries=retries))
    assert (len(actions), success) == (6 if retries else 2, False)


def test_a_grasp_that_lifts_nothing_is_tried_again_or_given_up(robosuite_env):
    env = robosuite_env("stack")
    env.reset_blindly(seed=0)  # and never stepped: nothing is lifted
    assert list(grasping.grasp(Workcell.of(env.raw), "cubeA_main", tries=2))
    with pytest.raises(grasping.FailedAttemptError):
        list(grasping.grasp(Workcell.of(env.raw, retries=False), "cubeA_main", tries=2))


def test_the_distance_kept_from_a_goal_falls_with_the_error(lift_wide):
    lift_wide.reset_blindly(seed=0)
    arm = Arm(lift_wide.raw.sim)

    axis, across = arm.rotation[:, 2], arm.rotation[:, 0]

    def forward(aside: float) -> float:
        goal = arm.position + 0.03 * axis + aside * across
        return next(arm.approach(goal, arm.rotation, OPEN, PASSING)).action[:3] @ axis

    speeds = [forward(aside) for aside in (0.0, 0.006, 0.010, 0.013, 0.03)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 0.9
    assert speeds[-1] == pytest.approx(0.0, abs=0.05)


def test_a_hand_near_the_base_rises_farther_out_and_any_other_where_it_is(lift_wide):
    cell = Workcell.of(lift_wide.raw)
    base = cell.scene.position("robot0_base")
    near, far = base + np.array([0.18, 0.24, 0.1]), base + np.array([0.5, 0.2, 0.1])
    np.testing.assert_allclose(away_from_base(cell, near) - base, [0.6 * NEAREST, 0.8 * NEAREST, 0.1])
    assert away_from_base(cell, far) is far


def test_an_unknown_task_is_refused_with_the_known_ones(lift_wide):
    stranger = SimpleNamespace(raw=lift_wide.raw, task=SimpleNamespace(name="juggle", suite="circus"))
    with pytest.raises(ValueError, match=r"juggle.*lift_wide"):
        next(iter(demonstrate(stranger, rng=np.random.default_rng(0))))


def test_an_unknown_body_is_refused_with_the_known_ones(lift_wide):
    with pytest.raises(KeyError, match="cube_main"):
        Workcell.of(lift_wide.raw).scene.cloud("teapot")


def test_a_start_spread_beyond_the_arm_is_refused():
    with pytest.raises(ValueError, match="start_spread"):
        DemonstrationOptions(start_spread=(0.5, 0.0, 0.0))
    for wrong in (1.5, True, "often"):
        with pytest.raises(ValueError, match=f"missed_fraction: expected a number in .0, 1., got {wrong!r}"):
            DemonstrationOptions(missed_fraction=wrong)


def test_a_demonstration_is_lazy_and_can_be_left_early(lift_wide):
    lift_wide.reset_blindly(seed=0)
    assert len(list(islice(demonstrate(lift_wide, rng=np.random.default_rng(0)), 3))) == 3


def test_a_detour_is_refused_where_the_demonstrator_supports_none(robosuite_env):
    env = robosuite_env("stack")
    env.reset_blindly(seed=0)
    options = DemonstrationOptions(detour=(0.02, 0.2))
    for refused in (options, DemonstrationOptions(missed_fraction=0.3)):
        with pytest.raises(
            ValueError, match=r"'stack' supports neither detour nor missed_fraction.*set them to"
        ):
            next(demonstrate(env, rng=np.random.default_rng(0), options=refused))


def test_a_task_is_measured_on_fresh_resets_or_official_states():
    (task,) = envs.tasks("lift")
    result = measure_task(task, range(2), official=False)
    assert result.successes == 2
    assert len(set(result.lengths)) == 2


def test_the_table_counts_by_task_and_failures_have_no_length():
    one, two = envs.tasks("robosuite")[:2]
    table = success_table([TaskSuccess(two, False, (50, 0)), TaskSuccess(one, False, (40, 60))])
    assert "| robosuite | fresh | 3/4 (75.0%) | 2 1 | 50 |" in table


def test_more_official_states_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"\['lift'\] have fewer than 1 official initial states"):
        list(measure_success(["lift"], episodes=1, official=True, processes=1))


def test_stored_results_come_back_and_known_episodes_are_not_repeated(tmp_path):
    (task,) = envs.tasks("lift")
    path = tmp_path / "table.json"
    assert load_results(path) == []
    save_results(path, [TaskSuccess(task, False, (7, 0))])
    (result,) = measure_success(
        ["lift"], episodes=2, official=False, processes=1, known=load_results(path)
    )  # no demonstrator lifts in 7 steps
    assert result.lengths == (7, 0)


@pytest.mark.slow
def test_a_resumed_measurement_equals_an_uninterrupted_one():
    arguments = {"official": False, "processes": 1}
    first = list(measure_success(["lift"], episodes=1, **arguments))
    (longer,) = measure_success(["lift"], episodes=2, known=first, **arguments)
    (whole,) = measure_success(["lift"], episodes=2, **arguments)
    assert longer == whole


def test_a_new_result_replaces_only_that_of_its_task_and_start():
    one, two = envs.tasks("robosuite")[:2]
    known = [TaskSuccess(one, False, (1,)), TaskSuccess(one, True, (2,)), TaskSuccess(two, False, (3,))]
    grown = TaskSuccess(one, False, (1, 4))
    assert merge_result(known, grown) == [known[1], known[2], grown]


def test_results_of_other_code_are_not_mixed_into_a_table(tmp_path):
    path = tmp_path / "table.json"
    save_results(path, [TaskSuccess(envs.tasks("lift")[0], False, (7,))])
    path.write_text(path.read_text().replace(code_version(), "0123456789ab"))
    with pytest.raises(ValueError, match=r"other code: 0123456789ab, now [0-9a-f]{12}; one table"):
        load_results(path)


def test_a_file_of_something_else_is_no_results(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="holds no results"):
        load_results(path)
