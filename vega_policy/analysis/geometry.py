"""Geometry of posed RGB-D views, and geometry in frozen features of them.

The correspondence score of VEGA-3D is a cosine that is not centred: a component common to all tokens gives
0.9 for any two of them. Three numbers belong together: the score, the same for pairs of different places
(chance), and the score after the mean token is subtracted. Retrieval measures in metres: whether the most
similar token of the other view shows the same point. Linear probes read depth, normals, objects and the
camera's motion, over the layers and noise levels of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vega_policy.analysis.features import UNTRAINED, FeatureExtractor, FeatureSpec, cache_key, frames_of
from vega_policy.analysis.linear_probes import (
    Estimate,
    Metric,
    ProbeData,
    ProbeResult,
    Sums,
    cross_validate,
    r_squared,
)
from vega_policy.data.scenes import NO_OBJECT, Scene, Views
from vega_policy.model.observation import resize
from vega_policy.run_dir import atomic_file, read_json

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

    Raises:
        FileNotFoundError: If `transforms.json`, or a file that it names, is missing.
        ValueError: If frames lack depth or intrinsics, or are distorted.
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


@dataclass(frozen=True)
class Correspondence:
    """Scores of one scene, each a mean over pairs of adjacent views; nan if no two views share a place."""

    raw: float  # mean cosine of both views' mean tokens in the same voxel
    chance: float  # mean cosine over all pairs of different voxels
    centred: float  # `raw` after the scene's mean token is subtracted
    centred_chance: float
    retrieval: float  # fraction of points whose most similar token in the other view lies within the radius
    retrieval_chance: float  # the same for a token drawn at random


def correspondence(
    features: Tensor, geometry: TokenGeometry, voxel: float = 0.1, radius: float = 0.1
) -> Correspondence:
    """Compare each view of a scene with the next one, features [n t d].

    `voxel` is the side of a voxel (m), `radius` the distance (m) within which a retrieved token is correct.

    Raises:
        ValueError: If features and geometry have different tokens, or there is only one view.
    """
    if features.shape[:2] != geometry.valid.shape:
        raise ValueError(
            f"features [n t d] must have the tokens of the geometry {tuple(geometry.valid.shape)}; got "
            f"{tuple(features.shape)}"
        )
    if len(features) < 2:
        raise ValueError("correspondence compares views; this scene has only one")
    raw = functional.normalize(features.double(), dim=-1)
    centred = functional.normalize(raw - raw[geometry.valid].mean(dim=0), dim=-1)
    pairs = []
    for first in range(len(raw) - 1):
        two = slice(first, first + 2)
        points, valid = geometry.points[two], geometry.valid[two]
        scores = [*_voxel_scores(raw[two], points, valid, voxel)]
        scores += _voxel_scores(centred[two], points, valid, voxel)
        pairs.append(torch.stack([*scores, *_retrieval(centred[two], points, valid, radius)]))
    return Correspondence(*torch.stack(pairs).nanmean(dim=0).tolist())


def _voxel_scores(tokens: Tensor, points: Tensor, valid: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """Return the mean cosine in shared voxels and between different ones; [2 t d], [2 t 3], [2 t]."""
    lowest = points[valid].amin(dim=0) if valid.any() else points.new_zeros(3)
    cells = ((points - lowest) / voxel).floor().long()
    _, inverse = torch.cat([cells[0][valid[0]], cells[1][valid[1]]]).unique(dim=0, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    means, occupied = [], []
    for view, index in enumerate(inverse.split([int(valid[0].sum()), int(valid[1].sum())])):
        total = tokens.new_zeros(count, tokens.shape[-1]).index_add(0, index, tokens[view][valid[view]])
        means.append(functional.normalize(total, dim=-1))
        occupied.append(torch.bincount(index, minlength=count) > 0)
    shared = occupied[0] & occupied[1]
    m = int(shared.sum())
    nan = tokens.new_tensor(float("nan"))
    if m == 0:
        return nan, nan
    first, second = means[0][shared], means[1][shared]
    same = (first * second).sum()
    different = (first.sum(dim=0) * second.sum(dim=0)).sum() - same  # over every pair of different voxels
    return same / m, different / (m * (m - 1)) if m > 1 else nan


def _retrieval(tokens: Tensor, points: Tensor, valid: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the fraction of points retrieved in the other view, and chance level, over both directions."""
    near = torch.cdist(points[0], points[1]) <= radius  # [t t]
    near &= valid[0][:, None] & valid[1][None]
    similarity = tokens[0] @ tokens[1].T
    correct, by_chance = [], []
    for close, similar, candidates in ((near, similarity, valid[1]), (near.T, similarity.T, valid[0])):
        shared = close.any(dim=1)  # points that the other view shows too
        best = similar.masked_fill(~candidates[None], -2.0)[shared].argmax(dim=1)
        correct.append(close[shared].gather(1, best[:, None])[:, 0].double())
        by_chance.append(close[shared].sum(dim=1) / candidates.sum().clamp_min(1))
    return torch.cat(correct).mean(), torch.cat(by_chance).double().mean()


