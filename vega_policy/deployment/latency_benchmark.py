"""Measures the cost of latency: success in virtual time, logs of the wall clock, and a server's load.

Each benchmark returns or yields rows of plain values, one table row each.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from vega_policy.config import check_choice, check_numbers
from vega_policy.deployment.client import PolicyClient, ServerAddress
from vega_policy.deployment.protocol import ProtocolError, RTCContext
from vega_policy.deployment.rtc import catch_up, check_displacements
from vega_policy.deployment.server import ServedCheckpoint
from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.episodes import Episode
from vega_policy.evaluation.policies import ObservationBatch
from vega_policy.evaluation.rollout import Rollout
from vega_policy.evaluation.stats import wilson_interval
from vega_policy.run_dir import atomic_file, open_run, write_bytes

Row = dict[str, Any]

METHODS = {
    "naive": "the robot waits for a chunk, which begins at its first action",
    "aligned": "the robot waits for a chunk, which begins after the commands under way",
    "lerobot": "predicted while the last chunk is executed; an action is dropped for each step of the delay",
    "async": "predicted while the last chunk is executed; begins after the commands sent since",
    "catch_up": "as async, and makes up for the displacements of its actions that came too late",
    "rtc": "as async, and continues the last chunk: by prefix if trained so, else by guidance or blending",
}
"""How a chunk follows the last one."""

DEFAULT_METHODS = ("aligned", "naive", "lerobot", "async", "catch_up", "rtc")
"""Those that are measured where none are named, as far as they fit; the first is the reference."""

RTC_METHODS = ("lerobot", "rtc")
"""Methods that require a policy with real-time chunking."""

EPISODES_FILE, PLOT_FILE = "episodes.parquet", "latency.png"


@dataclass(frozen=True)
class Cell:
    """One condition of the benchmark.

    Raises:
        ValueError: If the method is unknown, or a number is negative.
    """

    method: str
    delay: int  # control steps from an observation until its chunk arrives
    under_way: int  # control steps from sending a command to its execution

    def __post_init__(self) -> None:
        check_choice("methods", self.method, METHODS)
        check_numbers(self, "", delay="[0, inf)", under_way="[0, inf)")


class DelayedPlan:
    """An episode's plan in virtual time: the commands that reach the environment, whatever machine runs it.

    A command reaches it `under_way` steps after it was sent; where none does, the environment holds still.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        action_steps: int,
        threshold: int,
        action_size: int,
        displacements: Sequence[int] = (),
    ) -> None:
        self._cell, self._action_steps = cell, action_steps
        self._displacements = displacements if cell.method == "catch_up" else ()
        self._waits = cell.method in ("naive", "aligned")
        self._threshold = 0 if self._waits else threshold
        self._plan = np.zeros((0, action_size), np.float32)  # all actions of the episode by index
        self._sent = self._executed = 0  # the next index of each
        self._pipeline: deque[np.ndarray | None] = deque([None] * cell.under_way)
        self._commands: list[np.ndarray | None] = []

    def context(self) -> RTCContext | None:
        """Return the actions that the next chunk continues, or None."""
        delay, since = self._cell.delay, self._plan[self._sent :]
        if self._cell.method == "rtc":
            delay, since = self._sent - self._executed + delay, self._plan[self._executed :]
        elif self._cell.method != "lerobot":
            return None
        return RTCContext(since, min(delay, len(since)), 10, 10.0) if len(since) else None

    def advance(self, chunk: np.ndarray) -> list[np.ndarray | None]:
        """Return the commands [a] from a chunk's observation until the next one; see `rollout.Plan`."""
        observed, self._commands = self._executed, []
        for _ in range(self._cell.delay):
            self._step()
        rules = {"naive": 0, "lerobot": self._cell.delay}
        first = rules.get(self._cell.method, self._sent - observed)
        parts = (chunk[:first], self._plan[observed : self._sent], chunk[first:])
        rest = catch_up(*map(torch.from_numpy, parts), self._displacements).numpy()
        last = self._action_steps if self._waits else None
        self._plan = np.concatenate([self._plan[: self._sent], rest[:last]])
        self._step()
        while len(self._plan) - self._sent > self._threshold:
            self._step()
        return self._commands

    def _step(self) -> None:
        """Send the next action, if there is one, and execute the command that is due."""
        self._pipeline.append(self._plan[self._sent] if self._sent < len(self._plan) else None)
        self._sent = min(self._sent + 1, len(self._plan))
        due = self._pipeline.popleft()
        self._executed += due is not None
        self._commands.append(due)


def fitting_methods(policy: ServedCheckpoint, displacements: Sequence[int]) -> list[str]:
    """Return those of `DEFAULT_METHODS` that fit a policy and the indices of its actions for `catch_up`."""
    unfit = () if policy.supports_rtc else RTC_METHODS
    unfit += () if displacements else ("catch_up",)
    return [name for name in DEFAULT_METHODS if name not in unfit]


