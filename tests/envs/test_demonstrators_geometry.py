"""The geometry behind the demonstrators, against closed forms."""

import numpy as np
import pytest

from envs.demos import ROTATION_NOISE, OrnsteinUhlenbeck
from envs.demos.planner_arm import DOWN, about_z, down, nearest_equivalent, rotation_error, wrap
from envs.demos.planner_grasping import (
    GraspRequest,
    box_surface,
    centre_grasps,
    corridor_top,
    cylinder_surface,
    extents,
    find_rim,
    handle_grasps,
    obstruction,
    rim_grasps,
    sphere_surface,
)

NOTHING = np.zeros((0, 3))


@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.3, -2.0, np.pi - 1e-3, np.pi - 1e-7])
def test_the_rotation_error_is_the_turn_in_the_world_from_actual_to_goal(angle):
    np.testing.assert_allclose(rotation_error(about_z(angle) @ DOWN, DOWN), [0, 0, angle], atol=1e-6)


def test_the_rotation_error_of_a_half_turn_about_a_slanted_axis_keeps_axis_and_angle():
    axis = np.array([1.0, 2.0, -2.0]) / 3.0
    vector = rotation_error(2 * np.outer(axis, axis) - np.eye(3), np.eye(3))
    assert np.linalg.norm(vector) == pytest.approx(np.pi)
    assert abs(vector @ axis) == pytest.approx(np.pi)


@pytest.mark.parametrize(("angle", "expected"), [(0.0, 0.0), (np.pi, -np.pi), (3 * np.pi / 2, -np.pi / 2)])
def test_wrapped_angles_lie_in_half_a_turn_to_each_side(angle, expected):
    assert wrap(angle) == pytest.approx(expected)


def test_a_cube_turned_by_80_degrees_is_taken_at_minus_10():
    assert np.rad2deg(nearest_equivalent(np.deg2rad(80), 0.0, np.pi / 2)) == pytest.approx(-10)


def test_a_hand_that_points_down_at_yaw_zero_closes_along_y():
    np.testing.assert_allclose(down(0.0), DOWN)
    np.testing.assert_allclose(down(np.pi / 2)[:, 0], [-1, 0, 0], atol=1e-12)


def test_box_points_lie_on_the_surface_and_leave_no_gap_wider_than_a_finger():
    half = np.array([0.05, 0.02, 0.1])
    points = box_surface(half)
    assert np.all(np.isclose(np.abs(points) / half, 1.0).any(axis=1))
    np.testing.assert_allclose(np.ptp(points, axis=0), 2 * half)
    top = points[np.isclose(points[:, 2], half[2])]
    assert np.diff(np.unique(top[:, 0])).max() <= 0.012 + 1e-9


def test_cylinder_and_sphere_points_lie_at_their_radius():
    mantle = cylinder_surface(0.03, 0.05)
    np.testing.assert_allclose(np.linalg.norm(mantle[:, :2], axis=1), 0.03)
    assert np.ptp(mantle[:, 2]) == pytest.approx(0.1)
    np.testing.assert_allclose(np.linalg.norm(sphere_surface(0.04), axis=1), 0.04)


def planted_box(yaw):
    """A box of 4 x 12 x 5 cm whose thin side points along the closing axis of a hand at this yaw."""
    return shifted(box_surface(np.array([0.06, 0.02, 0.025])) @ about_z(yaw).T, 0.4, -0.1, 0.825)


@pytest.mark.parametrize("degrees", [-60, -15, 0, 45, 75])
def test_the_planner_finds_width_yaw_and_centre_of_a_planted_box(degrees):
    cloud = planted_box(np.deg2rad(degrees))
    best = cheapest(centre_grasps(cloud, NOTHING, GraspRequest()))
    assert np.rad2deg(best.yaw) == pytest.approx(degrees)
    width, _ = extents(cloud[:, :2], np.array([-np.sin(best.yaw), np.cos(best.yaw)]))
    assert width == pytest.approx(0.04)
    np.testing.assert_allclose(best.position, [0.4, -0.1, 0.82], atol=1e-9)


def test_a_box_wider_than_the_hand_has_no_centre_grasp():
    assert not list(centre_grasps(box_surface(np.array([0.05, 0.05, 0.05])), NOTHING, GraspRequest()))


def cheapest(grasps):
    return min(grasps, key=lambda pair: pair[0])[1]


def shifted(points, *by):
    return points + np.array(by)


@pytest.mark.parametrize("degrees", [-95, -90, -85, 85, 90, 95])
def test_boxes_turned_by_about_a_quarter_are_all_grasped_with_the_same_turn(degrees):
    best = cheapest(centre_grasps(planted_box(np.deg2rad(degrees)), NOTHING, GraspRequest()))
    assert np.rad2deg(best.yaw) == pytest.approx(degrees if degrees > 0 else degrees + 180)


@pytest.mark.parametrize("aside", [-0.03, 0.0, 0.03])
def test_bowls_in_front_of_the_robot_are_grasped_on_the_same_side(aside):
    bowl = shifted(cylinder_surface(0.06, 0.03), 0.5, aside, 0.83)
    rim = find_rim(bowl, np.eye(3), np.array([0.5, aside, 0.8]))
    assert cheapest(rim_grasps(rim, 0.8, NOTHING, np.zeros(2), GraspRequest())).offset[1] > 0.03


