"""Posed RGB-D pictures of a simulation, with the body under each pixel: for analysis, never for a policy.

Cameras follow the conventions of `vega_policy.data.scenes`. Pictures are the ones that policies get,
mirrored where a family mirrors them; the camera matrices say so.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.demos import demonstrate
from envs.rendering import UNSEEN_GROUP, apply_profile, load_mujoco, profile
from envs.robosuite import COLLISION_GROUP, PandaEnv
from vega_policy.data.scenes import NO_OBJECT, Scene, SceneObject, Views, save_scene

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
            thing_of_geom: Index of the thing to which each geom belongs, [geoms], or `NO_OBJECT`.
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
        segments = np.where(kinds == self._geom, thing_of_geom[geoms], NO_OBJECT).astype(np.int16)
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
    """Index of the thing that each geom belongs to, [geoms], or `NO_OBJECT`."""
    model, _ = model_and_data(env)
    owner = np.full(model.ngeom, NO_OBJECT)
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


def boxes(env: PandaEnv, things: list[Body]) -> list[SceneObject]:
    """Bounding boxes of things where they are now, in the frame of the robot's base."""
    _, data = model_and_data(env)
    base, described = base_pose(env), []
    for thing in things:
        cloud = vertices(env, thing)
        seen = (cloud - base[:3, 3]) @ base[:3, :3]
        low, high = seen.min(axis=0), seen.max(axis=0)
        own = cloud @ data.xmat[thing.root].reshape(3, 3)
        described.append(
            SceneObject(
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


LAYOUTS = ("scattered", "task")
ARC = np.radians(50.0)  # largest turn to either side of the suite's own camera
PAN = (-0.2, 0.0, 0.2)  # m, to the right of the scene's middle: where the close-ups look
CLOSE_UP = np.radians(17.0)  # their vertical field of view


def arc(count: int, rng: np.random.Generator) -> list[Viewpoint]:
    """Views along an arc about the scene, each a little higher, lower, nearer or farther than the last."""
    turns = np.linspace(-ARC, ARC, count) + rng.uniform(-1, 1, count) * ARC / (2 * count)
    return [
        Viewpoint(
            turn=float(turn), climb=float(rng.uniform(-0.1, 0.2)), distance=float(rng.uniform(0.9, 1.15))
        )
        for turn in turns
    ]


def overview_and_pan(count: int, rng: np.random.Generator) -> list[Viewpoint]:
    """What the suite's own camera sees, then three close-ups in which it pans from one side to the other."""
    order = PAN if rng.random() < 0.5 else PAN[::-1]
    return [Viewpoint(), *(Viewpoint(aim=aim, field=float(CLOSE_UP)) for aim in order)]


SHOTS: dict[str, Callable[[int, np.random.Generator], list[Viewpoint]]] = {
    "arc": arc,
    "overview_and_pan": overview_and_pan,
}
"""Name -> function of (number of views, generator) that gives the viewpoints of one scene."""


@dataclass(frozen=True)
class SceneSpec:
    """Which scenes are wanted.

    Attributes:
        suite: Name of a robosuite or LIBERO suite.
        tasks: Tasks between which scenes are dealt.
        count: Number of scenes.
        layout: `scattered` (things anywhere on the table, some left out) or `task` (as the task draws them).
        shots: Key of `SHOTS`.
        views: Views a scene, where the shots leave it open.
        frame_size: Side of the square pictures in pixels.
        rendering: Rendering profile.
        camera: The simulation's camera that views are relative to.
        seed: Of everything.
    """

    suite: str
    tasks: tuple[int, ...] = (0, 1)
    count: int = 24
    layout: str = "scattered"
    shots: str = "arc"
    views: int = 6
    frame_size: int = 224
    rendering: str = "fast"
    camera: str = "agentview"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names and empty orders.

        Raises:
            ValueError: Naming the field.
        """
        for name, known in (("layout", LAYOUTS), ("shots", tuple(SHOTS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.tasks or self.count < 1 or self.views < 2:
            raise ValueError(
                f"expected a task, a scene and two views at least; got tasks {self.tasks}, count "
                f"{self.count}, views {self.views}"
            )


def write_scenes(folder: Path, processes: int = 1, **order: Any) -> list[Path]:
    """Write the scenes that are missing.

    Args:
        folder: Gets one file a scene; belongs to this order alone.
        processes: Worker processes; they change the time it takes, not what is written.
        **order: Fields of `SceneSpec`; scene i is of task i modulo the number of tasks.

    Returns:
        The scenes' files, in order.
    """
    wanted = SceneSpec(**{**order, "tasks": tuple(order.get("tasks", SceneSpec.tasks))})
    paths = [folder / f"{index:04d}.npz" for index in range(wanted.count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    jobs = [
        (folder, wanted, task, [index for index in missing if index % len(wanted.tasks) == place])
        for place, task in enumerate(wanted.tasks)
    ]
    jobs = [job for job in jobs if job[-1]]
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            _write(*job)
        return paths
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's rendering context
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        for done in [pool.submit(_write, *job) for job in jobs]:
            done.result()
    return paths


def _write(folder: Path, order: SceneSpec, task: int, indices: list[int]) -> None:
    """Draw and photograph the scenes of one task."""
    env = envs.make(order.suite, task, render=False)
    if not isinstance(env, PandaEnv):
        env.close()
        raise ValueError(f"still scenes are made of robosuite's and LIBERO's suites; got {order.suite!r}")
    try:
        env.reset_blindly(seed=order.seed)
        with PosedCamera(
            env, camera=order.camera, frame_size=order.frame_size, rendering=order.rendering
        ) as camera:
            scatter = Scatter(env)
            for index in indices:
                rng = np.random.default_rng((order.seed, index))
                there = bodies(env)
                if order.layout == "scattered":
                    there = scatter.draw(rng)
                else:
                    env.reset_blindly(seed=order.seed + index)
                viewpoints = SHOTS[order.shots](order.views, rng)
                owner = thing_of_geom(env, there)
                views = camera.take(viewpoints, scatter.middle, base_pose(env), owner)
                name = f"{order.suite}/{task}/{index}"
                # Written aside and renamed: a file that is there is whole.
                draft = folder / f"{index:04d}.part"
                save_scene(Scene(name, views, tuple(boxes(env, there))), draft)
                draft.rename(folder / f"{index:04d}.npz")
    finally:
        env.close()


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode is wanted.

    Attributes:
        suite: Name of a robosuite or LIBERO suite.
        task: Index of its task.
        seed: Seed of the episode.
        every: Steps of control from one picture to the next.
        steps: Steps after which it is cut.
        frame_size: Side of the square pictures in pixels.
        rendering: Rendering profile.
        camera: The simulation's camera.
    """

    suite: str
    task: int = 0
    seed: int = 0
    every: int = 4
    steps: int = 160
    frame_size: int = 224
    rendering: str = "fast"
    camera: str = "agentview"


def write_episode(path: Path, **fields: Any) -> None:
    """Play an episode with the demonstrator and write it.

    The file is a scene whose views are the moments of the episode, its things where they stood at first; the
    actions [t a], the moments' steps [n] and the instruction lie in a second file, `<path>.actions.npz`.

    Args:
        path: The scene's file.
        **fields: Those of `EpisodeSpec`.

    Raises:
        ValueError: If the suite is of another family.
    """
    order = EpisodeSpec(**fields)
    env = envs.make(order.suite, order.task, render=False)
    if not isinstance(env, PandaEnv):
        env.close()
        raise ValueError(f"posed episodes are played in robosuite's and LIBERO's suites; got {order.suite!r}")
    try:
        env.reset_blindly(seed=order.seed)
        with PosedCamera(
            env, camera=order.camera, frame_size=order.frame_size, rendering=order.rendering
        ) as camera:
            scene, actions, moments = _play(env, camera, order)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path.with_suffix(".actions.npz"),
            actions=actions,
            moments=moments,
            instruction=np.array(env.task.instruction),
        )
        save_scene(scene, path)
    finally:
        env.close()


def _play(env: PandaEnv, camera: PosedCamera, order: EpisodeSpec) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Moments of the episode, its actions, and at which steps the moments were."""
    things = bodies(env)
    owner, described = thing_of_geom(env, things), tuple(boxes(env, things))
    shots, actions, moments = [], [], []
    for step, (executed, clean) in enumerate(demonstrate(env, rng=np.random.default_rng(order.seed))):
        if step % order.every == 0:
            shots.append(camera.take([Viewpoint()], np.zeros(3), base_pose(env), owner))
            moments.append(step)
        actions.append(clean)
        _, truncated = env.step_blindly(executed)
        if truncated or step + 1 >= order.steps:
            break
    fields = ("frames", "depth", "intrinsics", "poses", "segments")
    views = Views(*(np.concatenate([getattr(shot, field) for shot in shots]) for field in fields))
    return Scene(f"{order.suite}/{order.task}", views, described), np.stack(actions), np.array(moments)
