"""Posed RGB-D images of robosuite's and LIBERO's scenes with the object under each pixel, for analysis.

Also moments of demonstrations, with the paths of hand and objects. All images are those that policies
observe, mirrored where a family mirrors them; the camera matrices say so.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

import envs
from envs.demos import demonstrate
from envs.demos.states import StateEpisode, read_header, read_states
from envs.rendering import UNSEEN_GROUP, apply_profile, load_mujoco, profile
from envs.robosuite import COLLISION_GROUP, PandaEnv
from vega_policy.config import check_choices
from vega_policy.data.scenes import (
    NO_OBJECT,
    Demonstration,
    Scene,
    SceneObject,
    Views,
    save_demonstrations,
    save_scene,
)
from vega_policy.run_dir import atomic_file

OPENGL = np.diag([1.0, -1.0, -1.0])  # MuJoCo's cameras look along -z with y upwards
FARTHEST = 20.0  # m; beyond it depth counts as unknown
ROOT_SUFFIX = "_main"  # of the body that carries an object of robosuite or LIBERO
CATEGORIES = {
    "akita black bowl": "black bowl",
    "glazed rim porcelain ramekin": "ramekin",
    "cookies": "cookie box",
    "flat stove": "stove",
}
"""Everyday names of objects whose name in the simulator is longer."""

LAYOUT_REACH = np.array([0.2, 0.26])  # m; half extents (x, y) of the area of random layouts
GAP = 0.01  # m between two objects
MAX_LAYOUTS = 2000  # random layouts that are tried
AWAY = np.array([0.0, 0.0, -20.0])  # m; where absent objects are put

LAYOUTS = ("random", "task")
ARC = np.radians(50.0)  # largest turn to either side of the suite's own camera
PAN = (-0.2, 0.0, 0.2)  # m to the right of the scene's middle: targets of the close-ups
CLOSE_UP = np.radians(17.0)  # their vertical field of view


@dataclass(frozen=True)
class Viewpoint:
    """A camera relative to one of the simulation's own and to the middle of the scene."""

    turn: float = 0.0  # rad about the vertical through the middle, clockwise from above
    climb: float = 0.0  # rad about the camera's horizontal axis through the middle; positive is downwards
    distance: float = 1.0  # to the middle, as a multiple of the original one
    aim: float | None = None  # m to the right of the middle where the optical axis points; None keeps it
    field: float | None = None  # rad, vertical field of view; None keeps the camera's own


def arc(count: int, rng: np.random.Generator) -> list[Viewpoint]:
    """Return views along an arc about the scene, with random height and distance."""
    turns = np.linspace(-ARC, ARC, count) + rng.uniform(-1, 1, count) * ARC / (2 * count)
    return [
        Viewpoint(
            turn=float(turn), climb=float(rng.uniform(-0.1, 0.2)), distance=float(rng.uniform(0.9, 1.15))
        )
        for turn in turns
    ]


def overview_and_pan(count: int, rng: np.random.Generator) -> list[Viewpoint]:
    """Return the suite's own view, then three close-ups that pan from one side to the other."""
    order = PAN if rng.random() < 0.5 else PAN[::-1]
    return [Viewpoint(), *(Viewpoint(aim=aim, field=float(CLOSE_UP)) for aim in order)]


SHOTS: dict[str, Callable[[int, np.random.Generator], list[Viewpoint]]] = {
    "arc": arc,
    "overview_and_pan": overview_and_pan,
}
"""Name -> function of (number of views, generator) that gives the viewpoints of one scene."""


