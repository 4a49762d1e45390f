"""Posed RGB-D pictures of a simulation, with the body under each pixel: for analysis, never for a policy.

Cameras follow the conventions of `vega_policy.analysis.cameras`. Pictures are the ones that policies get,
mirrored where a family mirrors them; the camera matrices say so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.panda import COLLISION_GROUP, PandaEnv
from envs.rendering import UNSEEN_GROUP, apply_profile, load_mujoco, profile
from vega_policy.analysis.scenes import NOTHING, Views

OPENGL = np.diag([1.0, -1.0, -1.0])  # MuJoCo's cameras look along -z with y upwards
FARTHEST = 20.0  # m; beyond it depth counts as unknown


@dataclass(frozen=True)
class Viewpoint:
    """A camera, told relative to one of the simulation's own and to the middle of the scene.

    Attributes:
        turn: Angle about the vertical through the middle (rad).
        climb: Angle about the camera's horizontal axis through the middle, upwards positive (rad).
        distance: Distance to the middle, in shares of the original one.
        aim: None keeps the camera's own direction relative to the middle; a number points its optical axis
            at the place so many metres to the right of the middle, as the camera sees it.
        field: Vertical field of view (rad); None takes the camera's own.
    """

    turn: float = 0.0
    climb: float = 0.0
    distance: float = 1.0
    aim: float | None = None
    field: float | None = None


def moved_pose(pose: np.ndarray, middle: np.ndarray, viewpoint: Viewpoint) -> np.ndarray:
    """Pose [4 4] of a camera after it moved about the middle [3] of a scene as a viewpoint says."""
    turn = rotation_about(np.array([0.0, 0.0, 1.0]), viewpoint.turn)
    climb = rotation_about(turn @ pose[:3, 0], -viewpoint.climb)
    moved = np.eye(4)
    moved[:3, :3] = climb @ turn @ pose[:3, :3]
    moved[:3, 3] = middle + viewpoint.distance * climb @ turn @ (pose[:3, 3] - middle)
    if viewpoint.aim is not None:
        forward = middle + viewpoint.aim * moved[:3, 0] - moved[:3, 3]
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        moved[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    return moved


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix [3 3] about a unit axis (Rodrigues' formula)."""
    cross = np.cross(np.eye(3), axis)  # cross.T @ v = axis x v
    return np.eye(3) - math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


