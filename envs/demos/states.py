"""Compact files of demonstrations as simulator states, one file per suite, to be rendered at any size.

A file is a safetensors file. Its metadata holds the suite, the origin and the episodes (task, seed, length,
attempts); tensor `<task>/<array>` is an xz stream. Trajectories are integers in units of `RESOLUTION`, stored
as differences over time and split into byte planes, so that values that do not change cost almost nothing.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import envs
from vega_policy.run_dir import write_bytes

FORMAT = 1
RESOLUTION = {
    "positions": 1e-7,
    "velocities": 1e-3,
    "actions": 1e-5,
    "executed": 1e-5,
    "proprioception": 1e-6,
}
"""Resolution of each trajectory: metres or radians, their rates, fractions of an action's full scale."""


@dataclass(frozen=True)
class StateEpisode:
    """One successful demonstration."""

    task: int  # index of the task in its suite
    seed: int
    attempts: int  # episodes tried to get this one, itself included
    initial: np.ndarray  # full simulator state before the first action, float64 [n]
    positions: np.ndarray  # generalised positions before each action, float64 [t nq]
    velocities: np.ndarray  # generalised velocities before each action, float64 [t nv]
    actions: np.ndarray  # clean actions, the training targets, float32 [t a] in [-1, 1]
    executed: np.ndarray  # executed (noisy) actions, float32 [t a] in [-1, 1]
    proprioception: np.ndarray  # proprioceptive state before each action, float32 [t s]

    def __len__(self) -> int:
        """Return the number of actions t."""
        return len(self.actions)

    def state(self, step: int) -> np.ndarray:
        """Return the full simulator state before an action, float64 [n].

        MuJoCo's state starts with time, positions and velocities. The rest (controls, warm start, poses of
        fixtures) is that of the first step.
        """
        state, velocities_from = self.initial.copy(), 1 + self.positions.shape[1]
        state[1:velocities_from] = self.positions[step]
        state[velocities_from : velocities_from + self.velocities.shape[1]] = self.velocities[step]
        return state


def write_states(
    path: Path, suite: str, episodes: Sequence[StateEpisode], origin: dict[str, Any], threads: int = 2
) -> None:
    """Write the demonstrations of a suite, sorted by task; an existing file is replaced.

    Those of one task keep their order. `origin` says how they were collected (JSON values); `threads` arrays
    are compressed at once.

    Raises:
        ValueError: If a trajectory holds values that are not finite.
    """
    from safetensors.numpy import save

    by_task: dict[int, list[StateEpisode]] = {}
    for episode in sorted(episodes, key=lambda episode: episode.task):
        by_task.setdefault(episode.task, []).append(episode)
    planes: dict[str, bytes] = {}
    shapes: dict[str, list[int]] = {}
    for task, members in by_task.items():
        initial = np.stack([episode.initial for episode in members])
        planes[f"{task}/initial"] = _split_bytes(initial.view(np.uint64))
        shapes[f"{task}/initial"] = list(initial.shape)
        for name, unit in RESOLUTION.items():
            key, values = f"{task}/{name}", [getattr(episode, name) for episode in members]
            planes[key] = _split_bytes(np.concatenate([_encode(value, unit, key) for value in values]))
            shapes[key] = [sum(map(len, values)), values[0].shape[1]]
    with ThreadPoolExecutor(threads) as pool:
        packed = dict(zip(planes, pool.map(lzma.compress, planes.values()), strict=True))
    header = {"format": FORMAT, "suite": suite, "steps": RESOLUTION, "shapes": shapes, "origin": origin}
    header["episodes"] = [
        {"task": episode.task, "seed": episode.seed, "length": len(episode), "attempts": episode.attempts}
        for members in by_task.values()
        for episode in members
    ]
    tensors = {key: np.frombuffer(value, np.uint8) for key, value in packed.items()}
    write_bytes(path, save(tensors, metadata={"states": json.dumps(header)}))


