"""Geometry of posed RGB-D views: points, normals, camera motion, averages per token; nerfstudio's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from vega_policy.data.scenes import NO_OBJECT, Scene, Views
from vega_policy.model.observation import resize
from vega_policy.run_dir import read_json

MIN_KNOWN = 0.1  # fraction of a token's pixels that need depth, as in VEGA-3D's released score


def pixel_rays(height: int, width: int, intrinsics: Tensor) -> Tensor:
    """Return the points of depth 1 under each pixel in the camera's frame, [n 3 3] -> [n h w 3]."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=intrinsics.dtype) + 0.5,
        torch.arange(width, dtype=intrinsics.dtype) + 0.5,
        indexing="ij",
    )
    focal = intrinsics[:, [0, 1], [0, 1]][:, None, None]  # [n 1 1 2]
    centre = intrinsics[:, :2, 2][:, None, None]
    plane = (torch.stack([u, v], dim=-1) - centre) / focal
    return torch.cat([plane, torch.ones_like(plane[..., :1])], dim=-1)


def camera_points(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Return the point of each pixel in its camera's frame: depth [n h w], [n 3 3] -> [n h w 3] (m)."""
    return pixel_rays(depth.shape[1], depth.shape[2], intrinsics) * depth[..., None]


def world_points(depth: Tensor, intrinsics: Tensor, poses: Tensor) -> Tensor:
    """Return the point of each pixel in the world: depth [n h w], [n 3 3], poses [n 4 4] -> [n h w 3] (m)."""
    return camera_to_world(camera_points(depth, intrinsics), poses)


def camera_to_world(points: Tensor, poses: Tensor) -> Tensor:
    """Transform points from their cameras' frames [n ... 3] into the world, poses [n 4 4] -> [n ... 3]."""
    moved = points.flatten(1, -2) @ poses[:, :3, :3].mT + poses[:, None, :3, 3]
    return moved.reshape(points.shape)


def project(points: Tensor, intrinsics: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points [... 3] into a camera with intrinsics [3 3] and pose [4 4].

    Returns pixel coordinates (u, v) [... 2] and depth [...] in metres; depth <= 0 lies behind the camera.
    """
    in_camera = (points - pose[:3, 3]) @ pose[:3, :3]
    homogeneous = in_camera @ intrinsics.mT
    return homogeneous[..., :2] / homogeneous[..., 2:], in_camera[..., 2]


def surface_normals(depth: Tensor, intrinsics: Tensor, max_jump: float = 0.05) -> Tensor:
    """Return unit normals that point towards the camera, in its frame, depth [n h w] (m) -> [n h w 3].

    Normals are zero at the image border, where depth is unknown (0), and at edges: pixels two apart whose
    depths differ by more than the fraction `max_jump`.
    """
    points = camera_points(depth, intrinsics)
    unknown = depth <= 0
    normal = torch.linalg.cross(_central_difference(points, 2), _central_difference(points, 1))
    towards = -(normal * points).sum(dim=-1, keepdim=True).sign()
    normal = normal * towards / normal.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    for axis in (1, 2):
        step = _central_difference(depth, axis).abs()
        neighbour_unknown = unknown.roll(1, axis) | unknown.roll(-1, axis)
        unknown = unknown | neighbour_unknown | (step > max_jump * depth)
    unknown[:, [0, -1]] = unknown[:, :, [0, -1]] = True
    return normal.masked_fill(unknown[..., None], 0.0)


def _central_difference(values: Tensor, axis: int) -> Tensor:
    return values.roll(-1, axis) - values.roll(1, axis)


def relative_pose(first: Tensor, second: Tensor) -> Tensor:
    """Return the second poses in the first ones' frames: translation (m), rotation vector (rad).

    [n 4 4], [n 4 4] -> [n 6].
    """
    rotation = first[:, :3, :3].mT @ second[:, :3, :3]
    translation = first[:, :3, :3].mT @ (second[:, :3, 3] - first[:, :3, 3])[..., None]
    vector = torch.from_numpy(Rotation.from_matrix(rotation.numpy()).as_rotvec())
    return torch.cat([translation[..., 0], vector.to(translation)], dim=-1)


@dataclass(frozen=True)
class TokenGeometry:
    """Geometry under the tokens of n views, tokens in row order."""

    points: Tensor  # [n t 3], mean world point of the token's pixels (m)
    depth: Tensor  # [n t], mean depth (m)
    normals: Tensor  # [n t 3], unit mean normal in the camera's frame; zero where unknown
    valid: Tensor  # bool [n t], whether enough pixels have depth
    coverage: Tensor  # [n k t], fraction of the token's pixels that show object k


def token_geometry(
    views: Views, grid: tuple[int, int], num_objects: int = 0, max_depth: float = 10.0
) -> TokenGeometry:
    """Average the pixels of each cell of a token grid (gh, gw).

    Depth beyond `max_depth` (m) counts as unknown (sky, distant walls).
    """
    depth = torch.from_numpy(views.depth).double()
    depth = depth.masked_fill(depth > max_depth, 0.0)
    intrinsics, poses = torch.from_numpy(views.intrinsics), torch.from_numpy(views.poses)
    known = (depth > 0).double()[..., None]
    fraction = _pool_cells(known, grid)  # [n t 1]
    points = _pool_cells(camera_points(depth, intrinsics) * known, grid) / fraction.clamp_min(1e-9)
    segments = torch.from_numpy(views.segments)
    coverage = torch.zeros(len(views), num_objects, grid[0] * grid[1])
    for index in range(num_objects):
        coverage[:, index] = _pool_cells((segments == index).double()[..., None], grid)[..., 0]
    return TokenGeometry(
        points=camera_to_world(points, poses),
        depth=points[..., 2],
        normals=functional.normalize(_pool_cells(surface_normals(depth, intrinsics), grid), dim=-1),
        valid=fraction[..., 0] >= MIN_KNOWN,
        coverage=coverage,
    )


def _pool_cells(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average over the cells of a grid, [n h w c] -> [n t c]; cells overlap where it does not divide h, w."""
    pooled = functional.adaptive_avg_pool2d(rearrange(values, "n h w c -> n c h w"), grid)
    return rearrange(pooled, "n c gh gw -> n (gh gw) c")


TRANSFORMS = "transforms.json"
INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
MILLIMETRE = 1e-3  # nerfstudio's default depth unit in integer images
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # nerfstudio's cameras look along -z with y upwards


def read_folder(folder: Path, frame_size: int, max_frames: int = 32) -> Scene:
    """Read posed RGB-D frames in nerfstudio's layout (`transforms.json`), stretched to squares.

    At most `max_frames` evenly spread frames are taken; VEGA-3D's score takes 32.
    """
    path = folder / TRANSFORMS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TRANSFORMS}; expected nerfstudio's layout: {TRANSFORMS} with fl_x, fl_y, cx, "
            "cy, w, h and frames of file_path, depth_file_path and transform_matrix"
        )
    content = read_json(path)
    listed = content.get("frames", [])
    if not listed:
        raise ValueError(f"{path} lists no frames")
    chosen = np.unique(np.linspace(0, len(listed) - 1, min(max_frames, len(listed))).round().astype(int))
    views = [_read_view(folder, {**content, **listed[index]}, frame_size) for index in chosen]
    stacked = [np.stack(part) for part in zip(*views, strict=True)]
    return Scene(folder.name, Views(*stacked, segments=np.full(stacked[1].shape, NO_OBJECT, np.int16)))


