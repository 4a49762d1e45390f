"""LIBERO's demonstrator: the geometry behind its placing, and whole tasks on the live simulator."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

import envs
from envs.base import EVALUATION_SEED
from envs.demos import DemonstrationOptions, demonstrate
from envs.demos.planner_arm import Arm, about_z, leaning, pointing
from envs.demos.planner_fixtures import (
    INSIDE,
    LEAN,
    WIDENED,
    Drawer,
    Region,
    facing_handle,
    open_side,
    resting_place,
    widen_drawer,
)
from envs.demos.planner_grasping import Workcell, box_surface, cylinder_surface, find_rim
from envs.demos.shards import Demonstrator, record
from envs.demos.tasks import achieve_goals, clearance, fitting_turn, open_fingers, shared_spot


@pytest.mark.parametrize("heading", [(0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)])
def test_a_leaning_hand_points_half_way_to_its_heading_and_closes_level(heading):
    rotation = leaning(np.array(heading), np.pi / 4)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], (np.array(heading) - [0, 0, 1]) / np.sqrt(2), atol=1e-12)
    assert rotation[2, 0] == 0.0


def test_a_hand_that_points_down_and_closes_along_y_is_the_rest_pose():
    rotation = pointing(np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(rotation, [[0, 1, 0], [1, 0, 0], [0, 0, -1]])


def test_a_book_is_turned_by_just_the_angle_that_fits_it_into_its_slot():
    book = box_surface(np.array([0.055, 0.014, 0.067]))[:, :2] @ about_z(np.deg2rad(40))[:2, :2].T
    turn = fitting_turn(book, np.array([0.056, 0.124]), yaw=0.0)
    assert np.rad2deg(turn) == pytest.approx(50, abs=10)
    assert np.all(np.ptp(book @ about_z(turn)[:2, :2].T, axis=0) <= [0.056, 0.124])


def test_what_fits_already_is_not_turned():
    cube = box_surface(np.array([0.02, 0.02, 0.02]))[:, :2]
    assert fitting_turn(cube, np.array([0.1, 0.1]), yaw=0.3) == 0.0


def test_clearance_is_the_smallest_distance_and_infinite_from_nothing():
    assert clearance(np.zeros((1, 2)), np.array([[0.3, 0.4], [3.0, 4.0]])) == pytest.approx(0.5)
    assert clearance(np.zeros((1, 2)), np.zeros((0, 2))) == np.inf


def test_the_second_pot_on_a_stove_leaves_room_for_fingers_beside_the_first():
    half, base = np.array([0.075, 0.075]), np.array([-0.6, 0.0])
    pot = np.concatenate([box_surface(np.array([0.04, 0.04, 0.06]))[:, :2], open_fingers(0.0)])
    first = shared_spot(pot, np.zeros((0, 2)), np.zeros(2), half, base)
    standing = box_surface(np.array([0.04, 0.04, 0.06]))[:, :2] + first
    second = shared_spot(pot, standing, np.zeros(2), half, base)
    assert np.all(np.abs([first, second]) < half)
    assert clearance(pot + second, standing) > 0.0


def test_a_shared_spot_far_from_the_robot_is_on_the_near_side():
    half, pot = np.array([0.075, 0.075]), box_surface(np.array([0.04, 0.04, 0.06]))[:, :2]
    spot = shared_spot(pot, np.zeros((0, 2)), np.zeros(2), half, np.array([-0.9, 0.0]))
    assert spot[0] < 0.0


def microwave():
    """Walls, floor and roof of a box that is open towards -y, its right wall thicker than the left."""
    walls = {
        (0.02, 0.12, 0.09): (-0.16, 0.0, 0.0),
        (0.06, 0.12, 0.09): (0.12, 0.0, 0.0),
        (0.16, 0.02, 0.09): (0.0, 0.11, 0.0),
        (0.16, 0.12, 0.01): (0.0, 0.0, 0.08),
        (0.161, 0.12, 0.01): (0.0, 0.0, -0.08),
    }
    return np.concatenate([box_surface(np.array(half)) + centre for half, centre in walls.items()])


def test_the_open_side_of_a_microwave_is_where_it_has_no_wall():
    chamber = Region(np.zeros(3), np.array([0.12, 0.08, 0.08]))
    np.testing.assert_array_equal(open_side(microwave(), chamber), [0.0, -1.0, 0.0])


def test_a_mug_rests_on_the_floor_between_the_walls_just_inside_the_region():
    chamber = Region(np.zeros(3), np.array([0.12, 0.08, 0.08]))
    place = resting_place(microwave(), chamber, np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(place, [(-0.14 + 0.06) / 2, -0.08 + INSIDE, -0.07], atol=1e-9)


def mug(turn):
    """A mug of 10 cm with a handle that ends 7.5 cm from its middle, towards -y turned by `turn` rad."""
    handle = box_surface(np.array([0.009, 0.015, 0.03])) - np.array([0.0, 0.06, 0.0])
    return np.concatenate([cylinder_surface(0.05, 0.05), handle @ about_z(turn).T])


@pytest.mark.parametrize("turn", [0.0, 0.2, -0.2])
def test_a_leaning_hand_grips_the_handle_that_points_at_it(turn):
    cloud, hand = mug(turn), leaning(np.array([0.0, 1.0, 0.0]), LEAN)
    grip = facing_handle(cloud, find_rim(cloud, np.eye(3), np.zeros(3)), hand)
    assert grip is not None
    around = cloud[np.linalg.norm(cloud - grip, axis=1) < 0.02]
    assert np.ptp(np.sign(around[:, 0] - grip[0])) == 2.0  # something to pinch from both sides
    np.testing.assert_allclose(grip[1:], [-0.063, 0.01], atol=0.01)


@pytest.mark.parametrize("turn", [np.pi / 2, np.pi])
def test_a_handle_that_points_elsewhere_is_left_alone(turn):
    cloud, hand = mug(turn), leaning(np.array([0.0, 1.0, 0.0]), LEAN)
    assert facing_handle(cloud, find_rim(cloud, np.eye(3), np.zeros(3)), hand) is None


def test_a_goal_without_a_skill_is_refused_with_the_known_ones():
    raw = SimpleNamespace(parsed_problem={"goal_state": [["stack", "bowl_1", "bowl_2"]]})
    with pytest.raises(ValueError, match=r"stack.*turnon"):
        next(achieve_goals(SimpleNamespace(env=raw)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [
        ("libero_goal_swap", 5),  # a stove and a bowl leave no room for a plate that is drawn
        ("libero_10_swap", 0),  # a can stands so near that the elbow cannot fold far enough to lift it
        ("libero_10_swap", 5),  # the caddy's compartment is deeper than its region
    ],
)
def test_a_task_that_needs_a_way_around_is_demonstrated_from_an_official_state(suite, task):
    env = envs.make(suite, task, render=False)
    assert record(env, EVALUATION_SEED, Demonstrator(), initial_state=0) is not None
    env.close()


@pytest.mark.slow
def test_a_bottom_drawer_that_stands_half_open_is_drawn_out_as_far_as_it_goes():
    env = envs.make("libero_10", 3, render=False)
    env.reset_blindly(seed=0)
    cell = Workcell.of(env.raw)
    drawer = Drawer(cell, "white_cabinet_1_bottom_region")
    assert drawer.opening < 0.15
    for command in widen_drawer(cell, "white_cabinet_1_bottom_region"):
        env.step_blindly(command.action.astype(np.float32))
        cell.scene.refresh()
    assert drawer.opening > WIDENED
    env.close()


@pytest.mark.slow
def test_a_pudding_goes_beside_the_plate_and_not_onto_its_edge():
    env = envs.make("libero_10", 6, render=False)  # the middle of the pudding's region is too near the plate
    once = Demonstrator(noise=0.2, options=DemonstrationOptions(retries=False))
    for seed in (0, 1000):
        recording = record(env, seed, once)
        assert recording is not None
        env.restore(recording.states[-1])
        assert abs(np.rad2deg(Arm(env.raw.sim).yaw)) == pytest.approx(90.0, abs=6.0)  # one way to let it go
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [("libero_spatial", 0), ("libero_goal", 0), ("libero_goal", 5), ("libero_10", 8), ("libero_10", 9)],
)
def test_a_libero_task_is_demonstrated_from_a_freshly_drawn_reset(suite, task):
    from libero.libero import benchmark
    from libero.libero.envs.env_wrapper import ControlEnv

    suite_tasks = benchmark.get_benchmark_dict()[suite]()
    wrapper = ControlEnv(
        bddl_file_name=suite_tasks.get_task_bddl_file_path(task),
        has_offscreen_renderer=False,
        use_camera_obs=False,
        ignore_done=True,
    )
    np.random.seed(1)
    random.seed(1)
    wrapper.reset()
    for _ in range(10):
        wrapper.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    env = SimpleNamespace(
        raw=wrapper.env, task=SimpleNamespace(suite=suite, name=suite_tasks.get_task(task).name)
    )
    for executed, _ in demonstrate(env, rng=np.random.default_rng(0)):
        assert np.abs(executed).max() <= 1.0
        wrapper.step(executed)
    assert wrapper.check_success()
    wrapper.close()
