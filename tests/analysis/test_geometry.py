"""Cameras, correspondence, probes and intervals agree with closed forms."""

import json
import math

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.nn import functional

from vega_policy.analysis.geometry import (
    TokenGeometry,
    correspondence,
    project,
    read_folder,
    relative_pose,
    surface_normals,
    token_geometry,
    world_points,
)
from vega_policy.analysis.linear_probes import ProbeData, cross_validate, difference, estimate, r_squared
from vega_policy.data.scenes import Scene, SceneObject, Views, load_scene, save_scene

SIZE = 28


def looking_down(x=0.0, y=0.0, height=1.0, tilt=0.0, turn=0.0):
    """Return the pose of a camera above the floor z = 0, turned about the vertical and tilted upwards."""
    cos, sin = math.cos(turn), math.sin(turn)
    turned = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]).double()
    cos, sin = math.cos(tilt), math.sin(tilt)
    down = torch.tensor([[1.0, 0.0, 0.0], [0.0, -cos, sin], [0.0, -sin, -cos]]).double()
    pose = torch.eye(4).double()
    pose[:3, :3] = turned @ down
    pose[:3, 3] = torch.tensor([x, y, height])
    return pose


def lens(focal=30.0):
    return torch.tensor([[focal, 0.0, SIZE / 2], [0.0, abs(focal), SIZE / 2], [0.0, 0.0, 1.0]]).double()


def floor_depth(pose, intrinsics):
    """Return the depth of the floor z = 0 under each pixel."""
    depth = torch.ones(1, SIZE, SIZE).double()
    directions = world_points(depth, intrinsics[None], pose[None])[0] - pose[:3, 3]
    return -pose[2, 3] / directions[..., 2]


def floor_views(poses, intrinsics):
    depth = torch.stack([floor_depth(pose, intrinsics) for pose in poses]).float().numpy()
    return Views(
        frames=np.zeros((len(poses), SIZE, SIZE, 3), np.uint8),
        depth=depth,
        intrinsics=intrinsics.expand(len(poses), 3, 3).numpy(),
        poses=torch.stack(poses).numpy(),
        segments=np.full(depth.shape, -1, np.int16),
    )


@pytest.mark.parametrize("focal", [30.0, -30.0])
def test_pixels_map_to_world_points_and_back_also_in_mirrored_images(focal):
    pose, intrinsics = looking_down(0.3, -0.2, 1.2, tilt=0.4, turn=0.7), lens(focal)
    depth = floor_depth(pose, intrinsics)
    points = world_points(depth[None], intrinsics[None], pose[None])[0]
    assert points[..., 2].abs().max() < 1e-9, "the floor is flat"
    pixels, seen = project(points, intrinsics, pose)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([column, row], dim=-1) + 0.5, check_dtype=False)
    torch.testing.assert_close(seen, depth)


@pytest.mark.parametrize("focal", [30.0, -30.0])
def test_the_normal_of_the_floor_points_up(focal):
    pose, intrinsics = looking_down(tilt=0.5, turn=1.0), lens(focal)
    normal = (
        surface_normals(floor_depth(pose, intrinsics)[None], intrinsics[None])[0, 1:-1, 1:-1] @ pose[:3, :3].T
    )
    torch.testing.assert_close(normal, torch.tensor([0.0, 0.0, 1.0]).double().expand_as(normal))


def test_normals_are_zero_at_borders_at_edges_and_where_depth_is_unknown():
    depth = torch.ones(1, 9, 9).double()
    depth[:, :, 5:] = 2.0
    depth[:, 4, 2] = 0.0
    known = surface_normals(depth, lens()[None]).norm(dim=-1)[0] > 0
    assert not known[0].any()
    assert not known[:, 4:6].any(), "the edge"
    assert not known[3:6, 2].any(), "beside a hole"
    assert known[2, 2]


def test_a_turn_about_the_optical_axis_is_that_rotation_vector():
    turned = torch.stack([looking_down(turn=-0.3, height=0.8), looking_down(turn=math.pi - 1e-6)])
    change, half_turn = relative_pose(looking_down().expand(2, 4, 4), turned)
    torch.testing.assert_close(change, torch.tensor([0, 0, 0.2, 0, 0, 0.3]).double())
    assert half_turn[3:].norm() == pytest.approx(math.pi, abs=1e-5)