def _read_view(folder: Path, entry: dict[str, Any], size: int) -> tuple[np.ndarray, ...]:
    """Read frame, depth, intrinsics and pose of one entry of `transforms.json`."""
    name = entry["file_path"]
    missing = [key for key in (*INTRINSICS, "depth_file_path", "transform_matrix") if key not in entry]
    if missing:
        raise ValueError(f"frame {name} of {folder / TRANSFORMS} has no {', '.join(missing)}")
    distorted = [key for key in DISTORTION if abs(entry.get(key, 0.0)) > 1e-6]
    if distorted:
        raise ValueError(
            f"frame {name} is distorted ({', '.join(distorted)} are not 0); expected pinhole cameras. "
            "Undistort the frames first, for example with COLMAP's image_undistorter."
        )
    for key in ("file_path", "depth_file_path"):
        if not (folder / entry[key]).is_file():
            raise FileNotFoundError(f"{folder / TRANSFORMS} names {entry[key]}, which does not exist")
    frame = torch.from_numpy(imageio.imread(folder / name)[..., :3].copy()).permute(2, 0, 1).float() / 255
    depth = _read_depth(folder / entry["depth_file_path"], entry.get("depth_unit_scale_factor", MILLIMETRE))
    # The nearest pixel's depth: an average across an edge would lie on neither surface.
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in depth.shape)
    intrinsics = np.array(
        [[entry["fl_x"], 0, entry["cx"]], [0, entry["fl_y"], entry["cy"]], [0, 0, 1]], float
    )
    intrinsics[:2] *= [[size / entry["w"]], [size / entry["h"]]]
    return (
        (resize(frame, size, size) * 255).round().byte().permute(1, 2, 0).numpy(),
        depth[rows[:, None], columns],
        intrinsics,
        np.array(entry["transform_matrix"]) @ OPENGL,
    )


def _read_depth(path: Path, unit: float) -> np.ndarray:
    """Read depth [h w] in metres; values that are not finite become 0 (unknown)."""
    depth = np.load(path) if path.suffix == ".npy" else imageio.imread(path) * unit
    return np.nan_to_num(np.asarray(depth, np.float32).squeeze(), nan=0.0, posinf=0.0, neginf=0.0)
