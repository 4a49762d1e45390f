"""Rollouts and corrections as a LeRobotDataset, written so that a kill loses one episode at most.

LeRobot loses a dataset that is killed before `finalize()`. So each episode is a dataset of its own, in a
folder that appears only once it is complete; `merge_episodes` joins them.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vega_policy.run_dir import atomic_folder, lock_folder, remove_partial

logger = logging.getLogger(__name__)

INTERVENTION, POLICY_ACTION = "intervention", "policy_action"
"""Extra columns: whether the command is not the policy's action, and the policy's action."""


@dataclass(frozen=True)
class RecordingFormat:
    """Format of recorded episodes."""

    repo_id: str  # LeRobot's name of the dataset
    fps: int  # control steps a second
    features: Mapping[str, Any]  # LeRobot's features of observation and action
    robot_type: str
    codec: Mapping[str, Any]  # LeRobot's settings of the video encoder
    longest_episode: int = 2000  # steps; the encoder's queue holds them, and no more wait to be written

    @property
    def all_features(self) -> dict[str, Any]:
        """Features with the extra columns."""
        intervention = {"dtype": "bool", "shape": (1,), "names": None}
        return {**self.features, INTERVENTION: intervention, POLICY_ACTION: dict(self.features["action"])}


class EpisodeRecorder:
    """Receives frames from a control loop and writes them in its own thread.

    Each episode is a folder in `folder`; existing ones are kept and numbering continues. Use it as a context
    manager: leaving it saves the running episode.
    """

    def __init__(self, folder: Path, layout: RecordingFormat) -> None:
        self._folder = folder
        self._layout = layout
        self._queue: queue.Queue[dict[str, Any] | str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.failure: Exception | None = None  # ended the recording early
        self.saved: list[Path] = finished_episodes(folder)
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        self._lock.enter_context(lock_folder(self._folder))
        remove_partial(self._folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_episode()
        self._queue.put(None)
        self._thread.join()
        self._lock.close()
        if self.failure is not None:
            logger.error("the last episode was not recorded: %s", self.failure)

    def add(self, frame: dict[str, Any]) -> None:
        """Record one step, as `LeRobotDataset.add_frame` expects it with `task`; returns at once.

        Raises:
            RuntimeError: If writing failed before, or cannot keep up: a recording must have no gaps.
        """
        if self.failure is not None:
            raise RuntimeError(f"the recording cannot continue: {self.failure}") from self.failure
        if self._queue.qsize() >= self._layout.longest_episode:
            raise RuntimeError(
                f"the recording cannot keep up: {self._queue.qsize()} steps wait to be written; use fewer or "
                "smaller cameras, or recording.video=h264"
            )
        self._queue.put(frame)

    def end_episode(self) -> None:
        """Finish the running episode, if it has any steps; returns at once."""
        self._queue.put("end")

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, dict):
                    self._write_episode(item)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            logger.exception("the recording failed")
            self.failure = error

    def _write_episode(self, item: dict[str, Any] | str | None) -> None:
        """Write frames until the episode ends."""
        number = 1 + max((int(path.name.removeprefix("episode_")) for path in self.saved), default=-1)
        folder = self._folder / f"episode_{number:06d}"
        with atomic_folder(folder) as draft:
            draft.rmdir()  # LeRobot creates it
            dataset = self._create_dataset(draft)
            while isinstance(item, dict):
                dataset.add_frame(item)
                item = self._queue.get()
            dataset.save_episode()
            dataset.finalize()
        self.saved.append(folder)

    def _create_dataset(self, root: Path) -> Any:
        from lerobot.configs import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        return LeRobotDataset.create(
            self._layout.repo_id,
            fps=self._layout.fps,
            features=self._layout.all_features,
            root=root,
            robot_type=self._layout.robot_type,
            use_videos=True,
            video_backend="pyav",
            rgb_encoder=RGBEncoderConfig(**self._layout.codec),
            streaming_encoding=True,
            encoder_threads=1,
            encoder_queue_maxsize=self._layout.longest_episode,
        )


def finished_episodes(folder: Path) -> list[Path]:
    """Return the folders of finished episodes, in order."""
    return sorted(folder.glob("episode_*"))


def merge_episodes(folder: Path, root: Path, repo_id: str) -> int:
    """Merge the episodes of an `EpisodeRecorder` into one LeRobotDataset in `root` and return their number.

    Each episode keeps its files: joining them would rewrite the whole file for each episode.

    Raises:
        FileNotFoundError: If there is no finished episode.
        FileExistsError: If `root` exists.
    """
    from lerobot.datasets.aggregate import aggregate_datasets

    episodes = finished_episodes(folder)
    if not episodes:
        raise FileNotFoundError(f"no finished episode in {folder}")
    if root.exists():
        raise FileExistsError(f"{root} exists; merge into a new folder")
    aggregate_datasets(
        [repo_id] * len(episodes),
        repo_id,
        roots=episodes,
        aggr_root=root,
        concatenate_videos=False,
        concatenate_data=False,
    )
    return len(episodes)
