"""Ways to execute chunks while the policy thinks, compared without a clock: the same on any machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.rtc import ActionQueue, RTCConfig
from torch import Tensor

from vega_policy.deployment.client import PolicyClient, ServerAddress
from vega_policy.deployment.protocol import ProtocolError
from vega_policy.deployment.rtc import Predict, RealTimeEngine
from vega_policy.deployment.safety import JointLimits, SafetyFilter
from vega_policy.evaluation.policies import ObservationBatch
from vega_policy.evaluation.stats import wilson_interval


@dataclass
class Clockless:
    """An episode in which thinking takes steps of the environment.

    Attributes:
        environment: One of `envs`, reset.
        predict: Asks the policy.
        thinking: So many steps pass until a plan is there; without a command the hand holds still.
        steps: Steps until now.
        held: Steps without a command.
        success: Whether the environment said so.
    """

    environment: Any
    predict: Predict
    thinking: int
    steps: int = 0
    held: int = 0
    success: bool = False
    _gripper: float = -1.0

    @property
    def over(self) -> bool:
        """Whether it succeeded, or took as long as it may."""
        return self.success or self.steps >= self.environment.task.horizon

    def step(self, action: Tensor | None) -> None:
        """Execute an action [a], or hold still."""
        if self.over:
            return
        told = np.zeros(self.environment.action_space.shape[0])
        told[-1] = self._gripper
        if action is None:
            self.held += 1
        else:
            told = action.numpy().astype(np.float64)
        self._gripper = told[-1]
        self.success = bool(self.environment.step_blindly(told)[0])
        self.steps += 1


def sync(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Wait while the policy thinks, then execute the first actions of its chunk."""
    while not world.over:
        _, actions = world.predict(world.environment.observe(), 0, None)
        for action in [None] * world.thinking + list(actions[:action_steps]):
            world.step(action)


