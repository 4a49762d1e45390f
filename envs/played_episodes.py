"""One demonstrated episode as posed RGB-D pictures with its actions: for films of what a model sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.demonstrators import demonstrate
from envs.panda import PandaEnv
from envs.scatter import base_pose, bodies, boxes, thing_of_geom
from envs.views import PosedCamera, Viewpoint
from vega_policy.analysis.scenes import Scene, Views, save_scene


@dataclass(frozen=True)
class EpisodeOrder:
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
        **fields: Those of `EpisodeOrder`.

    Raises:
        ValueError: If the suite is of another family.
    """
    order = EpisodeOrder(**fields)
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


def _play(env: PandaEnv, camera: PosedCamera, order: EpisodeOrder) -> tuple[Scene, np.ndarray, np.ndarray]:
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
