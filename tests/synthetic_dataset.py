"""Small synthetic LeRobot datasets for tests: two cameras, a bright square that moves with the state."""

from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from envs.demos.shards import CODECS

CAMERAS = ("observation.images.image", "observation.images.image2")
REPO_ID = "tests/synthetic"


def write_dataset(
    root: Path,
    *,
    lengths: tuple[int, ...] = (9, 6, 12),
    frame_shapes: tuple[tuple[int, int], ...] = ((48, 64), (32, 32)),
    state_width: int = 8,
    action_width: int = 7,
    nan_action_at: int | None = None,
    use_videos: bool = True,
    cameras: tuple[str, ...] = CAMERAS,
    tasks: tuple[str, ...] = ("lift the cube", "push the cube"),
    video: str | None = None,
    displacement: bool = False,
    executed: bool = False,
) -> Path:
    """Writes a finalized dataset of len(lengths) episodes at 10 Hz and returns its root.

    Its videos are LeRobot's usual ones, or encoded like `video`, a name in `envs.demos.shards.CODECS`.
    """
    rng = np.random.default_rng(0)
    image_type = "video" if use_videos else "image"
    features = {
        camera: {"dtype": image_type, "shape": (*shape, 3), "names": ["height", "width", "channels"]}
        for camera, shape in zip(cameras, frame_shapes, strict=True)
    }
    if state_width:
        features["observation.state"] = {"dtype": "float32", "shape": (state_width,), "names": None}
    if displacement:
        features["displacement"] = {"dtype": "float32", "shape": (3,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (action_width,), "names": None}
    features |= {"executed_action": features["action"]} if executed else {}
    encoding: dict[str, Any] = {}
    if video is not None:  # as envs.demos.shards encodes
        encoder = RGBEncoderConfig(**CODECS[video])
        encoding = {"rgb_encoder": encoder, "streaming_encoding": True, "encoder_threads": 1}
    dataset = LeRobotDataset.create(
        REPO_ID,
        fps=10,
        features=features,
        root=root,
        robot_type="panda",
        use_videos=use_videos,
        video_backend="pyav",
        **encoding,
    )
    written = 0
    for episode, length in enumerate(lengths):
        for t in range(length):
            frame = {
                camera: square_frame(shape, t / length)
                for camera, shape in zip(cameras, frame_shapes, strict=True)
            }
            if state_width:
                frame["observation.state"] = rng.normal(size=state_width).astype(np.float32)
            if displacement:
                frame["displacement"] = np.array([episode, t, 0.0], np.float32) / 100
            action = rng.uniform(-1, 1, size=action_width).astype(np.float32)
            if written == nan_action_at:
                action[0] = np.nan
            frame |= {"executed_action": action + np.float32(0.1 + 0.01 * t)} if executed else {}
            dataset.add_frame({**frame, "action": action, "task": tasks[episode % len(tasks)]})
            written += 1
        dataset.save_episode()
    dataset.finalize()
    return root


def square_frame(shape: tuple[int, int], position: float) -> np.ndarray:
    """A dark frame [h w 3] uint8 with a bright square whose column is `position` in [0,1) of the width."""
    height, width = shape
    frame = np.full((height, width, 3), 40, dtype=np.uint8)
    side = height // 4
    left = int(position * (width - side))
    frame[height // 2 : height // 2 + side, left : left + side] = (220, 180, 60)
    return frame