def test_a_token_lies_at_the_mean_of_its_pixels_that_have_depth():
    pose, intrinsics = looking_down(), lens()
    views = floor_views([pose], intrinsics)
    whole = token_geometry(views, (4, 4))
    assert whole.valid.all()
    assert whole.points[..., 2].abs().max() < 1e-6
    views.depth[0, :7, :7] = 0.0
    views.depth[0, 0, 0] = 1.0  # 1 of 49 pixels is less than a tenth
    assert not token_geometry(views, (4, 4)).valid[0, 0]
    views.depth[0, 0, :5] = 1.0  # 5 of 49 are more
    part = token_geometry(views, (4, 4))
    assert part.valid[0, 0]
    expected = world_points(torch.ones(1, 7, 7).double(), intrinsics[None], pose[None])[0, 0, :5].mean(dim=0)
    torch.testing.assert_close(part.points[0, 0], expected, atol=1e-6, rtol=0)


def scattered_geometry(views=4, tokens=60, seed=0):
    """Return tokens of which every view has the same points in another order, one point a voxel."""
    generator = torch.Generator().manual_seed(seed)
    lattice = torch.stack(torch.meshgrid(*[torch.arange(5)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    points = (
        lattice[torch.randperm(len(lattice), generator=generator)[:tokens]] * 0.11
    )  # off the voxels' borders
    orders = [torch.randperm(tokens, generator=generator) for _ in range(views)]
    places = torch.stack([points[order] for order in orders]).double()
    return TokenGeometry(
        places,
        places[..., 2],
        torch.zeros_like(places),
        torch.ones(views, tokens, dtype=torch.bool),
        torch.zeros(views, 0, tokens),
    )


def test_features_that_are_a_function_of_the_world_point_score_one():
    geometry = scattered_geometry()
    waves = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double() * 20
    scores = correspondence((geometry.points @ waves).sin(), geometry, radius=0.05)
    assert scores.raw == pytest.approx(1.0)
    assert scores.centred == pytest.approx(1.0)
    assert scores.retrieval == 1.0
    assert scores.retrieval_chance == pytest.approx(1 / 60), "one of 60 tokens shows the point"
    assert abs(scores.chance) < 0.05


def test_noise_scores_chance():
    geometry = scattered_geometry(views=12)
    noise = torch.randn(12, 60, 256, generator=torch.Generator().manual_seed(2))
    scores = correspondence(noise, geometry, radius=0.12)
    assert scores.raw == pytest.approx(scores.chance, abs=0.01)
    assert scores.centred == pytest.approx(scores.centred_chance, abs=0.01)
    assert scores.retrieval == pytest.approx(scores.retrieval_chance, abs=0.03)


def test_a_common_component_raises_the_raw_score_and_its_chance_level_but_not_the_centred_score():
    geometry = scattered_geometry(views=8)
    noise = torch.randn(8, 60, 64, generator=torch.Generator().manual_seed(3))
    scores = correspondence(noise + 4.0, geometry)
    assert scores.raw > 0.9
    assert scores.raw == pytest.approx(scores.chance, abs=0.01)
    assert scores.centred == pytest.approx(scores.centred_chance, abs=0.03)


def test_tokens_without_depth_do_not_count_in_correspondence():
    geometry = scattered_geometry()
    features = functional.one_hot(
        (geometry.points / 0.11).round().long() @ torch.tensor([1, 5, 25]), 125
    ).double()
    features[:, :9] = 7.0
    assert correspondence(features, geometry).raw < 1.0
    geometry.valid[:, :9] = False
    assert correspondence(features, geometry, radius=0.05).raw == pytest.approx(1.0)
    assert correspondence(features, geometry, radius=0.05).retrieval == 1.0


def test_correspondence_refuses_a_single_view_and_features_of_other_views():
    geometry = scattered_geometry(views=1)
    with pytest.raises(ValueError, match="only one"):
        correspondence(torch.zeros(1, 60, 8), geometry)
    with pytest.raises(ValueError, match=r"\(1, 60\); got \(2, 60, 8\)"):
        correspondence(torch.zeros(2, 60, 8), geometry)


def r2(found):
    return estimate(found.squares.sum(axis=1), r_squared).value


def test_a_probe_recovers_planted_depth_and_finds_none_in_noise():
    poses = [looking_down(tilt=0.15 * k, height=1 + 0.1 * k) for k in range(5)]
    geometry = token_geometry(floor_views(poses, lens()), (7, 7))
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(1, 32, generator=generator)
    data = {"planted": [], "noise": []}
    for view in range(5):
        noise = torch.randn(49, 32, generator=generator)
        target = geometry.depth[view, :, None]
        data["noise"].append(ProbeData(noise, target))
        data["planted"].append(ProbeData(noise * 1e-3 + target.float() @ planted, target))
    found = cross_validate(data["planted"])
    assert estimate(found.squares[:, 0], r_squared).low > 0.999
    assert torch.cat(found.errors).abs().mean() < 0.005
    assert r2(cross_validate(data["noise"])) < 0.1


def test_a_probe_with_more_features_than_samples_gives_the_same_as_the_textbook_formula():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, 2, generator=generator).double()
    draws = [torch.randn(12, 40, generator=generator).double() for _ in range(6)]
    wide = cross_validate([ProbeData(x, x @ weights) for x in draws])
    narrow = cross_validate([ProbeData(x[:, :5], x[:, :5] @ weights[:5]) for x in draws])
    assert r2(narrow) > 0.999
    assert 0.3 < r2(wide) <= 1.0, "60 samples do not fix 40 weights on 48 of them"


def test_a_probe_is_tested_on_held_out_scenes():
    scenes = [ProbeData(torch.ones(8, 1), torch.full((8, 1), float(index))) for index in range(5)]
    assert r2(cross_validate(scenes)) <= 1e-9, "only training scenes can be distinguished"
    with pytest.raises(ValueError, match=r"at least 3 scenes .*; got 2"):
        cross_validate(scenes[:2])


def test_intervals_are_over_scenes_and_differences_are_paired():
    rng = np.random.default_rng(0)
    level = rng.normal(size=40)
    first = np.stack([100 * (level + 0.5), np.full(40, 100.0)], axis=1)
    second = np.stack([100 * level, np.full(40, 100.0)], axis=1)
    alone, paired = estimate(first), difference(first, second)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * level.std() / 40**0.5, rel=0.15)
    assert (paired.low, paired.high) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="same scenes, got 40 and 39"):
        difference(first, second[1:])


