"""Measures the cost of latency: success in discrete time and on the wall clock, and a server's load.

Each benchmark returns or yields rows of plain values, one table row each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from vega_policy.evaluation.policies import LeRobotChunkPolicy, ObservationBatch, lerobot_keys
from vega_policy.evaluation.stats import wilson_interval
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import open_run

Row = dict[str, Any]

INFERENCE = {"sync": ["inference=sync"], "rtc": ["inference=rtc", "inference.queue_threshold=12"]}
"""Overrides of configs/deploy.yaml that `benchmark_inference` compares."""

DEPLOY = (sys.executable, "-c", "from vega_policy.cli.deploy import main; main()")
SIMULATOR_LOG = "vega_sim.jsonl"


@dataclass
class DiscreteTimeEpisode:
    """An episode in which a prediction takes steps of the environment: the same on any machine."""

    environment: Any  # one of `envs`, reset
    predict: Predict
    thinking_steps: int  # steps from an observation until its chunk arrives; the hand rests without a command
    steps: int = 0
    held_steps: int = 0  # steps without a command
    success: bool = False
    _gripper: float = -1.0

    @property
    def is_over(self) -> bool:
        """Whether it succeeded, or reached the task's horizon."""
        return self.success or self.steps >= self.environment.task.horizon

    def step(self, action: Tensor | None) -> None:
        """Execute an action [a], or hold still."""
        if self.is_over:
            return
        command = np.zeros(self.environment.action_space.shape[0])
        command[-1] = self._gripper
        if action is None:
            self.held_steps += 1
        else:
            command = action.numpy().astype(np.float64)
        self._gripper = command[-1]
        self.success = bool(self.environment.step_blindly(command)[0])
        self.steps += 1


def run_sync(episode: DiscreteTimeEpisode, *, action_steps: int, threshold: int) -> None:
    """Wait for each prediction, then execute the first actions of its chunk."""
    while not episode.is_over:
        _, actions = episode.predict(episode.environment.observe(), 0, None)
        for action in [None] * episode.thinking_steps + list(actions[:action_steps]):
            episode.step(action)


