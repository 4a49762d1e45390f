"""Clips of our simulators on disk, for pre-training a video model: filmed in parallel, resumed after a kill.

<folder>/order.json                      what was ordered; another order gets another folder
         <suite>-<task>-<part>.npy       uint8 [n t h w 3], to be mapped into memory
         <suite>-<task>-<part>.json      bytes of that file, and what each clip shows; written last
"""

from __future__ import annotations

import json
import multiprocessing
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import envs
from envs.filming import Clip, Film, check_shots

ORDER = "order.json"


@dataclass(frozen=True)
class ClipOrder:
    """Which clips are wanted.

    Attributes:
        suites: Robosuite and LIBERO suites.
        tasks: So many tasks of each, from the first; None takes all.
        parts: Shards of each task.
        rounds: Rounds a shard: each is a new scene, filmed once by every shot.
        shots: Keys of `envs.filming.STILL` and `PLAYED`.
        frames: Frames a clip, 1 + 4 k as Wan's autoencoder takes them.
        frame_size: Side of the square frames in pixels, a multiple of 16.
        every: Control steps (20 a second) from one frame of a played clip to the next.
        told: Share of the clips that keep their instruction; the others' is empty.
        rendering: Rendering profile.
        seed: Of everything.
    """

    suites: tuple[str, ...]
    tasks: int | None = None
    parts: int = 2
    rounds: int = 8
    shots: tuple[str, ...] = ("orbit", "dolly", "pan", "fixed", "orbit_motion", "agent", "wrist")
    frames: int = 9
    frame_size: int = 128
    every: int = 3
    told: float = 0.5
    rendering: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be filmed or learned from.

        Raises:
            ValueError: Naming the field.
        """
        check_shots(list(self.shots))
        if self.frames % 4 != 1:
            raise ValueError(f"clips.frames: Wan's autoencoder takes 1 + 4 k frames; got {self.frames}")
        if self.frame_size % 16:
            raise ValueError(f"clips.frame_size: expected a multiple of 16; got {self.frame_size}")
        if not self.suites or min(self.parts, self.rounds, self.every) < 1:
            raise ValueError("clips: expected a suite, and parts, rounds and every of at least 1")


@dataclass(frozen=True)
class Job:
    """One shard.

    Attributes:
        folder: Where it will lie.
        suite: Its suite.
        task: Its task.
        part: Which of the task's shards.
        order: The whole order.
        deadline: Time (`time.time()`) after which it is given up; None has all the time.
    """

    folder: Path
    suite: str
    task: int
    part: int
    order: ClipOrder
    deadline: float | None

    @property
    def name(self) -> str:
        """Name of its files, without ending."""
        return f"{self.suite}-{self.task:02d}-{self.part:02d}"

    @property
    def done(self) -> bool:
        """Whether it was written to its end."""
        return (self.folder / f"{self.name}.json").is_file()


def instructions(**order: Any) -> list[str]:
    """What the robot is told in the tasks of an order, each once; no simulator is started."""
    wanted = _order(order)
    told = (task.instruction for suite in wanted.suites for task in envs.tasks(suite)[: wanted.tasks])
    return list(dict.fromkeys(told))


def write_clips(folder: Path, *, processes: int, deadline: float | None = None, **order: Any) -> bool:
    """Film the shards that are missing.

    Args:
        folder: Belongs to this order alone.
        processes: Simulator processes; they change the time it takes, not what is written.
        deadline: Time (`time.time()`) at which unfinished shards are given up, to be filmed by the next call.
        **order: Fields of `ClipOrder`.

    Returns:
        Whether all shards are there.

    Raises:
        ValueError: If the folder holds clips of another order.
        RuntimeError: If a worker process died.
    """
    wanted = _order(order)
    _claim(folder, wanted)
    jobs = [
        Job(folder, suite, task.index, part, wanted, deadline)
        for part in range(wanted.parts)
        for suite in wanted.suites
        for task in envs.tasks(suite)[: wanted.tasks]
    ]
    missing = [job for job in jobs if not job.done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="Filming", unit="shard") as bar:
        for done in _filmed(missing, processes):
            bar.update(done)
    return all(job.done for job in jobs)


def _filmed(jobs: list[Job], processes: int) -> Iterator[bool]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(_film, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's rendering context
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(_film, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a simulator process died (out of memory?); start again with fewer clips.processes: "
                "finished shards are kept"
            ) from error


def _film(job: Job) -> bool:
    """Film a shard; False if there was no time for it."""
    order, clips = job.order, []
    if _late(job.deadline):
        return False
    with Film(
        job.suite,
        job.task,
        frames=order.frames,
        frame_size=order.frame_size,
        every=order.every,
        shots=list(order.shots),
        rendering=order.rendering,
    ) as film:
        for index in range(order.rounds):
            if _late(job.deadline):
                return False
            place = (order.seed, zlib.crc32(job.suite.encode()), job.task, job.part, index)
            clips.extend(film.round(np.random.default_rng(place)))
    _write(job, clips)
    return True


def _write(job: Job, clips: list[Clip]) -> None:
    """Files are written aside and renamed, the description last: a shard that has one is whole."""
    rng = np.random.default_rng((job.order.seed, zlib.crc32(job.name.encode())))
    told = rng.permutation(len(clips)) < job.order.told * len(clips)
    draft = job.folder / f".{job.name}.partial"
    with draft.open("wb") as file:
        np.save(file, np.stack([clip.frames for clip in clips]))
    size = draft.stat().st_size
    draft.rename(job.folder / f"{job.name}.npy")
    shown = [
        {"shot": clip.shot, "seed": clip.seed, "instruction": clip.instruction if keeps else ""}
        for clip, keeps in zip(clips, told, strict=True)
    ]
    draft.write_text(json.dumps({"bytes": size, "suite": job.suite, "task": job.task, "clips": shown}))
    draft.rename(job.folder / f"{job.name}.json")


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() >= deadline


def _order(order: dict[str, Any]) -> ClipOrder:
    known = {field.name for field in fields(ClipOrder)}
    unknown = sorted(order.keys() - known)
    if unknown:
        raise ValueError(f"clips: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in order.items()
    }
    return ClipOrder(**values)


def _claim(folder: Path, order: ClipOrder) -> None:
    """Note the order in its folder, or refuse a folder of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    note, text = folder / ORDER, json.dumps(asdict(order), indent=1)
    if note.is_file() and note.read_text() != text:
        before, now = json.loads(note.read_text()), json.loads(text)
        told = ", ".join(
            f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]
        )
        raise ValueError(f"{folder} holds clips of another order: {told}. Give another clips.folder.")
    draft = note.with_suffix(".partial")
    draft.write_text(text)
    draft.rename(note)
