"""Rollouts and corrections as a LeRobotDataset, written so that a kill costs one episode at most.

LeRobot loses a whole dataset that is killed before `finalize()`. So each episode is a dataset of its own: it
is written under a provisional name, finalized, and only then gets its name. They are merged at the end.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

INTERVENTION, POLICY_ACTION = "intervention", "policy_action"
"""Columns beside LeRobot's own: whether somebody else than the policy decided, and what the policy wanted."""

_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class RecordingFormat:
    """What is recorded.

    Attributes:
        repo_id: LeRobot's name for the dataset.
        fps: Control steps a second.
        features: LeRobot's features of observation and action.
        robot_type: Name of the robot.
        codec: LeRobot's settings of the video encoder.
        longest_episode: Most steps of an episode; the encoder's queue holds them, none is dropped, and
            no more than these wait.
    """

    repo_id: str
    fps: int
    features: Mapping[str, Any]
    robot_type: str
    codec: Mapping[str, Any]
    longest_episode: int = 2000
    extra: Mapping[str, Any] = field(
        default_factory=lambda: {INTERVENTION: {"dtype": "bool", "shape": (1,), "names": None}}
    )

    @property
    def all_features(self) -> dict[str, Any]:
        """Features with the columns that recordings have beside."""
        action = self.features["action"]
        return {**self.features, **self.extra, POLICY_ACTION: dict(action)}


class EpisodeRecorder:
    """Takes frames from a control loop and writes them in a thread of its own.

    Use it as a context manager: leaving it saves the running episode.

    Args:
        folder: Where episodes are put, one folder each; those that are there are kept and counted on from.
        form: What is recorded.

    Attributes:
        saved: Folders of finished episodes.
        failure: What ended the recording before its time, or None.
    """

    def __init__(self, folder: Path, form: RecordingFormat) -> None:
        self._folder = folder
        self._form = form
        self._orders: queue.Queue[dict[str, Any] | str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self.failure: Exception | None = None
        self.saved: list[Path] = finished_episodes(folder)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(f"episode_*{_UNFINISHED}"):
            logger.warning("%s was not finished and is lost", left_over.name)
            shutil.rmtree(left_over)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_episode()
        self._orders.put(None)
        self._thread.join()
        if self.failure is not None:
            logger.error("the last episode was not recorded: %s", self.failure)

    def add(self, frame: dict[str, Any]) -> None:
        """Record one step; returns at once.

        Args:
            frame: As `LeRobotDataset.add_frame` takes it, with all features and `task`.

        Raises:
            RuntimeError: If writing failed before, or cannot keep up: a recording with holes is none.
        """
        if self.failure is not None:
            raise RuntimeError(f"the recording cannot go on: {self.failure}") from self.failure
        if self._orders.qsize() >= self._form.longest_episode:
            raise RuntimeError(
                f"the recording cannot keep up: {self._orders.qsize()} steps wait to be written; take fewer "
                "or smaller cameras, or recording.video=h264"
            )
        self._orders.put(frame)

    def end_episode(self) -> None:
        """Finish the running episode, if it has any steps; returns at once."""
        self._orders.put("end")

    def _work(self) -> None:
        try:
            self._write()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            logger.exception("the recording failed")
            self.failure = error

    def _write(self) -> None:
        dataset, place = None, None
        while (order := self._orders.get()) is not None:
            if isinstance(order, dict):
                if dataset is None:
                    place = self._folder / f"episode_{self._next_number():06d}"
                    dataset = self._create(place.with_name(place.name + _UNFINISHED))
                dataset.add_frame(order)
            elif dataset is not None and place is not None:
                dataset.save_episode()
                dataset.finalize()
                place.with_name(place.name + _UNFINISHED).rename(place)
                self.saved.append(place)
                dataset = None

    def _next_number(self) -> int:
        return 1 + max((int(path.name.removeprefix("episode_")) for path in self.saved), default=-1)

    def _create(self, root: Path) -> Any:
        from lerobot.configs import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        return LeRobotDataset.create(
            self._form.repo_id,
            fps=self._form.fps,
            features=self._form.all_features,
            root=root,
            robot_type=self._form.robot_type,
            use_videos=True,
            video_backend="pyav",
            rgb_encoder=RGBEncoderConfig(**self._form.codec),
            streaming_encoding=True,
            encoder_threads=1,
            encoder_queue_maxsize=self._form.longest_episode,
        )


def finished_episodes(folder: Path) -> list[Path]:
    """Return the folders of finished episodes, in order."""
    return sorted(path for path in folder.glob("episode_*") if not path.name.endswith(_UNFINISHED))


def merge_episodes(folder: Path, root: Path, repo_id: str) -> int:
    """Merge finished episodes into one LeRobotDataset and return their number.

    Each episode keeps its files: to make one of them, LeRobot would write all of it again for each.

    Args:
        folder: What an `EpisodeRecorder` wrote.
        root: Where the dataset will lie; must not exist.
        repo_id: LeRobot's name for it.

    Raises:
        FileNotFoundError: If there is no finished episode.
        FileExistsError: If something lies at `root`.
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