def run_rtc(episode: DiscreteTimeEpisode, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking of `RealTimeEngine`: chunks are joined by the number of executed actions."""
    safety = SafetyFilter([JointLimits("any", -1.0, 1.0)], period=0.05, max_observation_age=np.inf)

    def tick() -> None:
        engine.notify_observation({} if episode.is_over else episode.environment.observe())
        episode.step(engine.get_action(None))

    def predict(observation: dict[str, Any], delay: int, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        chunk = episode.predict(observation, delay, rest)
        for _ in range(episode.thinking_steps - 1):  # the tick before has executed one
            tick()
        return chunk

    engine = RealTimeEngine(predict, lambda: None, safety, threshold=threshold, shutdown=threading.Event())
    while not episode.is_over:
        tick()
        if not episode.is_over:
            engine.predict_if_due()


def run_rtc_by_clock(episode: DiscreteTimeEpisode, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking with LeRobot's queue, which drops the actions that were due by the clock."""
    queue = ActionQueue(RTCConfig())
    while not episode.is_over:
        if queue.qsize() > threshold:
            episode.step(queue.get())
            continue
        chunk, actions = episode.predict(
            episode.environment.observe(), episode.thinking_steps, queue.get_left_over()
        )
        for _ in range(episode.thinking_steps):
            episode.step(queue.get())
        queue.merge(chunk, actions, episode.thinking_steps, None)
        episode.step(queue.get())


MODES: dict[str, Callable[..., None]] = {
    "sync": run_sync,
    "rtc": run_rtc,
    "rtc by the clock": run_rtc_by_clock,
}


def benchmark_discrete_time(
    chunks: LeRobotChunkPolicy,
    environment: Any,
    *,
    first_seed: int,
    episodes: int = 50,
    thinking_steps: Sequence[int] = (8,),
    threshold: int = 10,
    modes: Sequence[str] = tuple(MODES),
) -> Iterator[Row]:
    """Yield the success of each mode at each number of thinking steps, over the same episodes.

    `environment` is one of `envs`, with the cameras that the policy was trained on. A thinking step is an
    environment step between an observation and the arrival of its chunk. Real-time chunking predicts the next
    chunk at `threshold` actions left.

    Raises:
        ValueError: If the policy is not of type vega, or a mode is unknown.
    """
    policy, description = chunks.policy, chunks.description
    if not isinstance(policy, VegaPolicy):
        raise ValueError(f"expected a policy of type vega, got {description.name}")
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"modes: expected some of {', '.join(MODES)}; got {', '.join(sorted(unknown))}")

    @torch.no_grad()
    def predict(observation: dict[str, Any], delay: int, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        names = lerobot_keys(observation["pixels"])
        frames = {camera: observation["pixels"][names[camera]][None] for camera in description.cameras}
        state = np.asarray(observation["agent_pos"], np.float32)[None]
        inputs = chunks.inputs(ObservationBatch(frames, state, [environment.task.instruction]))
        chunk = policy.predict_action_chunk(inputs, inference_delay=delay, prev_chunk_left_over=rest)
        return chunk[0], chunks.postprocessor(chunk)[0]

    for steps in thinking_steps:
        for mode in modes:
            policy.use_rtc(None if mode == "sync" else RTCConfig())
            runs = [DiscreteTimeEpisode(environment, predict, steps) for _ in range(episodes)]
            for index, run in enumerate(runs):
                torch.manual_seed(index)  # of the noise that a chunk starts from
                environment.reset_blindly(seed=first_seed + index)
                MODES[mode](run, action_steps=description.action_steps, threshold=threshold)
            yield {
                "mode": mode,
                "thinking_steps": steps,
                **_success(sum(run.success for run in runs), episodes),
                "steps": sum(run.steps for run in runs) / episodes,
                "held_steps": sum(run.held_steps for run in runs) / episodes,
            }


def benchmark_inference(
    overrides: Sequence[str],
    *,
    output: Path,
    episodes: int = 50,
    block: int = 10,
    seconds: float = 6.0,
    extra_latency: float = 0.3,
    command: Sequence[str] = DEPLOY,
) -> list[Row]:
    """Compare `INFERENCE` on the simulated robot and the wall clock, with a policy that is made slower.

    Blocks of episodes alternate, so that other load of the machine affects both. Called again, it resumes.

    Args:
        overrides: Overrides of configs/deploy.yaml, such as `checkpoint=...`.
        output: Folder of the logs.
        episodes: Episodes of each inference.
        block: Episodes of one inference before the other one's turn.
        seconds: Length of an episode.
        extra_latency: Seconds added to each prediction.
        command: Program that deploys; takes overrides.

    Raises:
        OtherRunError: If `output` holds episodes of other settings.
        RuntimeError: If a deployment fails or adds no episode.
    """
    settings = {"overrides": list(overrides), "seconds": seconds, "extra_latency": extra_latency}
    logs = {name: output / name / SIMULATOR_LOG for name in INFERENCE}
    with open_run(output, settings):
        while (done := min(len(complete_episodes(log)) for log in logs.values())) < episodes:
            end = min(done // block * block + block, episodes)
            for name, log in logs.items():
                first = len(complete_episodes(log))
                if first >= end:
                    continue
                arguments = [
                    *("robot=vega_sim", "task=lift the red cube", *INFERENCE[name]),
                    *(f"robot.device.first_episode={first}", f"episodes={end - first}"),
                    *(f"episode_seconds={seconds}", f"output_dir={log.parent}"),
                    *(f"extra_latency_seconds={extra_latency}", *overrides),
                ]
                code = subprocess.run([*command, *arguments], check=False).returncode
                if code != 0 or len(complete_episodes(log)) <= first:
                    raise RuntimeError(f"no episode was added to {log} (exit status {code}); see above")
    return [summarize_log(name, log, episodes) for name, log in logs.items()]


def complete_episodes(log: Path) -> list[Row]:
    """Return the records of the episodes that were not cut short; none without a log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "success" in line and not line["cut_short"]]


def summarize_log(name: str, log: Path, episodes: int | None = None) -> Row:
    """Return the success in a simulated robot's log (`vega_sim`), and how well time was kept.

    `held_fraction` is the fraction of steps without a command, `late_fraction` that of steps that the
    simulator itself began late: above a few percent, the machine was too slow for the log to be meaningful.

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
    if any("won_at" not in line for line in successes):
        raise ValueError(f"{log} was written by an older version; use another file")
    steps = sum(line["steps"] for line in found)
    times = [line["won_at"] for line in successes]
    return {
        "run": name,
        **_success(len(successes), len(found)),
        "seconds_to_success": sum(times) / len(times) if times else None,
        "held_fraction": sum(line["held_steps"] for line in found) / steps,
        "late_fraction": sum(line["late_steps"] for line in found) / steps,
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