def match_tokens(
    tokens: Tensor, geometry: TokenGeometry, left: int, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Match the tokens of view `left` that the next view shows too with their most similar tokens there.

    Tokens are those of both views [2 t d]. Returns indices in the first view [m], in the second [m], and
    whether the match lies within `radius` (m), bool [m].
    """
    centred = functional.normalize(tokens - tokens.flatten(0, 1).mean(dim=0), dim=-1)
    near = torch.cdist(geometry.points[left], geometry.points[left + 1]) <= radius
    near &= geometry.valid[left][:, None] & geometry.valid[left + 1][None]
    first = near.any(dim=1).nonzero()[:, 0]
    similarity = (centred[0] @ centred[1].T).masked_fill(~geometry.valid[left + 1][None], -2.0)
    second = similarity[first].argmax(dim=1)
    return first, second, near[first, second]


TOKEN_STRIDE = 3  # every third token goes into the probes of depth and normals
MIN_COVERAGE = 0.5  # tokens that an object must cover to be probed
POSE_GRID = (2, 2)  # grid to which views are pooled for the probe of the camera's motion


DEGREES = 180 / math.pi
METRICS: dict[str, Metric] = {
    "raw": Metric("correspondence", "raw"),
    "chance": Metric("its chance level", "chance"),
    "centred": Metric("centred", "centred"),
    "centred_chance": Metric("its chance level", "centred_chance"),
    "retrieval": Metric("retrieval", "retrieval"),
    "retrieval_chance": Metric("its chance level", "retrieval_chance"),
    "depth_r2": Metric("depth R2", "depth_squares", r_squared),
    "depth_cm": Metric("depth error (cm)", "depth_errors", scale=100, higher_is_better=False),
    "normal_r2": Metric("normal R2", "normal_squares", r_squared),
    "normal_deg": Metric("normal error (deg)", "normal_errors", scale=DEGREES, higher_is_better=False),
    "object_r2": Metric("object R2", "object_squares", r_squared),
    "object_cm": Metric("object error (cm)", "object_errors", scale=100, higher_is_better=False),
    "shift_r2": Metric("camera shift R2", "shift_squares", r_squared),
    "shift_cm": Metric("camera shift error (cm)", "shift_errors", scale=100, higher_is_better=False),
    "turn_r2": Metric("camera turn R2", "turn_squares", r_squared),
    "turn_deg": Metric("camera turn error (deg)", "turn_errors", scale=DEGREES, higher_is_better=False),
}
HEADLINE = ("centred", "retrieval", "depth_r2", "normal_r2", "object_r2", "shift_r2", "turn_r2")
"""Metrics on which a prior is compared with its untrained copy, and which have heat maps."""


@dataclass(frozen=True)
class Measurement:
    """Parameters of the measurement."""

    grid: tuple[int, int]  # token grid (gh, gw)
    voxel: float = 0.1  # m, side of a voxel of the correspondence score
    radius: float = 0.1  # m, distance within which a retrieved token is correct


def measure(
    features: Tensor, scenes: Sequence[Scene], geometry: Sequence[TokenGeometry], measurement: Measurement
) -> Sums:
    """Return all sums of one kind of features: tokens [n t d] of all views of all scenes, scene by scene."""
    tokens = features.split([len(scene.views) for scene in scenes])
    scores = [
        asdict(correspondence(part, place, measurement.voxel, measurement.radius))
        for part, place in zip(tokens, geometry, strict=True)
    ]
    sums: Sums = {}
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        known = np.isfinite(values)
        sums[name] = np.stack([np.where(known, values, 0.0), known.astype(float)], axis=1)
    sums |= _probe_tokens(tokens, geometry)
    sums |= _probe_objects(tokens, scenes, geometry)
    sums |= _probe_camera_motion(tokens, scenes, measurement.grid)
    return sums


def _probe_tokens(tokens: Sequence[Tensor], geometry: Sequence[TokenGeometry]) -> Sums:
    """Probe depth and normal under a token, with one probe of four outputs."""
    data = []
    for part, place in zip(tokens, geometry, strict=True):
        known = place.valid & (place.normals.norm(dim=-1) > 0)
        targets = torch.cat([place.depth[..., None], place.normals], dim=-1)
        data.append(ProbeData(part[known][::TOKEN_STRIDE], targets[known][::TOKEN_STRIDE]))
    result = _cross_validate_or_none(data)
    sums = _sum_errors("depth", result, len(data), slice(0, 1)) | _sum_errors(
        "normal", result, len(data), slice(1, 4)
    )
    if result is not None:  # the error of a normal is an angle
        for index, (predicted, scene) in enumerate(zip(result.predictions, data, strict=True)):
            cosine = functional.cosine_similarity(predicted[:, 1:], scene.targets[:, 1:], dim=-1)
            angle = cosine.clamp(-1, 1).arccos()
            sums["normal_errors"][index] = angle.sum().item(), len(angle)
    return sums


def _probe_objects(
    tokens: Sequence[Tensor], scenes: Sequence[Scene], geometry: Sequence[TokenGeometry]
) -> Sums:
    """Probe an object's centre in the robot's frame, from the mean of the tokens that show it."""
    data = []
    for part, scene, place in zip(tokens, scenes, geometry, strict=True):
        visible = place.coverage.sum(dim=-1) >= MIN_COVERAGE  # [n k]
        weight = place.coverage / place.coverage.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        means = weight.to(part) @ part  # [n k d]
        centres = torch.tensor([one.centre for one in scene.objects]).reshape(-1, 3).double()
        data.append(ProbeData(means[visible], centres.expand(len(part), -1, 3)[visible]))
    return _sum_errors("object", _cross_validate_or_none(data), len(data), slice(0, 3))


def _probe_camera_motion(tokens: Sequence[Tensor], scenes: Sequence[Scene], grid: tuple[int, int]) -> Sums:
    """Probe the camera's motion between views one or two apart, from both views' pooled tokens."""
    data = []
    for part, scene in zip(tokens, scenes, strict=True):
        maps = rearrange(part, "n (gh gw) d -> n d gh gw", gh=grid[0])
        pooled = functional.adaptive_avg_pool2d(maps, POSE_GRID).flatten(1)
        views = range(len(part))
        pairs = [(i, j) for i in views for j in views if 0 < abs(i - j) <= 2]
        first, second = (torch.tensor(side, dtype=torch.long) for side in zip(*pairs, strict=True))
        poses = torch.from_numpy(scene.views.poses)
        both = torch.cat([pooled[first], pooled[second]], dim=-1)
        data.append(ProbeData(both, relative_pose(poses[first], poses[second])))
    result = _cross_validate_or_none(data)
    shift = _sum_errors("shift", result, len(data), slice(0, 3))
    return shift | _sum_errors("turn", result, len(data), slice(3, 6))


def _cross_validate_or_none(data: list[ProbeData]) -> ProbeResult | None:
    """Return the probe's result; None unless there are three scenes and all have samples."""
    if sum(len(scene.features) > 0 for scene in data) < max(3, len(data)):
        return None
    return cross_validate(data)


def _sum_errors(name: str, result: ProbeResult | None, scenes: int, outputs: slice) -> Sums:
    """Sum squares, and lengths of the error vector, over some outputs of a probe."""
    sums = {f"{name}_{kind}": np.zeros((scenes, 2)) for kind in ("squares", "errors")}
    if result is not None:
        sums[f"{name}_squares"] = result.squares[:, outputs].sum(axis=1)
        for index, error in enumerate(result.errors):
            lengths = error[:, outputs].norm(dim=-1)
            sums[f"{name}_errors"][index] = lengths.sum().item(), len(lengths)
    return sums


@dataclass(frozen=True)
class SceneSet:
    """Scenes with the hash that identifies them."""

    key: str
    scenes: list[Scene]
    max_depth: float = 10.0  # m, depth beyond it counts as unknown


@dataclass(frozen=True)
class Sweep:
    """Sums of all measured features, and the prior's features that a policy would use."""

    sums: dict[FeatureSpec, Sums]
    default: FeatureSpec

    def table(self) -> dict[FeatureSpec, dict[str, Estimate]]:
        """Return all metrics of all features."""
        return {
            spec: {name: metric.value(sums) for name, metric in METRICS.items()}
            for spec, sums in self.sums.items()
        }

    def main_specs(self) -> list[FeatureSpec]:
        """Return the features of the main table: the prior's default, its copy's, and all without layers."""
        place = (self.default.layer, self.default.noise_level)
        return [spec for spec in self.sums if spec.layer is None or (spec.layer, spec.noise_level) == place]

    def untrained_copy(self) -> FeatureSpec | None:
        """Return the untrained copy's features at the default layer and noise level; None without a copy."""
        copy = FeatureSpec(UNTRAINED, self.default.layer, self.default.noise_level)
        return copy if copy in self.sums else None

    def gains(self, other: FeatureSpec) -> dict[str, Estimate]:
        """Return by how much the prior's default features are better than others, per headline metric."""
        return {name: METRICS[name].gain(self.sums[self.default], self.sums[other]) for name in HEADLINE}


def run_sweep(
    scenes: SceneSet,
    extractors: Sequence[FeatureExtractor],
    default: FeatureSpec,
    measurement: Measurement,
    cache: Path,
) -> Sweep:
    """Measure all features of all extractors, except those that the folder `cache` holds."""
    geometry = [
        token_geometry(scene.views, measurement.grid, len(scene.objects), scenes.max_depth)
        for scene in scenes.scenes
    ]
    frames = frames_of(scenes.scenes)
    results: dict[FeatureSpec, Sums] = {}
    for extractor in extractors:
        key = {"scenes": scenes.key, "max_depth": scenes.max_depth, "weights": extractor.fingerprint}
        key["measurement"] = asdict(measurement)
        files = {spec: cache / f"{cache_key(spec=asdict(spec), **key)}.npz" for spec in extractor.specs}
        missing = [spec for spec, path in files.items() if not path.is_file()]
        if missing:
            extracted = extractor.extract(frames, missing)
            for spec, tokens in tqdm(extracted, f"Measuring {extractor.name}", len(missing), unit="layer"):
                sums = measure(tokens, scenes.scenes, geometry, measurement)
                with atomic_file(files[spec]) as draft, draft.open("wb") as file:
                    np.savez(file, **sums)  # pyright: ignore[reportArgumentType]
        for spec, path in files.items():
            with np.load(path) as stored:
                results[spec] = dict(stored)
    return Sweep(results, default)
