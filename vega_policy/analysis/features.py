"""What lies under each token of a view: world point, depth, normal, and the things it shows."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.scenes import camera_points, normals, to_world
from vega_policy.data.scenes import Views

KNOWN_SHARE = 0.1
"""Share of a token's pixels that need depth for the token to count (VEGA-3D's released score)."""


@dataclass(frozen=True)
class TokenGeometry:
    """Geometry of the tokens of n views, tokens in row order.

    Attributes:
        points: World point of each token, the mean of its pixels', [n t 3] (m).
        depth: Mean depth [n t] (m).
        normals: Mean normal in the camera's frame, unit length or zero where there is none, [n t 3].
        valid: Whether enough pixels have depth, bool [n t].
        cover: Share of each token's pixels that show thing k, [n k t].
    """

    points: Tensor
    depth: Tensor
    normals: Tensor
    valid: Tensor
    cover: Tensor


def token_geometry(
    views: Views, grid: tuple[int, int], things: int = 0, farthest: float = 10.0
) -> TokenGeometry:
    """Average the pixels of each cell of a token grid.

    Args:
        views: Posed RGB-D frames.
        grid: Token grid (gh, gw).
        things: Number of the scene's things.
        farthest: Depth in metres beyond which a pixel counts as unknown (sky, the walls of a hall).
    """
    depth = torch.from_numpy(views.depth).double()
    depth = depth.masked_fill(depth > farthest, 0.0)
    intrinsics, poses = torch.from_numpy(views.intrinsics), torch.from_numpy(views.poses)
    known = (depth > 0).double()
    share = _cells(known[..., None], grid)  # [n t 1]
    weight = share.clamp_min(1e-9)
    in_camera = camera_points(depth, intrinsics)
    seen = _cells(in_camera * known[..., None], grid) / weight
    normal = _cells(normals(depth, intrinsics), grid)
    segments = torch.from_numpy(views.segments)
    cover = torch.zeros(len(views), things, grid[0] * grid[1])
    for index in range(things):
        cover[:, index] = _cells((segments == index).double()[..., None], grid)[..., 0]
    return TokenGeometry(
        points=to_world(seen, poses),
        depth=seen[..., 2],
        normals=functional.normalize(normal, dim=-1),
        valid=share[..., 0] >= KNOWN_SHARE,
        cover=cover,
    )


def _cells(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the cells of a grid, [n h w c] -> [n t c]; cells overlap where the grid does not divide."""
    pooled = functional.adaptive_avg_pool2d(rearrange(values, "n h w c -> n c h w"), grid)
    return rearrange(pooled, "n c gh gw -> n (gh gw) c")
