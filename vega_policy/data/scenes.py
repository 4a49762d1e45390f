"""Scenes and demonstrations that are analysed; their file formats.

A scene is several posed RGB-D views of one still world with the objects in it. A demonstration is moments of
an episode as a policy observes them, with the paths of hand and objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vega_policy.run_dir import atomic_file

NO_OBJECT = -1
"""Value of `Views.segments` where a pixel belongs to none of the scene's objects."""


@dataclass(frozen=True)
class Views:
    """Posed RGB-D frames in the order in which a camera would take them.

    A camera's frame has x to the right, y down and z along the optical axis. Pixel coordinates (0, 0) are the
    image's upper left corner. A mirrored image has a negative focal length.
    """

    frames: np.ndarray  # uint8 [n h w 3]
    depth: np.ndarray  # float32 [n h w], m along the optical axis; 0 where unknown
    intrinsics: np.ndarray  # float64 [n 3 3], pixels
    poses: np.ndarray  # float64 [n 4 4], camera to world; a simulated world is the frame of the robot's base
    segments: np.ndarray  # int16 [n h w], index of the scene's object under each pixel, or `NO_OBJECT`

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 [n h w 3]; got {self.frames.dtype} {self.frames.shape}")
        n, h, w, _ = self.frames.shape
        expected = {"depth": (n, h, w), "intrinsics": (n, 3, 3), "poses": (n, 4, 4), "segments": (n, h, w)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene; lengths in metres, in the frame of the robot's base."""

    name: str  # unique in the scene, such as "black bowl 1"
    category: str  # such as "black bowl"
    centre: tuple[float, float, float]  # of its axis-aligned bounding box
    size: tuple[float, float, float]  # sides of that box
    longest: float  # longest side of its box in its own frame, however it is turned
    movable: bool  # False for furniture


@dataclass(frozen=True)
class Scene:
    """A still world, the views taken of it and its objects (empty where they are unknown)."""

    name: str  # unique among the scenes of one measurement
    views: Views
    objects: tuple[SceneObject, ...] = ()


def save_scene(scene: Scene, path: Path) -> None:
    """Write a scene as one npz file; depth is rounded to half precision (under 1 mm at 1 m)."""
    views = {field.name: getattr(scene.views, field.name) for field in fields(Views)}
    views["depth"] = scene.views.depth.astype(np.float16)
    description = json.dumps({"name": scene.name, "objects": [asdict(one) for one in scene.objects]})
    with atomic_file(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, description=np.array(description), **views)


def load_scene(path: Path) -> Scene:
    """Read what `save_scene` wrote."""
    with np.load(path) as stored:
        description: dict[str, Any] = json.loads(str(stored["description"]))
        views = {field.name: stored[field.name] for field in fields(Views)}
    views["depth"] = views["depth"].astype(np.float32)
    objects = [
        SceneObject(**{**one, "centre": tuple(one["centre"]), "size": tuple(one["size"])})
        for one in description["objects"]
    ]
    return Scene(description["name"], Views(**views), tuple(objects))


@dataclass(frozen=True)
class Demonstration:
    """Moments of an episode, and where hand and movable parts are at each of its t control steps."""

    name: str  # unique among the episodes of one measurement, such as "libero_goal/3/0"
    task: str  # such as "libero_goal/3"
    instruction: str
    steps: np.ndarray  # of the moments, int64 [n]
    frames: np.ndarray  # uint8 [n v h w 3], of all cameras
    state: np.ndarray  # float32 [n s], proprioceptive
    gripper: np.ndarray  # float64 [t 3], m
    objects: tuple[str, ...]  # kind of each movable part, such as "black bowl"
    positions: np.ndarray  # float64 [t k 3], m

    def __post_init__(self) -> None:
        n, t = len(self.steps), len(self.gripper)
        lengths = {"frames": n, "state": n, "positions": t}
        wrong = {
            name: len(getattr(self, name)) for name, x in lengths.items() if len(getattr(self, name)) != x
        }
        if wrong or self.positions.shape[1:] != (len(self.objects), 3):
            raise ValueError(
                f"{self.name}: expected {n} moments of {t} steps with the positions of {len(self.objects)} "
                f"objects; got {wrong or self.positions.shape}"
            )


def save_demonstrations(demonstrations: Sequence[Demonstration], path: Path) -> None:
    """Write demonstrations as one npz file."""
    stored: dict[str, np.ndarray] = {"count": np.array(len(demonstrations))}
    for index, one in enumerate(demonstrations):
        stored |= {f"{index}/{part.name}": np.array(getattr(one, part.name)) for part in fields(one)}
    with atomic_file(path) as draft, draft.open("wb") as file:
        np.savez(file, **stored)  # pyright: ignore[reportArgumentType]


def load_demonstrations(path: Path) -> list[Demonstration]:
    """Read what `save_demonstrations` wrote."""
    found = []
    with np.load(path) as stored:
        for index in range(int(stored["count"])):
            values: dict[str, Any] = {
                part.name: stored[f"{index}/{part.name}"] for part in fields(Demonstration)
            }
            values |= {name: str(values[name]) for name in ("name", "task", "instruction")}
            values["objects"] = tuple(values["objects"].tolist())
            found.append(Demonstration(**values))
    return found