def benchmark_latency(
    policy: ServedCheckpoint,
    pool: WorkerPool,
    episodes: Sequence[Episode],
    cells: Sequence[Cell],
    *,
    output: Path,
    settings: dict[str, Any],
    batch_size: int = 1,
    displacements: Sequence[int] = (),
) -> Iterator[Row]:
    """Run the same episodes in each cell and yield its success; raw episodes and a plot are in `output`.

    `displacements` are the indices of the actions for which `catch_up` makes up.

    Called again with the same settings (JSON values, all that decides the results), it continues after the
    last finished cell. `gained` and `lost` count episodes against the first cell. The pool is opened here.

    Raises:
        OtherRunError: If `output` holds a benchmark with other settings.
        ValueError: If real-time chunking is requested of a policy that does not support it.
    """
    _check_methods(policy, {cell.method for cell in cells}, displacements)
    total = len(cells) * len(episodes)
    with (
        open_run(output, settings, option="folder"),
        tqdm(desc="Episodes", total=total, unit="ep", smoothing=0) as bar,
    ):
        path = output / EPISODES_FILE
        raw: list[Row] = pq.read_table(path).to_pylist() if path.is_file() else []
        pool.open(render=policy.reads_frames, keep_states=False, history=policy.description.history)
        rows: list[Row] = []
        for cell in cells:
            bar.set_description(f"{cell.method}, delay {cell.delay}, under way {cell.under_way}")
            results = [row for row in raw if row.items() >= asdict(cell).items()]
            if results:
                bar.initial += len(results)  # of an earlier run, which say nothing about the speed
                bar.update(len(results))
            else:
                results = _run_cell(policy, pool, episodes, cell, batch_size, displacements, bar.update)
                raw += results
                buffer = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist(raw), buffer)
                write_bytes(path, buffer.getvalue().to_pybytes())
            reference = [row for row in raw if row.items() >= asdict(cells[0]).items()]
            rows.append(_summarize_cell(cell, results, reference))
            yield rows[-1]
        with atomic_file(output / PLOT_FILE) as draft:
            plot_latency(rows).savefig(draft, format="png", dpi=120)


def _check_methods(policy: ServedCheckpoint, methods: Collection[str], displacements: Sequence[int]) -> None:
    """Refuse methods that do not fit a policy, and `catch_up` without indices of its actions."""
    if not policy.supports_rtc and {*methods} & {*RTC_METHODS}:
        supported = [name for name in METHODS if name not in RTC_METHODS]
        raise ValueError(f"methods: {policy.description.name} supports only {', '.join(supported)}")
    if "catch_up" not in methods:
        return
    check_displacements("displacements", displacements, policy.description.action_size)
    if not displacements:
        raise ValueError(
            "methods: catch_up needs actions that are displacements, and displacements is []. Leave it out "
            "where actions are positions: it would be async."
        )


def _run_cell(
    policy: ServedCheckpoint,
    pool: WorkerPool,
    episodes: Sequence[Episode],
    cell: Cell,
    batch_size: int,
    displacements: Sequence[int],
    count: Callable[[], Any],
) -> list[Row]:
    """Return one row an episode, in order; `count` is called after each."""
    action_steps, size = policy.description.action_steps, policy.description.action_size
    chunk_size = action_steps if policy.noise_shape is None else policy.noise_shape[0]
    threshold = max(chunk_size - action_steps, cell.delay)
    sizes = {"action_steps": action_steps, "threshold": threshold, "action_size": size}
    make_plan = partial(DelayedPlan, cell, displacements=displacements, **sizes)
    rollout = Rollout(policy, pool, batch_size, make_plan=make_plan)
    rows = []
    for end in rollout.run(episodes):
        episode, outcome = end.episode, end.outcome
        identity = {name: getattr(episode, name) for name in ("task_index", "index", "seed")}
        result = {name: outcome[name] for name in ("success", "length", "initial_hash")}
        rows.append({**asdict(cell), **identity, **result})
        count()
    return sorted(rows, key=lambda row: (row["task_index"], row["index"]))


def _summarize_cell(cell: Cell, results: Sequence[Row], reference: Sequence[Row]) -> Row:
    pairs = [(one["success"], other["success"]) for one, other in zip(results, reference, strict=True)]
    return {
        **asdict(cell),
        **_success(sum(one for one, _ in pairs), len(pairs)),
        "gained": sum(one and not other for one, other in pairs),
        "lost": sum(other and not one for one, other in pairs),
        "steps": sum(row["length"] for row in results) / len(results),
    }