class PosedCamera:
    """Takes RGB-D pictures of a Panda's environment from anywhere; a context manager.

    Args:
        env: A robosuite or LIBERO environment made with `render=False`; its model follows the profile.
        camera: The simulation's camera that viewpoints are relative to.
        frame_size: Side of the square pictures in pixels.
        rendering: Name of a rendering profile.

    Raises:
        TypeError: If the environment is of another family.
    """

    def __init__(
        self, env: PandaEnv, *, camera: str = "agentview", frame_size: int = 224, rendering: str = "fast"
    ) -> None:
        if not isinstance(env, PandaEnv):
            raise TypeError(
                f"posed pictures are taken of robosuite's and LIBERO's environments; got {type(env).__name__}"
            )
        mujoco = load_mujoco()
        self._env, self._size = env, frame_size
        self.model, self.data = model_and_data(env)
        self._camera = self.model.camera(camera).id
        apply_profile(self.model, profile(rendering))
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = frame_size
        self._renderer: Any = mujoco.Renderer(self.model, frame_size, frame_size, max_geom=10_000)
        self._options = mujoco.MjvOption()
        for group in (COLLISION_GROUP, UNSEEN_GROUP):
            self._options.geomgroup[group] = 0
        self._solid = copy.copy(self._options)
        self._solid.sitegroup[:] = 0  # markers that are transparent in a picture have depth all the same
        self._geom = int(mujoco.mjtObj.mjOBJ_GEOM)

    def __enter__(self) -> PosedCamera:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the rendering context."""
        self._renderer.close()

    @property
    def pose(self) -> np.ndarray:
        """The simulation's own pose of the camera, in its world, [4 4]."""
        pose = np.eye(4)
        pose[:3, :3] = self.data.cam_xmat[self._camera].reshape(3, 3) @ OPENGL
        pose[:3, 3] = self.data.cam_xpos[self._camera]
        return pose

    def take(
        self, viewpoints: list[Viewpoint], middle: np.ndarray, base: np.ndarray, thing_of_geom: np.ndarray
    ) -> Views:
        """Take pictures.

        Args:
            viewpoints: From where.
            middle: Point [3] of the simulator's world that viewpoints are relative to.
            base: Pose [4 4] of the robot's base; the views' world is its frame.
            thing_of_geom: Index of the thing to which each geom belongs, [geoms], or `NOTHING`.
        """
        refresh(self._env)
        from_base, shots = np.linalg.inv(base), []
        for viewpoint in viewpoints:
            pose = moved_pose(self.pose, middle, viewpoint)
            shots.append((*self._shoot(pose, viewpoint.field, thing_of_geom), from_base @ pose))
        frames, depth, intrinsics, segments, poses = (np.stack(part) for part in zip(*shots, strict=True))
        return Views(frames, depth, intrinsics, poses, segments)

    def picture(self, viewpoint: Viewpoint, middle: np.ndarray) -> np.ndarray:
        """A colour picture alone, which takes a third of the time.

        Args:
            viewpoint: From where.
            middle: Point [3] of the simulator's world that the viewpoint is relative to.

        Returns:
            uint8 [h w 3].
        """
        refresh(self._env)
        with self._placed(moved_pose(self.pose, middle, viewpoint), viewpoint.field):
            self._renderer.update_scene(self.data, camera=self._camera, scene_option=self._options)
            frame = self._renderer.render()
        return np.ascontiguousarray(np.flip(frame, self._env.flipped))

    def _shoot(
        self, pose: np.ndarray, field: float | None, thing_of_geom: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Picture, depth, camera matrix and segments from a pose in the simulator's world."""
        renderer, flipped = self._renderer, self._env.flipped
        with self._placed(pose, field) as fovy:
            renderer.update_scene(self.data, camera=self._camera, scene_option=self._options)
            frame = renderer.render().copy()
            renderer.update_scene(self.data, camera=self._camera, scene_option=self._solid)
            renderer.enable_depth_rendering()
            depth = renderer.render().astype(np.float32)
            renderer.disable_depth_rendering()
            renderer.enable_segmentation_rendering()
            geoms, kinds = np.moveaxis(renderer.render(), -1, 0)
            renderer.disable_segmentation_rendering()
        segments = np.where(kinds == self._geom, thing_of_geom[geoms], NOTHING).astype(np.int16)
        depth[depth > FARTHEST] = 0.0
        focal = self._size / 2 / math.tan(fovy / 2)
        signs = [-1.0 if axis in flipped else 1.0 for axis in (1, 0)]
        intrinsics = np.diag([focal * signs[0], focal * signs[1], 1.0])
        intrinsics[:2, 2] = self._size / 2
        upright = [np.ascontiguousarray(np.flip(picture, flipped)) for picture in (frame, depth, segments)]
        return upright[0], upright[1], intrinsics, upright[2]

    @contextmanager
    def _placed(self, pose: np.ndarray, field: float | None) -> Iterator[float]:
        """The camera at a pose, and back again; gives its vertical field of view (rad)."""
        model, data, camera = self.model, self.data, self._camera
        kept = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy(), float(model.cam_fovy[camera])
        data.cam_xpos[camera] = pose[:3, 3]
        data.cam_xmat[camera] = (pose[:3, :3] @ OPENGL).ravel()
        if field is not None:
            model.cam_fovy[camera] = math.degrees(field)
        try:
            yield math.radians(model.cam_fovy[camera])
        finally:
            data.cam_xpos[camera], data.cam_xmat[camera], model.cam_fovy[camera] = kept


def refresh(env: PandaEnv) -> None:
    """Bring poses in line with the joints, which they lag behind after a step."""
    mujoco = load_mujoco()
    model, data = model_and_data(env)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_camlight(model, data)


def model_and_data(env: PandaEnv) -> tuple[Any, Any]:
    """MuJoCo's model and data of an environment."""
    sim = env.raw.sim
    return sim.model._model, sim.data._data
