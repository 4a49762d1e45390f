"""Still scenes of a suite as files: drawn, photographed from many sides, in as many processes as wanted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.panda import PandaEnv
from envs.scatter import Scatter, base_pose, bodies, boxes, thing_of_geom
from envs.views import PosedCamera, Viewpoint
from vega_policy.analysis.scenes import Scene, save_scene

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
class SceneOrder:
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
        **order: Fields of `SceneOrder`; scene i is of task i modulo the number of tasks.

    Returns:
        The scenes' files, in order.
    """
    wanted = SceneOrder(**{**order, "tasks": tuple(order.get("tasks", SceneOrder.tasks))})
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


def _write(folder: Path, order: SceneOrder, task: int, indices: list[int]) -> None:
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
