"""Clocks: latency of a call, peak memory, and the ceiling that matrix products reach on this machine."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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


KINDS = {
    "attention": ("fmha", "flash", "attention", "softmax"),
    "convolution": ("conv", "wgrad", "dgrad", "fprop", "nchwtonhwc", "nhwctonchw", "depthwise"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "mm_", "splitk"),
    "compiled": ("triton",),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kind -> parts of kernel names, the first that fits; all others are `pointwise and sums`."""


def kernel_times(call: Callable[[], Any], repeat: int = 5) -> dict[str, float]:
    """Milliseconds of each CUDA kernel in one call, the longest first; empty without a GPU.

    Args:
        call: What is looked at, warmed up already.
        repeat: Calls to take the mean of.
    """
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeat):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in seen.key_averages():
        times[event.key] = times.get(event.key, 0.0) + event.self_device_time_total / 1000 / repeat
    return dict(sorted(((name, time) for name, time in times.items() if time), key=lambda pair: -pair[1]))


def operator_times(call: Callable[[], Any], most: int = 24) -> dict[str, float]:
    """Milliseconds on the GPU by operator and shapes of its inputs, the longest first; empty without a GPU.

    A copy is named by what it copies here, which its kernel does not tell. What a CUDA graph replays has no
    operators.

    Args:
        call: What is looked at, warmed up already.
        most: So many operators.
    """
    if not torch.cuda.is_available():
        return {}
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as seen:
        call()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages(group_by_input_shape=True) if event.key.startswith("aten")]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        f"{event.key} x{event.count} {event.input_shapes}"[:150]: event.self_device_time_total / 1000
        for event in events[:most]
    }


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds by kind of kernel, as columns `<kind>_ms`."""
    sums: dict[str, float] = {}
    for name, milliseconds in times.items():
        lower = name.lower()
        fitting = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
        kind = next(fitting, "pointwise and sums")
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    return {f"{kind}_ms": time for kind, time in sums.items()}


def longest(times: dict[str, float], count: int = 14) -> dict[str, float]:
    """The longest kernels under the first 90 letters of their names."""
    return {name[:90]: round(time, 4) for name, time in list(times.items())[:count]}


Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns; a field that a row lacks stays empty, one that holds fields is left out.

    Args:
        rows: Plain values by column.
    """
    fields = (column for row in rows for column, value in row.items() if not isinstance(value, dict))
    columns = list(dict.fromkeys(fields))
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ratios(rows: Sequence[Row], baseline: str, subject: str) -> list[str]:
    """How much faster `subject` is than `baseline`, one sentence for each size and number of frames.

    Args:
        rows: Rows of the part `prior`.
        baseline: A path.
        subject: A path; its variants (`fast/encode=8`) count too.
    """
    times = {(row["size"], row["frames"], row["path"]): row["p50_ms"] for row in rows}
    return [
        f"{size}, {frames} frames: {path} is {times[size, frames, baseline] / time:.1f} times as fast as "
        f"{baseline}"
        for (size, frames, path), time in times.items()
        if path.split("/")[0] == subject and (size, frames, baseline) in times
    ]


def cost_of_prior(rows: Sequence[Row]) -> list[str]:
    """Share of the steps a second without a prior that is left with one, one sentence for each row of it.

    Args:
        rows: Rows of the part `train`.
    """
    none = {row["variant"]: row["step_ms"] for row in rows if row["prior"] == "none"}
    return [
        f"prior {row['prior']}, {row['variant']}: {none[row['variant']] / row['step_ms']:.2f} of the steps a "
        "second without a prior"
        for row in rows
        if row["prior"] != "none" and row["variant"] in none
    ]


def write(path: Path, part: str, rows: Sequence[Row], command: str, device: torch.device) -> None:
    """Write rows with all that one needs to know about where they come from.

    Args:
        path: JSON file; its folder is made.
        part: Name of the part.
        rows: The part's rows.
        command: Command line that made them.
        device: Where it ran.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "part": part,
        "command": command,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
