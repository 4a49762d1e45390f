"""How many requests a policy server answers, and how long they take."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from vega_policy.deployment.client import PolicyClient, ServerAddress
from vega_policy.deployment.wire import ProtocolError
from vega_policy.evaluation.policies import ObservationBatch


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
    policy = client.connect().description.policy
    rng = np.random.default_rng(seed)
    shape = (*policy.frame_axes(1), side, side, 3)
    frames = {camera: rng.integers(0, 256, shape, dtype=np.uint8) for camera in policy.cameras}
    return ObservationBatch(frames, np.zeros((1, policy.state_size or 0), np.float32), ["load test"])


def table(loads: list[Load]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| clients | requests/s | p50 ms | p95 ms | p99 ms | beyond the model, p95 ms | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        latencies = f"{load.p50:.1f} | {load.p95:.1f} | {load.p99:.1f} | {load.overhead_p95:.2f}"
        lines.append(f"| {load.clients} | {load.requests_per_second:.1f} | {latencies} | {load.refused} |")
    return "\n".join(lines)