def test_a_scene_is_saved_and_loaded_unchanged(tmp_path):
    views = floor_views([looking_down(tilt=0.3), looking_down()], lens())
    bowl = SceneObject("black bowl 1", "black bowl", (0.1, 0.2, 0.3), (0.1, 0.1, 0.05), 0.1, True)
    save_scene(Scene("first", views, (bowl,)), tmp_path / "first.npz")
    loaded = load_scene(tmp_path / "first.npz")
    assert loaded.objects == (bowl,)
    assert loaded.name == "first"
    np.testing.assert_array_equal(loaded.views.poses, views.poses)
    np.testing.assert_allclose(loaded.views.depth, views.depth, rtol=1e-3)


@pytest.fixture
def posed_folder(tmp_path):
    """Write the floor from two cameras in nerfstudio's layout: wide images, depth in millimetres."""
    opengl = np.diag([1.0, -1.0, -1.0, 1.0])
    intrinsics, frames = lens(), []
    for index, pose in enumerate([looking_down(tilt=0.4), looking_down(0.2, turn=0.3)]):
        depth = floor_depth(pose, intrinsics).numpy()
        wide = np.repeat(depth, 2, axis=1)
        imageio.imwrite(tmp_path / f"{index}.png", np.full((*wide.shape, 3), 40 * index, np.uint8))
        imageio.imwrite(tmp_path / f"depth_{index}.png", (wide * 1000).round().astype(np.uint16))
        frames.append(
            {
                "file_path": f"{index}.png",
                "depth_file_path": f"depth_{index}.png",
                "transform_matrix": (pose.numpy() @ opengl).tolist(),
            }
        )
    content = {"fl_x": 60, "fl_y": 30, "cx": SIZE, "cy": SIZE / 2, "w": 2 * SIZE, "h": SIZE, "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    return tmp_path, content


def test_a_folder_of_posed_frames_gives_points_on_the_floor(posed_folder):
    scene = read_folder(posed_folder[0], SIZE)
    assert scene.views.frames.shape == (2, SIZE, SIZE, 3)
    assert scene.views.frames[1].max() == 40
    points = token_geometry(scene.views, (7, 7)).points
    assert points[..., 2].abs().max() < 2e-3, "depth is rounded to millimetres"
    assert len(read_folder(posed_folder[0], SIZE, max_frames=1).views) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0.1}, "k1 are not 0.*Undistort"),
        ({"fl_x": None}, "has no fl_x"),
        ({"frames": []}, "lists no frames"),
    ],
)
def test_unreadable_folders_are_refused(posed_folder, change, message):
    folder, content = posed_folder
    changed = {key: value for key, value in {**content, **change}.items() if value is not None}
    (folder / "transforms.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        read_folder(folder, SIZE)


def test_missing_files_of_a_folder_are_named(posed_folder, tmp_path):
    (posed_folder[0] / "depth_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth_1\.png, which does not exist"):
        read_folder(posed_folder[0], SIZE)
    with pytest.raises(FileNotFoundError, match=r"expected nerfstudio's layout"):
        read_folder(tmp_path / "nowhere", SIZE)