def plot_latency(rows: Sequence[Row]) -> Figure:
    """Return a plot of success against delay, one panel for each number of commands under way."""
    panels = sorted({row["under_way"] for row in rows})
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, under_way in zip(axes, panels, strict=True):
        for method in METHODS:
            line = sorted(
                (row["delay"], 100 * row["success"] / row["episodes"])
                for row in rows
                if (row["method"], row["under_way"]) == (method, under_way)
            )
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", label=method)
        axis.set(title=f"commands under way: {under_way}", xlabel="delay, control steps", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success, %")
    axes[0].legend()
    return figure


def complete_episodes(log: Path) -> list[Row]:
    """Return the records of the episodes that were not cut short; none without a log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "success" in line and not line["cut_short"]]


def summarize_log(name: str, log: Path, episodes: int | None = None) -> Row:
    """Return the success in a simulated robot's log (`vega_sim`), and how well time was kept.

    `held_fraction` is the fraction of steps without a command, `lost_commands` the number that was never
    executed, `under_way` how often an observation did not reflect that many commands. `late_fraction` is that
    of steps that the simulator itself began late: above a few percent, the machine was too slow for the log
    to be meaningful.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds fewer than `episodes` (None uses all), or an older version wrote it.
    """
    if not log.exists():
        raise FileNotFoundError(f"no log of a simulated robot at {log}")
    found = complete_episodes(log)
    if not found or len(found) < (episodes or 1):
        raise ValueError(f"{log} holds {len(found)} complete episodes, expected {episodes or 'some'}")
    found = found[:episodes]
    successes = [line for line in found if line["success"]]
    if any("under_way" not in line for line in found):
        raise ValueError(f"{log} was written by an older version; use another file")
    steps = sum(line["steps"] for line in found)
    times = [line["won_at"] for line in successes]
    return {
        "run": name,
        **_success(len(successes), len(found)),
        "seconds_to_success": sum(times) / len(times) if times else None,
        "held_fraction": sum(line["held_steps"] for line in found) / steps,
        "late_fraction": sum(line["late_steps"] for line in found) / steps,
        "lost_commands": sum(line["lost_commands"] for line in found),
        "under_way": dict(sum((Counter(line["under_way"]) for line in found), Counter())),
    }


def benchmark_server(
    address: ServerAddress, *, clients: Sequence[int] = (1, 4, 16), seconds: float = 10.0, side: int = 256
) -> Iterator[Row]:
    """Yield throughput and latency, in milliseconds at the client, for each number of clients.

    Each client sends random frames from its own thread and session as fast as it is answered, after one
    request that is not measured. `overhead_p95_ms` is the latency beyond the time in the model. Start the
    server with a high `server.limits.requests_per_second`.

    Raises:
        PolicyUnavailableError: If the server is unreachable.
        PermissionError: If it does not accept the token.
    """
    for number in clients:
        timings, refused = _request_for(address, number, seconds, side)
        latency, model = 1000 * np.array(timings).T
        p50, p95, p99 = np.percentile(latency, [50, 95, 99]).tolist()
        yield {
            "clients": number,
            "requests_per_second": len(timings) / seconds,
            **{"p50_ms": p50, "p95_ms": p95, "p99_ms": p99},
            "overhead_p95_ms": float(np.percentile(latency - model, 95)),
            "refused": refused,
        }


def _request_for(
    address: ServerAddress, clients: int, seconds: float, side: int
) -> tuple[list[tuple[float, float]], int]:
    """Return seconds of each request in all and in the model, and the number of refused requests."""
    timings: list[tuple[float, float]] = []
    refusals: list[ProtocolError] = []
    failures: list[Exception] = []
    start = threading.Barrier(clients)

    def send(seed: int) -> None:
        client = PolicyClient(address)
        batch = _random_batch(client, side, seed)
        client.predict(batch)
        start.wait()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            try:
                reply = client.predict(batch)
                timings.append((time.perf_counter() - began, reply.model_seconds))
            except ProtocolError as error:
                if error.code != "rate":
                    raise
                refusals.append(error)
        client.close()

    def run(seed: int) -> None:
        try:
            send(seed)
        except (OSError, ValueError, threading.BrokenBarrierError) as error:  # a wrong token, too
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return timings, len(refusals)


def _random_batch(client: PolicyClient, side: int, seed: int) -> ObservationBatch:
    policy = client.connect().policy.policy
    rng = np.random.default_rng(seed)
    shape = (*policy.frame_axes(1), side, side, 3)
    frames = {camera: rng.integers(0, 256, shape, dtype=np.uint8) for camera in policy.cameras}
    return ObservationBatch(frames, np.zeros((1, policy.state_size or 0), np.float32), ["load test"])


def _success(successes: int, episodes: int) -> Row:
    interval = wilson_interval(successes, episodes)
    return {"success": successes, "episodes": episodes, "low": interval.low, "high": interval.high}