@dataclass(frozen=True)
class SceneSpec:
    """Scenes of a robosuite or LIBERO suite; scene i is of task i modulo the number of tasks."""

    suite: str
    tasks: tuple[int, ...] = (0, 1)
    count: int = 24
    layout: str = "random"  # objects anywhere on the table, some absent; or "task": as the task draws them
    shots: str = "arc"  # key of `SHOTS`
    views: int = 6  # per scene, where the shots leave it open
    frame_size: int = 224  # side of the square images in pixels
    rendering: str = "fast"
    camera: str = "agentview"  # the simulation's camera that views are relative to
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, "", layout=LAYOUTS, shots=SHOTS)
        if not self.tasks or self.count < 1 or self.views < 2:
            raise ValueError(
                f"expected a task, a scene and two views at least; got tasks {self.tasks}, count "
                f"{self.count}, views {self.views}"
            )


@dataclass(frozen=True)
class EpisodeSpec:
    """A demonstrated episode of a robosuite or LIBERO suite."""

    suite: str
    task: int = 0
    seed: int = 0
    every: int = 4  # control steps from one image to the next
    steps: int = 160  # after which it is cut
    frame_size: int = 224  # side of the square images in pixels
    rendering: str = "fast"
    camera: str = "agentview"  # the simulation's camera


@dataclass(frozen=True)
class DemonstrationSpec:
    """Moments of demonstrations in a file of simulator states, which `envs.demos.states` describes."""

    file: str
    tasks: tuple[int, ...] = (0, 1)
    episodes_per_task: int = 5  # the first ones in the file
    every: int = 8  # control steps from one moment to the next
    ahead: int = 32  # control steps of the episode behind its last moment, at least
    frame_size: int = 192  # side of the square images in pixels
    rendering: str = "fast"

    def __post_init__(self) -> None:
        if not self.tasks or min(self.episodes_per_task, self.every, self.ahead) < 1:
            raise ValueError(
                "expected a task, and episodes_per_task, every and ahead of at least 1; got tasks "
                f"{self.tasks}, {self.episodes_per_task}, {self.every} and {self.ahead}"
            )


