"""Scenes: several views of one still world, with cameras, depth and what stands in it; on disk and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

NOTHING = -1
"""Value of `Views.segments` where a pixel belongs to none of the scene's things."""


@dataclass(frozen=True)
class Views:
    """Posed RGB-D frames in the order in which a camera would take them; conventions as in `cameras`.

    Attributes:
        frames: uint8 [n h w 3].
        depth: float32 [n h w] in metres along the optical axis; 0 where unknown.
        intrinsics: float64 [n 3 3] in pixels.
        poses: float64 [n 4 4], camera to world; a simulated scene's world is the frame of the robot's base.
        segments: int16 [n h w], index of the scene's thing under each pixel, or `NOTHING`.
    """

    frames: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    poses: np.ndarray
    segments: np.ndarray

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            ValueError: If a field does not fit the frames.
        """
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 [n h w 3]; got {self.frames.dtype} {self.frames.shape}")
        n, h, w, _ = self.frames.shape
        expected = {
            "depth": (n, h, w),
            "intrinsics": (n, 3, 3),
            "poses": (n, 4, 4),
            "segments": (n, h, w),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    def __len__(self) -> int:
        return len(self.frames)

    def pick(self, indices: list[int]) -> Views:
        """Some of the views, in this order."""
        return Views(*(getattr(self, field.name)[indices] for field in fields(self)))


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        name: What tells it from all others, such as "black bowl 1".
        category: What it is called, such as "black bowl".
        centre: Centre [3] of its bounding box in the robot's frame (m).
        size: Sides [3] of that box, which is parallel to the axes of the robot's frame (m).
        longest: Longest side of its box in the thing's own frame, however it is turned (m).
        movable: False for furniture.
    """

    name: str
    category: str
    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    longest: float
    movable: bool


@dataclass(frozen=True)
class Scene:
    """A still world and the pictures taken of it.

    Attributes:
        name: Unique among the scenes of one measurement.
        views: The pictures.
        things: What stands in it; empty where nobody knows.
    """

    name: str
    views: Views
    things: tuple[Thing, ...] = ()


def save_scene(scene: Scene, path: Path) -> None:
    """Write a scene as one npz file; depth is rounded to half precision (under 1 mm at 1 m)."""
    views = {field.name: getattr(scene.views, field.name) for field in fields(Views)}
    views["depth"] = scene.views.depth.astype(np.float16)
    words = json.dumps({"name": scene.name, "things": [asdict(thing) for thing in scene.things]})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, words=np.array(words), **views)


def load_scene(path: Path) -> Scene:
    """Read what `save_scene` wrote."""
    with np.load(path) as stored:
        words: dict[str, Any] = json.loads(str(stored["words"]))
        views = {field.name: stored[field.name] for field in fields(Views)}
    views["depth"] = views["depth"].astype(np.float32)
    things = [
        Thing(**{**thing, "centre": tuple(thing["centre"]), "size": tuple(thing["size"])})
        for thing in words["things"]
    ]
    return Scene(words["name"], Views(**views), tuple(things))
