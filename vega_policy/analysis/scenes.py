"""Geometry of posed views: points, projections, normals, pose changes; reading nerfstudio's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor

from vega_policy.data.scenes import NO_OBJECT, Scene, Views
from vega_policy.model.observation import resize


def rays(height: int, width: int, intrinsics: Tensor) -> Tensor:
    """Points of depth 1 under each pixel, in the camera's frame.

    Args:
        height: Rows h.
        width: Columns w.
        intrinsics: Camera matrices in pixels, [n 3 3].

    Returns:
        [n h w 3].
    """
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
    """What each pixel shows, in its camera's frame: depth [n h w], intrinsics [n 3 3] -> [n h w 3] (m)."""
    return rays(depth.shape[1], depth.shape[2], intrinsics) * depth[..., None]


def world_points(depth: Tensor, intrinsics: Tensor, poses: Tensor) -> Tensor:
    """What each pixel shows, in the world: depth [n h w] (m), [n 3 3], poses [n 4 4] -> [n h w 3] (m)."""
    return to_world(camera_points(depth, intrinsics), poses)


def to_world(points: Tensor, poses: Tensor) -> Tensor:
    """Points in their cameras' frames [n ... 3] into the world, poses [n 4 4] -> [n ... 3]."""
    flat = points.flatten(1, -2)
    moved = flat @ poses[:, :3, :3].mT + poses[:, None, :3, 3]
    return moved.reshape(points.shape)