def write_scenes(folder: Path, processes: int = 1, **values: Any) -> list[Path]:
    """Write the missing scenes of a `SceneSpec` (its fields are `values`); return all files, in order.

    The folder belongs to this spec alone. The number of worker processes does not change what is written.
    """
    spec = decode_spec(SceneSpec, values)
    paths = [folder / f"{index:04d}.npz" for index in range(spec.count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    jobs_per_task = math.ceil(processes / len(spec.tasks))  # at least one job a process
    groups = [
        (task, [index for index in missing if index % len(spec.tasks) == place])
        for place, task in enumerate(spec.tasks)
    ]
    jobs = [
        (folder, spec, task, group[first::jobs_per_task])
        for task, group in groups
        for first in range(jobs_per_task)
    ]
    for _ in run_jobs(_write_scenes_of_task, [job for job in jobs if job[-1]], processes):
        pass
    return paths


def _write_scenes_of_task(folder: Path, spec: SceneSpec, task: int, indices: list[int]) -> None:
    with closing(make_panda(spec.suite, task)) as env:
        env.reset_blindly(seed=spec.seed)
        with PosedCamera(
            env, camera=spec.camera, frame_size=spec.frame_size, rendering=spec.rendering
        ) as camera:
            layout = RandomLayout(env)
            for index in indices:
                rng = np.random.default_rng((spec.seed, index))
                if spec.layout == "random":
                    present = layout.draw(rng)
                else:
                    present = find_objects(env)
                    env.reset_blindly(seed=spec.seed + index)
                viewpoints = SHOTS[spec.shots](spec.views, rng)
                owner = object_of_geom(env, present)
                views = camera.take(viewpoints, layout.middle, base_pose(env), owner)
                name = f"{spec.suite}/{task}/{index}"
                scene = Scene(name, views, tuple(describe_objects(env, present)))
                save_scene(scene, folder / f"{index:04d}.npz")


def write_episode(path: Path, **values: Any) -> None:
    """Roll out the demonstrator on an `EpisodeSpec` (its fields are `values`) and write a scene.

    The scene's views are moments of the episode, its objects are where they were at first. The actions [t a],
    the moments' steps [n] and the instruction are in a second file, `<path>.actions.npz`.
    """
    spec = decode_spec(EpisodeSpec, values)
    with closing(make_panda(spec.suite, spec.task)) as env:
        env.reset_blindly(seed=spec.seed)
        with PosedCamera(
            env, camera=spec.camera, frame_size=spec.frame_size, rendering=spec.rendering
        ) as camera:
            scene, actions, moments = _roll_out(env, camera, spec)
        with atomic_file(path.with_suffix(".actions.npz")) as draft, draft.open("wb") as file:
            np.savez(file, actions=actions, moments=moments, instruction=np.array(env.task.instruction))
        save_scene(scene, path)


def _roll_out(env: PandaEnv, camera: PosedCamera, spec: EpisodeSpec) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Return moments of an episode as a scene, its actions, and the moments' steps."""
    objects = find_objects(env)
    owner, described = object_of_geom(env, objects), tuple(describe_objects(env, objects))
    shots, actions, moments = [], [], []
    for step, (executed, clean) in enumerate(demonstrate(env, rng=np.random.default_rng(spec.seed))):
        if step % spec.every == 0:
            shots.append(camera.take([Viewpoint()], np.zeros(3), base_pose(env), owner))
            moments.append(step)
        actions.append(clean)
        _, truncated = env.step_blindly(executed)
        if truncated or step + 1 >= spec.steps:
            break
    views = Views(*(np.concatenate([getattr(shot, part.name) for shot in shots]) for part in fields(Views)))
    return Scene(f"{spec.suite}/{spec.task}", views, described), np.stack(actions), np.array(moments)


def write_demonstrations(folder: Path, processes: int = 1, **values: Any) -> list[Path]:
    """Write the missing tasks of a `DemonstrationSpec` (its fields are `values`); return one file a task.

    The folder belongs to this spec alone.

    Raises:
        ValueError: If the file has too few demonstrations of a task, or one is too short.
    """
    spec = decode_spec(DemonstrationSpec, values)
    suite, listed = read_header(Path(spec.file))["suite"], read_header(Path(spec.file))["episodes"]
    for task in spec.tasks:
        lengths = [entry["length"] for entry in listed if entry["task"] == task][: spec.episodes_per_task]
        if len(lengths) < spec.episodes_per_task or min(lengths) <= spec.ahead:
            raise ValueError(
                f"{spec.file}: expected {spec.episodes_per_task} demonstrations of task {task} with more "
                f"than {spec.ahead} steps; got those of {lengths or 'no'} steps"
            )
    paths = {task: folder / f"{suite}-{task}.npz" for task in spec.tasks}
    jobs = [(path, spec, suite, task) for task, path in paths.items() if not path.is_file()]
    for _ in run_jobs(_write_demonstrations_of_task, jobs, processes):
        pass
    return list(paths.values())


def _write_demonstrations_of_task(path: Path, spec: DemonstrationSpec, suite: str, task: int) -> None:
    episodes = read_states(Path(spec.file), [task])[: spec.episodes_per_task]
    with closing(make_panda(suite, task, frame_size=spec.frame_size, rendering=spec.rendering)) as env:
        written = [_follow(env, episode, spec, index) for index, episode in enumerate(episodes)]
    save_demonstrations(written, path)


def _follow(env: PandaEnv, episode: StateEpisode, spec: DemonstrationSpec, index: int) -> Demonstration:
    """Render moments of a demonstration from all cameras and follow what can move through all its steps."""
    assert env.camera_rig is not None
    env.reset_blindly(seed=episode.seed)
    steps = np.arange(0, len(episode) - spec.ahead, spec.every)
    frames = list(env.camera_rig.render_states((episode.state(step) for step in steps.tolist()), env.restore))
    kinds, bodies, points = movable_parts(env)
    positions = []
    for step in range(len(episode)):
        env.restore(episode.state(step))
        turns = env.data.xmat[bodies].reshape(-1, 3, 3)
        positions.append(env.data.xpos[bodies] + (turns @ points[..., None])[..., 0])
    return Demonstration(
        name=f"{env.task.suite}/{env.task.index}/{index}",
        task=f"{env.task.suite}/{env.task.index}",
        instruction=env.task.instruction,
        steps=steps,
        frames=np.concatenate(frames),
        state=episode.proprioception[steps],
        gripper=episode.proprioception[:, :3].astype(np.float64),
        objects=tuple(kinds),
        positions=np.stack(positions),
    )


def movable_parts(env: PandaEnv) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return what can move beside the robot: kind of each part, its body [k], a point of the body [k 3].

    The point, in the body's frame, has the part's path. It is the body's origin, or of what turns about a
    hinge the corner farthest from the axis, so that a knob has a path, too.
    """
    mujoco, model = load_mujoco(), env.model
    kinds, bodies, points = [], [], []
    for joint in range(model.njnt):
        name, body = model.joint(joint).name, int(model.jnt_bodyid[joint])
        if name.startswith(("robot0", "gripper0")):
            continue
        is_free, point = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE, np.zeros(3)
        named = model.body(body).name.removesuffix(ROOT_SUFFIX) if is_free else name
        kind = re.sub(r"_\d+(?=_|$)", "", named).replace("_", " ")
        if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE:
            geoms = np.flatnonzero(model.body_weldid[model.geom_bodyid] == model.body_weldid[body])
            cloud = vertices(env, SimObject(kind, kind, body, tuple(geoms.tolist()), None))
            local = (cloud - env.data.xpos[body]) @ env.data.xmat[body].reshape(3, 3)
            away = np.cross(local - model.jnt_pos[joint], model.jnt_axis[joint])
            point = local[np.linalg.norm(away, axis=1).argmax()]
        kinds.append(CATEGORIES.get(kind, kind))
        bodies.append(body)
        points.append(point)
    return kinds, np.array(bodies), np.stack(points)


def decode_spec[T](cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a flat dataclass from plain values, with tuples for lists; refuse unknown fields."""
    known = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def make_panda(suite: str, task: int, **cameras: Any) -> PandaEnv:
    """Build an environment of a robosuite or LIBERO suite, without cameras unless their options are given.

    Raises:
        ValueError: If the suite is of another family.
    """
    env = envs.make(suite, task, render=bool(cameras), **cameras)
    if not isinstance(env, PandaEnv):
        env.close()
        raise ValueError(f"expected one of robosuite's and LIBERO's suites; got {suite!r}")
    return env


def run_jobs[T](function: Callable[..., T], jobs: Sequence[tuple], processes: int) -> Iterator[T]:
    """Yield the function's results for the arguments of each job, from worker processes if given several.

    Raises:
        RuntimeError: If a worker process died.
    """
    if processes <= 1 or len(jobs) <= 1:
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's rendering context
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a simulator process died (out of memory?); start again with fewer processes: "
                "finished files are kept"
            ) from error


class PosedCamera:
    """Renders RGB-D images of a Panda's environment from any viewpoint; a context manager.

    The environment is made with `render=False`; its model is changed to follow the rendering profile.
    Viewpoints are relative to `camera`, one of the simulation's. Images are squares of `frame_size` pixels.
    """

    def __init__(
        self, env: PandaEnv, *, camera: str = "agentview", frame_size: int = 224, rendering: str = "fast"
    ) -> None:
        if not isinstance(env, PandaEnv):
            raise TypeError(f"expected an environment of robosuite or LIBERO; got {type(env).__name__}")
        mujoco = load_mujoco()
        self._env, self._size = env, frame_size
        self._camera = env.model.camera(camera).id
        apply_profile(env.model, profile(rendering))
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = frame_size
        self._renderer: Any = mujoco.Renderer(env.model, frame_size, frame_size, max_geom=10_000)
        self._options = mujoco.MjvOption()
        for group in (COLLISION_GROUP, UNSEEN_GROUP):
            self._options.geomgroup[group] = 0
        self._solid = copy.copy(self._options)
        self._solid.sitegroup[:] = 0  # transparent markers would have depth
        self._geom_kind = int(mujoco.mjtObj.mjOBJ_GEOM)

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
        data, pose = self._env.data, np.eye(4)
        pose[:3, :3] = data.cam_xmat[self._camera].reshape(3, 3) @ OPENGL
        pose[:3, 3] = data.cam_xpos[self._camera]
        return pose

    def take(
        self, viewpoints: list[Viewpoint], middle: np.ndarray, base: np.ndarray, object_of_geom: np.ndarray
    ) -> Views:
        """Render RGB-D images from viewpoints relative to the point `middle` [3] of the simulator's world.

        The views' world is the frame of the robot's base, pose [4 4]. `object_of_geom` [geoms] holds each
        geom's object index or `NO_OBJECT`.
        """
        self._env.refresh()
        from_base, shots = np.linalg.inv(base), []
        for viewpoint in viewpoints:
            pose = moved_pose(self.pose, middle, viewpoint)
            shots.append((*self._shoot(pose, viewpoint.field, object_of_geom), from_base @ pose))
        frames, depth, intrinsics, segments, poses = (np.stack(part) for part in zip(*shots, strict=True))
        return Views(frames, depth, intrinsics, poses, segments)

    def image(self, viewpoint: Viewpoint, middle: np.ndarray) -> np.ndarray:
        """Render the colour image alone, uint8 [h w 3], in a third of the time; see `take`."""
        self._env.refresh()
        with self._placed(moved_pose(self.pose, middle, viewpoint), viewpoint.field):
            self._renderer.update_scene(self._env.data, camera=self._camera, scene_option=self._options)
            frame = self._renderer.render()
        return np.ascontiguousarray(np.flip(frame, self._env.flipped))

    def _shoot(
        self, pose: np.ndarray, field: float | None, object_of_geom: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Return image, depth, camera matrix and segments from a pose in the simulator's world."""
        renderer, data, flipped = self._renderer, self._env.data, self._env.flipped
        with self._placed(pose, field) as fovy:
            renderer.update_scene(data, camera=self._camera, scene_option=self._options)
            frame = renderer.render().copy()
            renderer.update_scene(data, camera=self._camera, scene_option=self._solid)
            renderer.enable_depth_rendering()
            depth = renderer.render().astype(np.float32)
            renderer.disable_depth_rendering()
            renderer.enable_segmentation_rendering()
            geoms, kinds = np.moveaxis(renderer.render(), -1, 0)
            renderer.disable_segmentation_rendering()
        segments = np.where(kinds == self._geom_kind, object_of_geom[geoms], NO_OBJECT).astype(np.int16)
        depth[depth > FARTHEST] = 0.0
        focal = self._size / 2 / math.tan(fovy / 2)
        signs = [-1.0 if axis in flipped else 1.0 for axis in (1, 0)]
        intrinsics = np.diag([focal * signs[0], focal * signs[1], 1.0])
        intrinsics[:2, 2] = self._size / 2
        upright = [np.ascontiguousarray(np.flip(image, flipped)) for image in (frame, depth, segments)]
        return upright[0], upright[1], intrinsics, upright[2]

    @contextmanager
    def _placed(self, pose: np.ndarray, field: float | None) -> Iterator[float]:
        """Put the camera at a pose inside the block; yield its vertical field of view (rad)."""
        model, data, camera = self._env.model, self._env.data, self._camera
        kept = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy(), float(model.cam_fovy[camera])
        data.cam_xpos[camera] = pose[:3, 3]
        data.cam_xmat[camera] = (pose[:3, :3] @ OPENGL).ravel()
        if field is not None:
            model.cam_fovy[camera] = math.degrees(field)
        try:
            yield math.radians(model.cam_fovy[camera])
        finally:
            data.cam_xpos[camera], data.cam_xmat[camera], model.cam_fovy[camera] = kept


def moved_pose(pose: np.ndarray, middle: np.ndarray, viewpoint: Viewpoint) -> np.ndarray:
    """Return the pose [4 4] of a camera that moved about the middle [3] of a scene to a viewpoint."""
    turn = Rotation.from_euler("z", -viewpoint.turn)
    climb = Rotation.from_rotvec(viewpoint.climb * turn.apply(pose[:3, 0]))
    rotation = (climb * turn).as_matrix()
    moved = np.eye(4)
    moved[:3, :3] = rotation @ pose[:3, :3]
    moved[:3, 3] = middle + viewpoint.distance * rotation @ (pose[:3, 3] - middle)
    if viewpoint.aim is not None:
        forward = middle + viewpoint.aim * moved[:3, 0] - moved[:3, 3]
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        moved[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    return moved


@dataclass(frozen=True)
class SimObject:
    """An object of the simulation."""

    name: str  # unique, such as "black bowl 1"
    category: str  # such as "black bowl"
    root: int  # id of its root body
    geoms: tuple[int, ...]  # ids of its visible geoms
    joint: int | None  # first of the seven values of its free joint in qpos; None for furniture


def find_objects(env: PandaEnv) -> list[SimObject]:
    """Return the objects and furniture of an environment, without robot, table and walls."""
    model, free_joint = env.model, load_mujoco().mjtJoint.mjJNT_FREE
    roots = model.body_rootid[model.geom_bodyid]
    found = []
    for root in range(model.nbody):
        name = model.body(root).name
        geoms = np.flatnonzero((roots == root) & (model.geom_group != COLLISION_GROUP))
        is_object = model.body_parentid[root] == 0 and name.endswith(ROOT_SUFFIX) and "table" not in name
        if not is_object or not len(geoms):
            continue
        words = name.removesuffix(ROOT_SUFFIX).replace("_", " ")
        kind = re.sub(r" \d+$", "", words)
        category = CATEGORIES.get(kind, kind)
        joint = model.body_jntadr[root]
        is_free = joint >= 0 and model.jnt_type[joint] == free_joint
        address = int(model.jnt_qposadr[joint]) if is_free else None
        found.append(
            SimObject(category + words.removeprefix(kind), category, root, tuple(geoms.tolist()), address)
        )
    return found


def object_of_geom(env: PandaEnv, objects: list[SimObject]) -> np.ndarray:
    """Return the index of the object that each geom belongs to, [geoms], or `NO_OBJECT`."""
    owner = np.full(env.model.ngeom, NO_OBJECT)
    for index, one in enumerate(objects):
        owner[list(one.geoms)] = index
    return owner


def base_pose(env: PandaEnv) -> np.ndarray:
    """Return the pose [4 4] of the robot's base in the simulator's world."""
    pose, base = np.eye(4), env.data.body("robot0_base")
    pose[:3, :3] = base.xmat.reshape(3, 3)
    pose[:3, 3] = base.xpos
    return pose


def vertices(env: PandaEnv, one: SimObject) -> np.ndarray:
    """Return the corners [n 3] of an object's meshes and of the boxes about its other shapes (world)."""
    mesh_kind, model, data = load_mujoco().mjtGeom.mjGEOM_MESH, env.model, env.data
    clouds = []
    for geom in one.geoms:
        if model.geom_type[geom] == mesh_kind:
            mesh = model.geom_dataid[geom]
            start = model.mesh_vertadr[mesh]
            local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(np.float64)
        else:
            signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3)
            local = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
        clouds.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(clouds)


def describe_objects(env: PandaEnv, objects: list[SimObject]) -> list[SceneObject]:
    """Return the present bounding boxes of objects, in the frame of the robot's base."""
    base, described = base_pose(env), []
    for one in objects:
        cloud = vertices(env, one)
        in_base = (cloud - base[:3, 3]) @ base[:3, :3]
        low, high = in_base.min(axis=0), in_base.max(axis=0)
        own = cloud @ env.data.xmat[one.root].reshape(3, 3)
        described.append(
            SceneObject(
                one.name,
                one.category,
                centre=_triple((low + high) / 2),
                size=_triple(high - low),
                longest=float(np.ptp(own, axis=0).max()),
                movable=one.joint is not None,
            )
        )
    return described


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z


class RandomLayout:
    """Puts the objects of an environment anywhere on the table, again and again.

    The environment has just been reset: the objects' poses then say how they lie and how high. `presence` is
    the probability that a movable object is there at all.

    Raises:
        ValueError: If no object can be moved.
    """

    def __init__(self, env: PandaEnv, presence: float = 0.75) -> None:
        self._env, self._presence, self._objects = env, presence, find_objects(env)
        clouds = {one.name: vertices(env, one) for one in self._objects}
        self._movable = [one for one in self._objects if one.joint is not None]
        if not self._movable:
            raise ValueError(f"{env.task.name} has no movable object")
        self._poses = {one.name: np.array(self._pose(one)) for one in self._movable}
        self._clouds = {one.name: clouds[one.name] for one in self._movable}
        self._furniture = [clouds[one.name] for one in self._objects if one.joint is None]
        self._support = min(cloud[:, 2].min() for cloud in self._clouds.values())
        places = [_footprint(cloud).mean(axis=0) for cloud in clouds.values()]
        self.middle = np.append(np.mean(places, axis=0), self._support)  # [3] of the scene

    def draw(self, rng: np.random.Generator) -> list[SimObject]:
        """Arrange the objects; return those that are present, furniture included.

        Raises:
            RuntimeError: If there is no room.
        """
        present = [one for one in self._movable if rng.random() < self._presence]
        for _ in range(MAX_LAYOUTS):
            taken = [_footprint(cloud) for cloud in self._furniture]
            if all(self._put(one, rng, taken) for one in present):
                break
        else:
            raise RuntimeError(f"no room for {len(present)} objects in {MAX_LAYOUTS} random layouts")
        for one in self._movable:
            if one not in present:
                self._pose(one)[:] = np.concatenate([AWAY, self._poses[one.name][3:]])
        self._env.refresh()
        return [one for one in self._objects if one in present or one.joint is None]

    def _put(self, one: SimObject, rng: np.random.Generator, taken: list[np.ndarray]) -> bool:
        """Put an object where there is room and add its footprint to `taken`; False if 20 tries fail."""
        pose, cloud = self._poses[one.name], self._clouds[one.name]
        for _ in range(20):
            turn = Rotation.from_euler("z", -rng.uniform(-np.pi, np.pi))
            place = np.append(self.middle[:2] + rng.uniform(-LAYOUT_REACH, LAYOUT_REACH), 0.0)
            moved = (cloud - pose[:3]) @ turn.as_matrix().T + place
            box = _footprint(moved)
            if any(_overlap(box, other) for other in taken):
                continue
            place[2] = self._support - moved[:, 2].min()
            turned = turn * Rotation.from_quat(pose[3:], scalar_first=True)
            self._pose(one)[:] = np.concatenate([place, turned.as_quat(scalar_first=True)])
            taken.append(box)
            return True
        return False

    def _pose(self, one: SimObject) -> np.ndarray:
        """Return the object's position and quaternion in qpos, [7], as a view."""
        assert one.joint is not None
        return self._env.data.qpos[one.joint : one.joint + 7]


def _footprint(cloud: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest x and y, [2 2]."""
    return np.stack([cloud[:, :2].min(axis=0), cloud[:, :2].max(axis=0)])


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    return bool((first[0] < second[1] + GAP).all() and (second[0] < first[1] + GAP).all())
