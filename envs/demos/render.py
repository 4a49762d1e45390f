"""A collected dataset rendered once more, from its simulator states, at another size or profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import batched, groupby
from pathlib import Path
from typing import Any

from envs.demos.collect import CollectionSettings, Job, assemble
from envs.demos.replay import collected_metadata, read_episodes


def render_again(
    source: Path,
    root: Path,
    *,
    frame_size: int,
    rendering: str,
    video: str | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Write the demonstrations of a dataset with other pictures; states, actions and order stay.

    Started again, it goes on where it stopped.

    Args:
        source: Folder of a dataset that this package collected.
        root: Where the new dataset will lie.
        frame_size: Height and width of a frame in pixels.
        rendering: Profile "full" or "fast".
        video: How frames are stored, "lossless" or "h264"; None stores them as the source does.
        processes: Worker processes.

    Returns:
        The new dataset's metadata.

    Raises:
        FileNotFoundError: If `source` holds no dataset that this package collected.
        ValueError: If the profile or the video is unknown, or `root` holds other settings.
        FileExistsError: If `root` holds something else.
    """
    stored = collected_metadata(source)
    before = CollectionSettings.stored(stored["settings"])
    settings = replace(
        before, frame_size=frame_size, rendering=rendering, video=before.video if video is None else video
    )
    return assemble(
        settings,
        root,
        processes,
        lambda work: list(_jobs(source, stored, settings, work)),
        counts=stored["tasks"],
    )


def _jobs(source: Path, stored: dict[str, Any], settings: CollectionSettings, work: Path) -> Iterator[Job]:
    tasks = {episode.task.name: episode.task for episode in read_episodes(source)}
    entries = enumerate(stored["episodes"])
    for name, members in groupby(entries, key=lambda entry: entry[1]["task"]):
        for group in batched((index for index, _ in members), settings.episodes_per_shard):
            yield Job(
                task=tasks[name],
                folder=work / f"{group[0]:06d}",
                episodes=len(group),
                seeds=range(0),
                frame_size=settings.frame_size,
                rendering=settings.rendering,
                demonstrator=settings.demonstrator,
                repo_id=settings.repo_id,
                video=settings.video,
                source=source,
                source_episodes=group,
            )
