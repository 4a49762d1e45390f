"""What stands in a scene, box by box, and arrangements that no task draws: things anywhere on the table.

A suite's own draws differ by 2 to 3 cm, so that a question about them can be answered without looking.
Scattered scenes are still (they are pictures, never played): things keep the way they lay, turned about the
vertical, and some are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.panda import COLLISION_GROUP, PandaEnv
from envs.rendering import load_mujoco
from envs.views import model_and_data, refresh, rotation_about
from vega_policy.analysis.scenes import NOTHING, Thing

ROOT = "_main"  # ending of the body that carries an object of robosuite or LIBERO
SPOKEN = {
    "akita black bowl": "black bowl",
    "glazed rim porcelain ramekin": "ramekin",
    "cookies": "cookie box",
    "flat stove": "stove",
}
"""What people call an object whose name in the simulator says more."""

REACH = np.array([0.2, 0.26])  # half extents (x, y) in metres of the area in which things are scattered
GAP = 0.01  # m between two things
TRIES = 2000
AWAY = np.array([0.0, 0.0, -20.0])  # where things go that are left out


@dataclass(frozen=True)
class Body:
    """A thing of the simulation.

    Attributes:
        name: Unique, such as "black bowl 1".
        category: Such as "black bowl".
        root: Id of its root body.
        geoms: Ids of the geoms that are to be seen.
        joint: First of the seven values of its free joint in qpos; None for furniture.
    """

    name: str
    category: str
    root: int
    geoms: tuple[int, ...]
    joint: int | None


def bodies(env: PandaEnv) -> list[Body]:
    """Things of an environment: objects and furniture, without robot, table and walls."""
    mujoco = load_mujoco()
    model, _ = model_and_data(env)
    roots = model.body_rootid[model.geom_bodyid]
    found = []
    for root in range(model.nbody):
        name = model.body(root).name
        geoms = np.flatnonzero((roots == root) & (model.geom_group != COLLISION_GROUP))
        if model.body_parentid[root] != 0 or not name.endswith(ROOT) or "table" in name or not len(geoms):
            continue
        words = name.removesuffix(ROOT).replace("_", " ")
        category = re.sub(r" \d+$", "", words)
        number = words.removeprefix(category)
        joint = model.body_jntadr[root]
        free = joint >= 0 and model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE
        spoken = SPOKEN.get(category, category)
        address = int(model.jnt_qposadr[joint]) if free else None
        found.append(Body(spoken + number, spoken, root, tuple(geoms.tolist()), address))
    return found


def thing_of_geom(env: PandaEnv, things: list[Body]) -> np.ndarray:
    """Index of the thing that each geom belongs to, [geoms], or `NOTHING`."""
    model, _ = model_and_data(env)
    owner = np.full(model.ngeom, NOTHING)
    for index, thing in enumerate(things):
        owner[list(thing.geoms)] = index
    return owner


def base_pose(env: PandaEnv) -> np.ndarray:
    """Pose [4 4] of the robot's base in the simulator's world."""
    _, data = model_and_data(env)
    pose = np.eye(4)
    pose[:3, :3] = data.body("robot0_base").xmat.reshape(3, 3)
    pose[:3, 3] = data.body("robot0_base").xpos
    return pose


def vertices(env: PandaEnv, thing: Body) -> np.ndarray:
    """Corners [n 3] of all that is to be seen of a thing, in the simulator's world.

    Those of its meshes, and of the box about any other shape.
    """
    mujoco = load_mujoco()
    model, data = model_and_data(env)
    clouds = []
    for geom in thing.geoms:
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            start = model.mesh_vertadr[mesh]
            local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(np.float64)
        else:
            signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3)
            local = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
        clouds.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(clouds)


def boxes(env: PandaEnv, things: list[Body]) -> list[Thing]:
    """Bounding boxes of things where they are now, in the frame of the robot's base."""
    _, data = model_and_data(env)
    base, described = base_pose(env), []
    for thing in things:
        cloud = vertices(env, thing)
        seen = (cloud - base[:3, 3]) @ base[:3, :3]
        low, high = seen.min(axis=0), seen.max(axis=0)
        own = cloud @ data.xmat[thing.root].reshape(3, 3)
        described.append(
            Thing(
                thing.name,
                thing.category,
                _triple((low + high) / 2),
                _triple(high - low),
                float(np.ptp(own, axis=0).max()),
                thing.joint is not None,
            )
        )
    return described


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


