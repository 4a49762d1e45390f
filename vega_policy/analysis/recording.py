"""An episode for rerun's viewer: point cloud, frame, gate and actions on one time line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vega_policy.analysis.cameras import world_points
from vega_policy.analysis.scenes import Scene, load_scene

APPLICATION = "vega_policy"
EVERY_PIXEL = 2  # of so many rows and columns one goes into the point cloud
NEAR = 2.5  # m; farther points are left out of the cloud


@dataclass(frozen=True)
class Episode:
    """Moments of an episode.

    Attributes:
        scene: Its views are the moments.
        actions: Actions [t a] of all steps.
        moments: Step of each view, [n].
        instruction: What the robot was told.
    """

    scene: Scene
    actions: np.ndarray
    moments: np.ndarray
    instruction: str


def load_episode(path: Path) -> Episode:
    """Read what `envs.played_episodes.write_episode` wrote."""
    with np.load(path.with_suffix(".actions.npz")) as stored:
        instruction = str(stored["instruction"])
        return Episode(load_scene(path), stored["actions"], stored["moments"], instruction)


def write_recording(path: Path, episode: Episode, gates: np.ndarray) -> None:
    """Write an episode for `rerun PATH`.

    Args:
        path: File, `.rrd`.
        episode: What happened.
        gates: Gate of each moment's view, [n gh gw] in [0, 1].

    Raises:
        ValueError: If there is not one gate a moment.
        ImportError: If rerun is missing.
    """
    rerun = _load_rerun()
    views = episode.scene.views
    if len(gates) != len(views):
        raise ValueError(f"expected the gate of each of {len(views)} moments, got {len(gates)}")
    recording = rerun.RecordingStream(APPLICATION)
    recording.save(path)
    recording.log("instruction", rerun.TextDocument(episode.instruction), static=True)
    points = world_points(
        *(torch.from_numpy(part).double() for part in (views.depth, views.intrinsics, views.poses))
    ).numpy()
    for index, step in enumerate(episode.moments.tolist()):
        recording.set_time("step", sequence=step)
        near = (views.depth[index] > 0) & (views.depth[index] < NEAR)
        near[np.arange(len(near)) % EVERY_PIXEL > 0] = False
        near[:, np.arange(near.shape[1]) % EVERY_PIXEL > 0] = False
        recording.log(
            "world/points",
            rerun.Points3D(points[index][near], colors=views.frames[index][near], radii=0.004),
        )
        recording.log("frame", rerun.Image(views.frames[index]))
        recording.log("gate/map", rerun.Image((255 * gates[index]).round().astype(np.uint8)))
        recording.log("gate/mean", rerun.Scalars(float(gates[index].mean())))
    for step, action in enumerate(episode.actions):
        recording.set_time("step", sequence=step)
        for axis, number in enumerate(action):
            recording.log(f"action/{axis}", rerun.Scalars(float(number)))
    recording.flush()


def _load_rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise ImportError(
            "recordings need rerun-sdk: pip install 'lerobot[viz]', or film nothing with episode.steps=0"
        ) from error
    return rerun
