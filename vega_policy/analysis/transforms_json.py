"""A folder of posed RGB-D frames in nerfstudio's layout: `transforms.json` beside pictures and depth.

Poses there look along -z with y upwards (OpenGL); here they look along z with y downwards. Depth files are
16-bit pictures in millimetres or npy arrays in metres, along the optical axis.
"""

import json
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch

from vega_policy.analysis.scenes import NOTHING, Scene, Views
from vega_policy.observation import resize

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
    return Scene(folder.name, Views(*stacked, segments=np.full(stacked[1].shape, NOTHING, np.int16)))


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
