"""Scenes of the simulator: cameras, depth, boxes and answers checked against its raw state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs.posed_views import (
    PosedCamera,
    RandomLayout,
    SceneSpec,
    Viewpoint,
    arc,
    base_pose,
    describe_objects,
    find_objects,
    object_of_geom,
    overview_and_pan,
    write_scenes,
)
from tests.question_checks import Known, agree
from vega_policy.analysis.geometry import project, world_points
from vega_policy.analysis.spatial_qa import KINDS, MIN_VISIBLE, generate_questions, visible_fractions
from vega_policy.data.scenes import Scene, load_scene

SIZE = 96


@pytest.fixture(scope="module")
def table():
    """A LIBERO table with its camera."""
    env = envs.make("libero_spatial", 0, render=False)
    env.reset_blindly(seed=0)
    with PosedCamera(env, frame_size=SIZE) as camera:
        yield env, camera, RandomLayout(env)
    env.close()


def photographed(table, seed, viewpoints):
    env, camera, layout = table
    there = layout.draw(np.random.default_rng(seed))
    views = camera.take(viewpoints, layout.middle, base_pose(env), object_of_geom(env, there))
    return Scene(str(seed), views, tuple(describe_objects(env, there)))


def test_depth_and_cameras_put_every_thing_into_its_box(table):
    viewpoints = [*arc(3, np.random.default_rng(0)), Viewpoint(aim=0.1, field=0.4)]
    scene = photographed(table, 1, viewpoints)
    numbers = (scene.views.depth, scene.views.intrinsics, scene.views.poses)
    points = world_points(*(torch.from_numpy(part).double() for part in numbers)).numpy()
    checked = 0
    for index, thing in enumerate(scene.objects):
        seen = points[scene.views.segments == index]
        outside = np.abs(seen - thing.centre) - np.array(thing.size) / 2
        assert len(seen) == 0 or outside.max() < 0.006, thing.name
        checked += len(seen) > 50
    assert checked >= 4


@pytest.mark.slow
def test_the_policys_own_camera_gives_the_same_image(table):
    env, camera, layout = table
    layout.draw(np.random.default_rng(2))
    watched = envs.make("libero_spatial", 0, frame_size=SIZE, rendering="fast")
    try:
        watched.reset_blindly(seed=0)
        watched.raw.sim.data._data.qpos[:] = env.raw.sim.data._data.qpos
        expected = watched.observe()["pixels"]["image"].astype(int)
    finally:
        watched.close()
    views = camera.take([Viewpoint()], layout.middle, base_pose(env), object_of_geom(env, []))
    different = np.abs(views.frames[0].astype(int) - expected).max(axis=-1) > 8
    assert different.mean() < 0.02


def test_layout_things_stand_on_the_table_apart_from_each_other(table):
    env, _, layout = table
    for seed in range(5):
        described = describe_objects(env, layout.draw(np.random.default_rng(seed)))
        bottoms = [thing.centre[2] - thing.size[2] / 2 for thing in described if thing.movable]
        assert np.ptp(bottoms) < 1e-6
        for first in described:
            for second in described:
                gap = np.abs(np.subtract(first.centre, second.centre)) - np.add(first.size, second.size) / 2
                assert first is second or not (first.movable or second.movable) or gap[:2].max() > 0


def rotate(quaternion, points):
    """Rotation by a unit quaternion (w x y z) without a matrix."""
    w, axis = quaternion[0], quaternion[1:]
    across = np.cross(axis, points)
    return points + 2 * w * across + 2 * np.cross(axis, across)


def raw_state(env, names):
    """Boxes from joint frames, quaternions and mesh files' corners, with robosuite's own accessors."""
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    found = []
    for body in find_objects(env):
        if body.name not in names:
            continue
        corners = []
        for geom in body.geoms:
            mesh = model.geom_dataid[geom]
            if mesh >= 0 and model.geom_type[geom] == 7:
                first = model.mesh_vertadr[mesh]
                local = model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(float)
            else:
                middle, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
                local = np.array([middle + half * (2 * np.array(sign) - 1) for sign in np.ndindex(2, 2, 2)])
            carrier = model.geom_bodyid[geom]
            in_body = rotate(model.geom_quat[geom], local) + model.geom_pos[geom]
            corners.append(rotate(data.xquat[carrier], in_body) + data.xpos[carrier])
        cloud = np.concatenate(corners) - env.raw.sim.data.get_body_xpos("robot0_base")  # it is not turned
        low, high = cloud.min(axis=0), cloud.max(axis=0)
        unturned = rotate(data.xquat[body.root] * [1, -1, -1, -1], cloud)
        joints = model.jnt_type[model.jnt_bodyid == body.root]
        found.append(
            Known(
                body.category,
                (low + high) / 2,
                high - low,
                float((unturned.max(axis=0) - unturned.min(axis=0)).max()),
                bool((joints == 0).any()),  # MuJoCo's free joint
            )
        )
    return found


@given(st.integers(0, 2**20))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_answers_agree_with_a_second_computation_from_the_raw_simulator_state(table, seed):
    scene = photographed(table, seed, overview_and_pan(4, np.random.default_rng(seed)))
    state = raw_state(table[0], {thing.name for thing in scene.objects})
    shares = visible_fractions(scene)[1:]
    for index, thing in enumerate(state):
        views = np.flatnonzero(shares[:, index] >= 2 * MIN_VISIBLE)
        thing.first_seen = int(views[0]) if len(views) else 99
    questions = generate_questions(0, scene, ["black bowl", "plate"])
    assert len({question.kind for question in questions}) >= len(KINDS) - 2
    for question in questions:
        assert agree(question, state, tolerance=1e-5), question


def test_a_thing_is_in_the_overview_where_its_box_projects(table):
    scene = photographed(table, 3, [Viewpoint()])
    pose, lens = torch.from_numpy(scene.views.poses[0]), torch.from_numpy(scene.views.intrinsics[0])
    for index, thing in enumerate(scene.objects):
        rows, columns = np.nonzero(scene.views.segments[0] == index)
        if len(rows) < 60 or not thing.movable:
            continue
        pixel, depth = project(torch.tensor(thing.centre).double(), lens, pose)
        assert depth > 0
        assert columns.min() - 2 < pixel[0] < columns.max() + 2, thing.name
        assert rows.min() - 2 < pixel[1] < rows.max() + 2, thing.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "categories"),
    [
        ("lift_wide", {"cube"}),
        ("libero_spatial", {"black bowl", "cookie box", "plate", "ramekin", "stove", "wooden cabinet"}),
    ],
)
def test_scenes_on_disk_depend_neither_on_interruptions_nor_on_processes(tmp_path, suite, categories):
    """One process draws all layouts in one environment, three draw one each."""
    order = {"suite": suite, "tasks": [0], "count": 3, "frame_size": 32, "views": 2, "layout": "random"}
    paths = write_scenes(tmp_path / "one", **order)
    first = [load_scene(path) for path in paths]
    paths[1].unlink()
    again = [load_scene(path) for path in write_scenes(tmp_path / "one", **order)]
    apart = [load_scene(path) for path in write_scenes(tmp_path / "two", processes=3, **order)]
    for one, *others in zip(first, again, apart, strict=True):
        for other in others:
            np.testing.assert_array_equal(one.views.frames, other.views.frames)
            np.testing.assert_array_equal(one.views.segments, other.views.segments)
            assert one.objects == other.objects
    assert {thing.category for one in first for thing in one.objects} == categories
    assert (first[0].views.poses != first[1].views.poses).any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layout", "tidy", "layout: expected one of random, task; got 'tidy'"),
        ("shots", "selfie", "shots: expected one of arc"),
        ("count", 0, "count 0"),
    ],
)
def test_an_impossible_order_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SceneSpec("libero_spatial", **{field: value})


def test_scenes_of_other_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match="robosuite's and LIBERO's suites; got 'metaworld_mt10'"):
        write_scenes(tmp_path, suite="metaworld_mt10", tasks=[0], count=1)