class Scatter:
    """Puts the things of an environment anywhere on the table, again and again.

    Args:
        env: An environment that has been reset; where its things stand now says how they lie and how high.
        presence: Probability with which a movable thing is there at all.

    Raises:
        ValueError: If nothing can be moved.
    """

    def __init__(self, env: PandaEnv, presence: float = 0.75) -> None:
        self._env, self.presence, self.things = env, presence, bodies(env)
        self._mujoco = load_mujoco()
        self._model, self._data = model_and_data(env)
        clouds = {thing.name: vertices(env, thing) for thing in self.things}
        self._movable = [thing for thing in self.things if thing.joint is not None]
        if not self._movable:
            raise ValueError(f"{env.task.name} has nothing that could be moved")
        self._poses = {thing.name: self._pose(thing) for thing in self._movable}
        self._clouds = {thing.name: clouds[thing.name] for thing in self._movable}
        self._furniture = [clouds[thing.name] for thing in self.things if thing.joint is None]
        self.support = min(cloud[:, 2].min() for cloud in self._clouds.values())
        places = [_footprint(cloud).mean(axis=0) for cloud in clouds.values()]
        self.middle = np.append(np.mean(places, axis=0), self.support)

    def draw(self, rng: np.random.Generator) -> list[Body]:
        """Arrange anew; returns the things that are there, furniture included, in the order of `things`.

        Raises:
            RuntimeError: If there is no room.
        """
        there = [thing for thing in self._movable if rng.random() < self.presence]
        for _ in range(TRIES):
            taken = [_footprint(cloud) for cloud in self._furniture]
            if all(self._put(thing, rng, taken) for thing in there):
                break
        else:
            raise RuntimeError(f"no room for {len(there)} things in {TRIES} tries")
        for thing in self._movable:
            if thing not in there:
                self._write(thing, AWAY, self._poses[thing.name][3:])
        refresh(self._env)
        return [thing for thing in self.things if thing in there or thing.joint is None]

    def _put(self, thing: Body, rng: np.random.Generator, taken: list[np.ndarray]) -> bool:
        """Put a thing where there is room, and take that; False if none was found quickly."""
        pose, cloud = self._poses[thing.name], self._clouds[thing.name]
        for _ in range(20):
            turn = rotation_about(np.array([0.0, 0.0, 1.0]), rng.uniform(-np.pi, np.pi))
            place = np.append(self.middle[:2] + rng.uniform(-REACH, REACH), 0.0)
            moved = (cloud - pose[:3]) @ turn.T + place
            box = _footprint(moved)
            if any(_overlap(box, other) for other in taken):
                continue
            place[2] = self.support - moved[:, 2].min()
            quaternion = np.empty(4)
            self._mujoco.mju_mat2Quat(quaternion, (turn @ _matrix(self._mujoco, pose[3:])).ravel())
            self._write(thing, place, quaternion)
            taken.append(box)
            return True
        return False

    def _pose(self, thing: Body) -> np.ndarray:
        assert thing.joint is not None
        return np.array(self._data.qpos[thing.joint : thing.joint + 7])

    def _write(self, thing: Body, place: np.ndarray, quaternion: np.ndarray) -> None:
        assert thing.joint is not None
        self._data.qpos[thing.joint : thing.joint + 7] = np.concatenate([place, quaternion])


def _footprint(cloud: np.ndarray) -> np.ndarray:
    """Lowest and highest x and y, [2 2]."""
    return np.stack([cloud[:, :2].min(axis=0), cloud[:, :2].max(axis=0)])


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    return bool((first[0] < second[1] + GAP).all() and (second[0] < first[1] + GAP).all())


def _matrix(mujoco: Any, quaternion: np.ndarray) -> np.ndarray:
    flat = np.empty(9)
    mujoco.mju_quat2Mat(flat, quaternion)
    return flat.reshape(3, 3)