def joined(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking as `RealTimeEngine` does it: chunks are joined by what was executed."""
    safety = SafetyFilter([JointLimits("any", -1.0, 1.0)], period=0.05, max_observation_age=np.inf)

    def tick() -> None:
        engine.notify_observation({} if world.over else world.environment.observe())
        world.step(engine.get_action(None))

    def think(seen: dict[str, Any], delay: int, left: Tensor | None) -> tuple[Tensor, Tensor]:
        answer = world.predict(seen, delay, left)
        for _ in range(world.thinking - 1):  # the tick before has executed one
            tick()
        return answer

    engine = RealTimeEngine(think, lambda: None, safety, threshold=threshold, shutdown=threading.Event())
    while not world.over:
        tick()
        if not world.over:
            engine.think()


def by_the_clock(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking with LeRobot's own queue: what the clock says was executed is dropped."""
    queue = ActionQueue(RTCConfig())
    while not world.over:
        if queue.qsize() > threshold:
            world.step(queue.get())
            continue
        chunk, actions = world.predict(world.environment.observe(), world.thinking, queue.get_left_over())
        for _ in range(world.thinking):
            world.step(queue.get())
        queue.merge(chunk, actions, world.thinking, None)
        world.step(queue.get())


WAYS: dict[str, Callable[..., None]] = {"sync": sync, "rtc": joined, "rtc by the clock": by_the_clock}


def frames_to_batch(observation: dict[str, Any], task: str) -> dict[str, Any]:
    """Return an environment's observation as LeRobot's pre-processor takes it."""
    frames = {
        f"observation.images.{camera}": torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        for camera, pixels in observation["pixels"].items()
    }
    state = torch.from_numpy(np.asarray(observation["agent_pos"], np.float32))[None]
    return {**frames, "observation.state": state, "task": [task]}


@dataclass(frozen=True)
class Runs:
    """Episodes of one log.

    Attributes:
        name: What was run.
        episodes: Number of episodes.
        successes: Number of successes.
        low: Lower end of the 95% Wilson interval of the success rate.
        high: Upper end.
        seconds_to_success: Mean wall-clock seconds of the successes, or None without any.
        held_share: Share of the steps for which no command had come.
        late_share: Share of the steps that the simulator itself began late; above a few percent, the machine
            was too slow and the log says little.
    """

    name: str
    episodes: int
    successes: int
    low: float
    high: float
    seconds_to_success: float | None
    held_share: float
    late_share: float


def whole_episodes(path: Path) -> list[dict[str, Any]]:
    """Return the records of episodes that nobody cut short; none, if there is no log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "success" in line and not line["cut_short"]]


def read_runs(name: str, path: Path, episodes: int | None = None) -> Runs:
    """Read the log of a simulated robot (`vega_sim`).

    Args:
        name: What was run.
        path: Its JSON lines.
        episodes: Only so many episodes, the first ones; None takes all.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds fewer episodes.
    """
    if not path.exists():
        raise FileNotFoundError(f"no log of a simulated robot at {path}")
    played = whole_episodes(path)
    if not played or len(played) < (episodes or 1):
        raise ValueError(f"{path} holds {len(played)} whole episodes, expected {episodes or 'some'}")
    played = played[:episodes]
    if any("won_at" not in line for line in played if line["success"]):
        raise ValueError(f"{path} was written by an older version; name another file")
    won = [line for line in played if line["success"]]
    steps = sum(line["steps"] for line in played)
    interval = wilson_interval(len(won), len(played))
    return Runs(
        name,
        len(played),
        len(won),
        interval.low,
        interval.high,
        sum(line["won_at"] for line in won) / len(won) if won else None,
        sum(line["held_steps"] for line in played) / steps,
        sum(line["late_steps"] for line in played) / steps,
    )


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note in a folder what is played there.

    Args:
        folder: Of a comparison's logs; made if need be.
        settings: All that decides the episodes; plain values.

    Raises:
        ValueError: If something else was played there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, told = folder / "settings.json", json.dumps(settings, indent=1)
    if note.is_file() and note.read_text() != told:
        raise ValueError(f"{folder} holds episodes of {note.read_text()}, not of {told}; name another folder")
    note.write_text(told)


def log_table(runs: list[Runs]) -> str:
    """Return the logs as a Markdown table."""
    lines = [
        "| run | success | 95% interval | seconds to success | steps without command | late steps |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        share = f"{run.successes}/{run.episodes} | {100 * run.low:.0f} to {100 * run.high:.0f}%"
        seconds = "" if run.seconds_to_success is None else f"{run.seconds_to_success:.1f}"
        time_kept = f"{100 * run.held_share:.0f}% | {100 * run.late_share:.1f}%"
        lines.append(f"| {run.name} | {share} | {seconds} | {time_kept} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Load:
    """What was measured with so many clients; latencies in milliseconds, seen from the client.

    Attributes:
        clients: Clients, each asking again as soon as it is answered.
        requests_per_second: Answers of all clients together.
        refused: Requests that were refused (rate limit).
        p50: Half of the requests took less.
        p95: 95% of them did.
        p99: 99% of them did.
        overhead_p95: As `p95`, of the latency beyond the time that the batch spent in the model.
    """

    clients: int
    requests_per_second: float
    refused: int
    p50: float
    p95: float
    p99: float
    overhead_p95: float


def measure(address: ServerAddress, *, clients: int, seconds: float, side: int) -> Load:
    """Let clients ask for a while, with random raw frames.

    Args:
        address: Where the server is.
        clients: Number of clients, each a thread with a session of its own.
        seconds: How long they ask, after one unmeasured request each.
        side: Height and width of the frames in pixels.

    Raises:
        PolicyUnavailableError: If the server cannot be reached.
        PermissionError: If it does not believe the token.
    """
    timings: list[tuple[float, float]] = []
    refused = [0]
    start = threading.Barrier(clients)
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        client = PolicyClient(address)
        batch = random_batch(client, side, seed)
        client.predict(batch)
        start.wait()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            try:
                reply = client.predict(batch)
            except ProtocolError as error:
                if error.code != "rate":
                    raise
                refused[0] += 1
                continue
            timings.append((time.perf_counter() - began, reply.model_seconds))
        client.close()

    def watched(seed: int) -> None:
        try:
            ask(seed)
        except (OSError, ValueError, threading.BrokenBarrierError) as error:  # a wrong token, too
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=watched, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return _load(clients, len(timings) / seconds, refused[0], 1000 * np.array(timings))


def _load(clients: int, rate: float, refused: int, timings: np.ndarray) -> Load:
    """Percentiles of [n 2]: milliseconds of an answer, and of the model's share in it."""
    latency, model = timings.T
    p50, p95, p99 = np.percentile(latency, [50, 95, 99])
    return Load(clients, rate, refused, p50, p95, p99, float(np.percentile(latency - model, 95)))


def random_batch(client: PolicyClient, side: int, seed: int) -> ObservationBatch:
    """Return one observation of random frames, as the server's policy reads it."""
    policy = client.connect().policy.policy
    rng = np.random.default_rng(seed)
    shape = (*policy.frame_axes(1), side, side, 3)
    frames = {camera: rng.integers(0, 256, shape, dtype=np.uint8) for camera in policy.cameras}
    return ObservationBatch(frames, np.zeros((1, policy.state_size or 0), np.float32), ["load test"])


def load_table(loads: list[Load]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| clients | requests/s | p50 ms | p95 ms | p99 ms | beyond the model, p95 ms | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        latencies = f"{load.p50:.1f} | {load.p95:.1f} | {load.p99:.1f} | {load.overhead_p95:.2f}"
        lines.append(f"| {load.clients} | {load.requests_per_second:.1f} | {latencies} | {load.refused} |")
    return "\n".join(lines)
