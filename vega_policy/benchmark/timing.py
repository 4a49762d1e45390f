"""Clocks: latency of a call, peak memory, and the ceiling that matrix products reach on this machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """How long a call takes.

    Attributes:
        p50: Median in milliseconds.
        p95: 95th percentile in milliseconds.
        calls: Number of timed calls.
        peak_gib: Peak of allocated device memory in GiB during the calls; None on the CPU.
    """

    p50: float
    p95: float
    calls: int
    peak_gib: float | None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(call: Call, device: torch.device, seconds: float = 1.0, warm_up: int = 3) -> Latency:
    """Time a call from its start to the end of the work it gave to the device.

    Args:
        call: What is timed, without arguments.
        device: Where it runs.
        seconds: About how long to go on; at least five calls are timed.
        warm_up: Calls before the clock runs.
    """
    for _ in range(warm_up):
        call()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    times.sort()
    return Latency(statistics.median(times), times[int(0.95 * (len(times) - 1))], len(times), peak)


def busy_time(call: Call, device: torch.device, repeat: int = 20) -> float:
    """Mean milliseconds of a call when calls follow each other without a pause."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / repeat


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random square matrices, the ceiling for everything made of products."""
    side = 8192 if device.type == "cuda" else 1024
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    milliseconds = busy_time(lambda: first @ second, device, repeat=20 if device.type == "cuda" else 5)
    return 2 * side**3 / milliseconds / 1e9


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
