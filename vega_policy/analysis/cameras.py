"""Pinhole cameras: pixels to world points and back, normals, and how one view moved to the next.

A camera's own frame is x right, y down, z forward (OpenCV); a pose [4 4] leads from it to the world, in
metres. Pixel (row r, column c) is centred at v = r + 0.5, u = c + 0.5. Depth is measured along z; 0 means
unknown. A picture that is mirrored has a negative focal length, so that everything here holds for it too.
"""

import torch
from torch import Tensor


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