def read_header(path: Path) -> dict[str, Any]:
    """Return a file's `suite`, `origin` and `episodes` (task, seed, length, attempts).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no file of states, is damaged, or has another format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        folder = path.with_suffix("")  # of `format=lerobot` with the same root
        raise FileNotFoundError(
            f"{path}: expected a file of states that vega-collect format=states wrote, got "
            f"{'a folder' if path.is_dir() else 'no such file'}. "
            f"{f'Did you mean {folder}?' if folder.is_dir() else 'Give another file.'}"
        )
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["states"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a file of demonstrations as states; it is none, or damaged ({error}). "
            "Restore or collect it again."
        ) from None
    if header["format"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}; got {header['format']}. Collect it again.")
    return header


def read_states(path: Path, tasks: Sequence[int] | None = None) -> list[StateEpisode]:
    """Read the demonstrations of some tasks (indices), or of all, in the order of the file.

    Raises:
        ValueError: If the file is no file of states, is damaged, or has another format.
    """
    from safetensors import safe_open

    header, episodes = read_header(path), []
    by_task: dict[int, list[dict[str, Any]]] = {}
    for entry in header["episodes"]:
        by_task.setdefault(entry["task"], []).append(entry)
    with safe_open(path, "numpy") as file:
        for task in sorted(by_task if tasks is None else set(tasks) & set(by_task)):
            coded = {}
            for name in ("initial", *RESOLUTION):
                key = f"{task}/{name}"
                planes = lzma.decompress(file.get_tensor(key).tobytes())
                coded[name] = _join_bytes(planes, header["shapes"][key])
            episodes += _cut_episodes(by_task[task], coded, header["steps"])
    return episodes


def drop_held_out(path: Path) -> list[dict[str, Any]]:
    """Drop the episodes of a file that start in an arrangement that LIBERO evaluates; return task and seed.

    `envs.layouts` draws such arrangements again; this is for files that were collected before it did. The
    other episodes stay as they are. The header's origin lists what was dropped as `held_out`, and its
    `demonstrations` of a task count what is left. Without such episodes the file is not written.

    Raises:
        ValueError: If the file is no file of states, is damaged, has another format or another suite.
    """
    from envs.layouts import evaluated_in
    from envs.libero import LiberoEnv

    header, kept, dropped = read_header(path), list[StateEpisode](), list[dict[str, Any]]()
    suite, origin = header["suite"], header["origin"]
    if suite not in envs.LIBERO_SUITES:
        raise ValueError(
            f"{path}: expected one of the suites {', '.join(envs.LIBERO_SUITES)}; got {suite!r}."
        )
    tasks = envs.tasks(suite)
    for index, members in groupby(read_states(path), key=lambda episode: episode.task):
        env = LiberoEnv(tasks[index], frame_size=256, rendering="fast", render=False)
        env.reset_blindly(seed=0)  # a state can be restored after a reset alone
        for episode in members:
            env.restore(episode.initial)
            if evaluated_in(env):
                dropped.append({"task": index, "seed": episode.seed})
                origin["tasks"][tasks[index].name]["demonstrations"] -= 1
            else:
                kept.append(episode)
        env.close()
    if dropped:
        origin["held_out"] = [*origin.get("held_out", []), *dropped]
        write_states(path, suite, kept, origin)
    return dropped


def _cut_episodes(
    entries: list[dict[str, Any]], coded: dict[str, np.ndarray], resolution: dict[str, float]
) -> list[StateEpisode]:
    """Decode a task's arrays and cut them into its episodes."""
    ends = np.cumsum([entry["length"] for entry in entries])
    episodes = []
    for index, (entry, end) in enumerate(zip(entries, ends, strict=True)):
        rows = slice(end - entry["length"], end)
        values = {name: _decode(coded[name][rows], unit) for name, unit in resolution.items()}
        for name in ("actions", "executed", "proprioception"):
            values[name] = values[name].astype(np.float32)
        initial = coded["initial"][index].view(np.float64)
        episodes.append(
            StateEpisode(entry["task"], entry["seed"], entry["attempts"], initial=initial, **values)
        )
    return episodes


def _encode(values: np.ndarray, unit: float, name: str) -> np.ndarray:
    """Return differences over time in units, zigzag-coded (0, -1, 1, -2 -> 0, 1, 2, 3), uint64 [t c]."""
    scaled = np.round(np.asarray(values, np.float64) / unit)
    if not np.isfinite(scaled).all():
        raise ValueError(f"{name}: expected finite values; got NaN or infinity. Drop the episode.")
    signed = np.diff(scaled.astype(np.int64), axis=0, prepend=0)
    return np.where(signed < 0, -2 * signed - 1, 2 * signed).astype(np.uint64)


def _decode(coded: np.ndarray, unit: float) -> np.ndarray:
    codes = coded.astype(np.int64)
    signed = np.where(codes & 1, -(codes + 1) // 2, codes // 2)
    return np.cumsum(signed, axis=0) * unit


def _split_bytes(values: np.ndarray) -> bytes:
    """Return the bytes of integers uint64 [t c], one byte position after the other: [8 c t]."""
    split = np.ascontiguousarray(values.T)[..., None].view(np.uint8)  # [c t 8]
    return split.transpose(2, 0, 1).tobytes()


def _join_bytes(planes: bytes, shape: Sequence[int]) -> np.ndarray:
    rows, columns = shape
    split = np.frombuffer(planes, np.uint8).reshape(8, columns, rows).transpose(1, 2, 0)
    joined = np.ascontiguousarray(split).view(np.uint64)[..., 0]  # [c t]
    return np.ascontiguousarray(joined.T)
