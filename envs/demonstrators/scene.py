"""What stands where: the collision geometry of a simulation as point clouds, body by body."""

from collections.abc import Collection
from typing import Any

import numpy as np

from envs.demonstrators.rotations import Array
from envs.demonstrators.surfaces import box_surface, cylinder_surface, sphere_surface
from envs.rendering import load_mujoco

ROBOT_PREFIXES = ("robot0", "gripper0", "mount0")
SUPPORTS = ("world", "floor", "table")  # endings of what objects stand on: no obstacle to a hand above it


class Scene:
    """Point clouds (world frame, metres) of every colliding body of one robosuite simulation.

    Shapes are sampled once; each query only places the sampled points at the bodies' present poses.
    """

    def __init__(self, sim: Any) -> None:
        """Samples the shapes of `sim`, the `MjSim` of a robosuite 1.4 environment."""
        self._mujoco = load_mujoco()
        self.model: Any = sim.model._model
        self.data: Any = sim.data._data
        self._shapes: dict[int, Array] = {}  # geom id -> points in the frame of the geom
        self._geoms: dict[str, list[int]] = {}  # body name -> ids of its colliding geoms
        for geom in range(self.model.ngeom):
            points = self._sample(geom)
            if points is not None:
                self._shapes[geom] = points
                self._geoms.setdefault(self.model.body(self.model.geom_bodyid[geom]).name, []).append(geom)

    def _sample(self, geom: int) -> Array | None:
        """Surface points of one geom in its own frame; None where it never collides or is a plane."""
        model, size, kinds = self.model, self.model.geom_size[geom], self._mujoco.mjtGeom
        if model.geom_contype[geom] == 0 and model.geom_conaffinity[geom] == 0:
            return None
        match model.geom_type[geom]:
            case kinds.mjGEOM_BOX:
                return box_surface(size)
            case kinds.mjGEOM_CYLINDER:
                return cylinder_surface(size[0], size[1])
            case kinds.mjGEOM_CAPSULE:
                return cylinder_surface(size[0], size[0] + size[1])
            case kinds.mjGEOM_SPHERE:
                return sphere_surface(size[0])
            case kinds.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
                return np.array(model.mesh_vert[start : start + count], dtype=np.float64)
            case _:
                return None

    def refresh(self) -> None:
        """Brings poses in line with the joints: after a simulation step they lag one substep behind."""
        self._mujoco.mj_kinematics(self.model, self.data)

    def __contains__(self, body: str) -> bool:
        """True if `body` has collision geometry here."""
        return body in self._geoms

    @property
    def bodies(self) -> list[str]:
        """Names of all bodies with collision geometry, the robot's included."""
        return list(self._geoms)

    def geoms(self, body: str) -> list[int]:
        """Ids of the colliding geoms of `body`.

        Raises:
            KeyError: `body` has no collision geometry; the message lists those that have.
        """
        if body not in self._geoms:
            raise KeyError(
                f"no body {body!r} with collision geometry in this scene; known: {sorted(self._geoms)}"
            )
        return self._geoms[body]

    def geom_cloud(self, geom: int) -> Array:
        """Points [n 3] of one geom, placed in the world."""
        rotation = self.data.geom_xmat[geom].reshape(3, 3)
        return self._shapes[geom] @ rotation.T + self.data.geom_xpos[geom]

    def cloud(self, body: str) -> Array:
        """Points [n 3] on `body`, where it is now."""
        return np.concatenate([self.geom_cloud(geom) for geom in self.geoms(body)])

    def obstacles(self, excluded: Collection[str] = ()) -> Array:
        """Points [n 3] on everything that is neither robot, support, nor one of the `excluded` bodies."""
        clouds = [self.cloud(body) for body in self._geoms if not self._passes(body, excluded)]
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))

    @staticmethod
    def _passes(body: str, excluded: Collection[str]) -> bool:
        return body in excluded or body.endswith(SUPPORTS) or body.startswith(ROBOT_PREFIXES)

    def position(self, body: str) -> Array:
        """Origin [3] of `body` in the world (m)."""
        return np.array(self.data.body(body).xpos)

    def rotation(self, body: str) -> Array:
        """Rotation matrix [3 3] of `body` in the world."""
        return np.array(self.data.body(body).xmat).reshape(3, 3)

    def bottom(self, body: str) -> float:
        """Height of the lowest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].min())

    def top(self, body: str) -> float:
        """Height of the highest point of `body` (m)."""
        return float(self.cloud(body)[:, 2].max())