def pot_with_handle():
    """A pot 7.4 cm wide and 14 cm high on the origin, with a bar 1.2 cm thick as its handle at y = -7 cm."""
    pot = shifted(cylinder_surface(0.037, 0.07), 0.0, 0.0, 0.07)
    return np.concatenate([pot, shifted(box_surface(np.array([0.006, 0.007, 0.04])), 0.0, -0.07, 0.09)])


def test_a_handle_is_grasped_where_nothing_of_the_pot_is_in_the_way():
    for _, grasp in handle_grasps(pot_with_handle(), NOTHING, GraspRequest()):
        assert grasp.position[1] == pytest.approx(-0.07, abs=0.02)
        assert obstruction(pot_with_handle(), grasp.position, grasp.yaw) == 0
    best = cheapest(handle_grasps(pot_with_handle(), NOTHING, GraspRequest()))
    assert np.rad2deg(best.yaw) == pytest.approx(90, abs=10)
    pot = pot_with_handle()
    assert not list(handle_grasps(pot[pot[:, 1] > -0.05], NOTHING, GraspRequest()))


def test_a_neighbour_beside_the_fingers_turns_the_grasp_away():
    cube = box_surface(np.array([0.02, 0.02, 0.02]))
    wall = shifted(box_surface(np.array([0.02, 0.005, 0.03])), 0.0, 0.045, 0.01)
    assert cheapest(centre_grasps(cube, NOTHING, GraspRequest())).yaw == 0.0
    assert abs(cheapest(centre_grasps(cube, wall, GraspRequest())).yaw) == pytest.approx(np.pi / 2)


def test_obstruction_counts_points_in_finger_and_palm_space_only():
    position = np.array([0.0, 0.0, 1.0])
    inside_finger, inside_palm = [0.0, 0.05, 1.0], [0.0, 0.0, 1.05]
    between_fingers, outside = [0.0, 0.0, 1.0], [0.3, 0.0, 1.0]
    points = np.array([inside_finger, between_fingers, outside, inside_palm])
    assert obstruction(points, position, 0.0) == 2
    assert obstruction(points, position, np.pi / 2) == 1


def test_the_rim_of_a_bowl_is_its_upper_edge_and_is_grasped_radially():
    bowl = shifted(cylinder_surface(0.06, 0.03), 0.5, 0.2, 0.83)
    rim = find_rim(bowl, np.eye(3), np.array([0.5, 0.2, 0.8]))
    np.testing.assert_allclose(rim.middle, [0.5, 0.2, 0.86], atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm((rim.points - rim.middle)[:, :2], axis=1), 0.056, atol=1e-9)
    for _, grasp in rim_grasps(rim, 0.8, NOTHING, np.zeros(2), GraspRequest()):
        closing = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)])
        assert abs(closing @ grasp.offset) == pytest.approx(0.056, abs=1e-6)


def test_a_rim_grasp_that_failed_is_not_the_first_choice_again():
    rim = find_rim(
        shifted(cylinder_surface(0.06, 0.03), 0.5, 0.2, 0.83), np.eye(3), np.array([0.5, 0.2, 0.8])
    )
    first = cheapest(rim_grasps(rim, 0.8, NOTHING, np.zeros(2), GraspRequest()))
    request = GraspRequest(avoided=(first.offset,))
    second = cheapest(rim_grasps(rim, 0.8, NOTHING, np.zeros(2), request))
    assert np.linalg.norm(second.offset - first.offset) > 0.022


@pytest.mark.parametrize("bearing", [-20, 0, 20])
def test_a_bowl_is_grasped_on_the_requested_side_wherever_it_stands(bearing):
    side = np.array([-1.0, 0.0])
    x, y = 0.5 * np.cos(np.deg2rad(bearing)), 0.5 * np.sin(np.deg2rad(bearing))
    rim = find_rim(shifted(cylinder_surface(0.06, 0.03), x, y, 0.83), np.eye(3), np.array([x, y, 0.8]))
    best = cheapest(rim_grasps(rim, 0.8, NOTHING, np.zeros(2), GraspRequest(side=side)))
    assert best.offset @ side > 0.97 * np.linalg.norm(best.offset)
    assert np.rad2deg(best.yaw) == pytest.approx(90, abs=15)


def test_only_obstacles_beside_the_way_raise_it():
    points = np.array([[0.5, 0.05, 1.2], [0.5, 0.3, 2.0], [1.5, 0.0, 3.0]])
    assert corridor_top(points, [0, 0], [1, 0]) == pytest.approx(1.2)
    assert corridor_top(points[1:], [0, 0], [1, 0]) == -np.inf


def test_action_noise_has_the_stated_spread_and_memory():
    walk = OrnsteinUhlenbeck(0.35, 0.9, np.random.default_rng(0))
    values = np.array([walk.step().copy() for _ in range(40_000)])
    np.testing.assert_allclose(values[:, :3].std(axis=0), 0.35, rtol=0.05)
    np.testing.assert_allclose(values[:, 3:].std(axis=0), 0.35 * ROTATION_NOISE, rtol=0.05)
    assert np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("scale", "correlation"), [(-0.1, 0.9), (1.5, 0.9), (0.3, 1.0), (0.3, -0.2)])
def test_noise_outside_its_range_is_refused_with_the_value(scale, correlation):
    with pytest.raises(ValueError, match=str(scale if not 0 <= scale <= 1 else correlation)):
        OrnsteinUhlenbeck(scale, correlation, np.random.default_rng(0))