def project(points: Tensor, intrinsics: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Where a camera sees points of the world.

    Args:
        points: [... 3] in metres.
        intrinsics: [3 3] in pixels.
        pose: [4 4].

    Returns:
        Pixel coordinates (u, v) [... 2], and depth [...] in metres (not positive: behind the camera).
    """
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    homogeneous = seen @ intrinsics.mT
    return homogeneous[..., :2] / homogeneous[..., 2:], seen[..., 2]


def normals(depth: Tensor, intrinsics: Tensor, jump: float = 0.05) -> Tensor:
    """Unit normals of what each pixel shows, turned towards the camera, in the camera's frame.

    Args:
        depth: [n h w] in metres, 0 where unknown.
        intrinsics: [n 3 3] in pixels.
        jump: Share of the depth by which neighbours two pixels apart may differ; beyond it there is an edge.

    Returns:
        [n h w 3]; zeros at the picture's border, at edges and where depth is unknown.
    """
    points = camera_points(depth, intrinsics)
    across, down, unknown = _difference(points, 2), _difference(points, 1), depth <= 0
    normal = torch.linalg.cross(across, down)
    towards = -(normal * points).sum(dim=-1, keepdim=True).sign()
    normal = normal * towards / normal.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    for axis in (1, 2):
        step = _difference(depth[..., None], axis)[..., 0].abs()
        beside = unknown.roll(1, axis) | unknown.roll(-1, axis)
        unknown = unknown | beside | (step > jump * depth)
    unknown[:, [0, -1]] = unknown[:, :, [0, -1]] = True
    return normal.masked_fill(unknown[..., None], 0.0)


def _difference(values: Tensor, axis: int) -> Tensor:
    return values.roll(-1, axis) - values.roll(1, axis)


def pose_change(first: Tensor, second: Tensor) -> Tensor:
    """The second camera as the first one sees it, [... 4 4] -> translation (m), rotation vector; [... 6]."""
    rotation = first[..., :3, :3].mT @ second[..., :3, :3]
    shift = first[..., :3, :3].mT @ (second[..., :3, 3] - first[..., :3, 3])[..., None]
    return torch.cat([shift[..., 0], rotation_vector(rotation)], dim=-1)


def rotation_vector(rotation: Tensor) -> Tensor:
    """Axis times angle (rad, below pi) of rotation matrices, [... 3 3] -> [... 3]."""
    skew = torch.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        dim=-1,
    )  # 2 sin(angle) axis
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    angle = torch.atan2(skew.norm(dim=-1), trace - 1)
    return skew * (angle / skew.norm(dim=-1).clamp_min(1e-12))[..., None]


TRANSFORMS = "transforms.json"
LENS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
MILLIMETRE = 1e-3
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def read_folder(folder: Path, frame_size: int, frames: int = 32) -> Scene:
    """Read a folder as a scene whose views are stretched to a square.

    Args:
        folder: Holds `transforms.json` and the files it names.
        frame_size: Side of the square in pixels.
        frames: How many frames to take at most, evenly spread; the paper's score takes 32.

    Raises:
        FileNotFoundError: If the layout's file, or one that it names, is missing.
        ValueError: If frames lack depth or lens, or are distorted.
    """
    path = folder / TRANSFORMS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TRANSFORMS}; expected nerfstudio's layout: {TRANSFORMS} with fl_x, fl_y, cx, "
            "cy, w, h and frames of file_path, depth_file_path and transform_matrix"
        )
    content = json.loads(path.read_text())
    listed = content.get("frames", [])
    if not listed:
        raise ValueError(f"{path} lists no frames")
    chosen = np.unique(np.linspace(0, len(listed) - 1, min(frames, len(listed))).round().astype(int))
    views = [_view(folder, {**content, **listed[index]}, frame_size) for index in chosen]
    stacked = [np.stack(part) for part in zip(*views, strict=True)]
    return Scene(folder.name, Views(*stacked, segments=np.full(stacked[1].shape, NO_OBJECT, np.int16)))


def _view(folder: Path, entry: dict[str, Any], size: int) -> tuple[np.ndarray, ...]:
    """Picture, depth, lens and pose of one frame."""
    name = entry["file_path"]
    missing = [key for key in (*LENS, "depth_file_path", "transform_matrix") if key not in entry]
    if missing:
        raise ValueError(f"frame {name} of {folder / TRANSFORMS} lacks {', '.join(missing)}")
    bent = [key for key in DISTORTION if abs(entry.get(key, 0.0)) > 1e-6]
    if bent:
        raise ValueError(
            f"frame {name} is distorted ({', '.join(bent)} are not 0); this reader takes pinhole cameras. "
            "Undistort the frames first, for example with COLMAP's image_undistorter."
        )
    for key in ("file_path", "depth_file_path"):
        if not (folder / entry[key]).is_file():
            raise FileNotFoundError(f"{folder / TRANSFORMS} names {entry[key]}, which does not exist")
    picture = imageio.imread(folder / name)[..., :3]
    depth = _depth(folder / entry["depth_file_path"], entry.get("depth_unit_scale_factor", MILLIMETRE))
    across, down = size / entry["w"], size / entry["h"]
    lens = np.array(
        [
            [entry["fl_x"] * across, 0, entry["cx"] * across],
            [0, entry["fl_y"] * down, entry["cy"] * down],
            [0, 0, 1],
        ]
    )
    return (
        _stretched(picture, size),
        _nearest(depth, size),
        lens,
        np.array(entry["transform_matrix"]) @ OPENGL,
    )


def _depth(path: Path, unit: float) -> np.ndarray:
    """Depth [h w] in metres; not finite becomes unknown (0)."""
    depth = np.load(path) if path.suffix == ".npy" else imageio.imread(path) * unit
    return np.nan_to_num(np.asarray(depth, np.float32).squeeze(), nan=0.0, posinf=0.0, neginf=0.0)


def _stretched(picture: np.ndarray, size: int) -> np.ndarray:
    planes = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
    return (resize(planes, size, size) * 255).round().byte().permute(1, 2, 0).numpy()


def _nearest(depth: np.ndarray, size: int) -> np.ndarray:
    """Depth at the pixel nearest to each new one: between two surfaces there is no third."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in depth.shape)
    return depth[rows[:, None], columns]
