"""Which kernels a GPU spends a call's time on, by kind and one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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
    for name, time in times.items():
        lower = name.lower()
        fitting = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
        kind = next(fitting, "pointwise and sums")
        sums[kind] = sums.get(kind, 0.0) + time
    return {f"{kind}_ms": time for kind, time in sums.items()}


def longest(times: dict[str, float], count: int = 14) -> dict[str, float]:
    """The longest kernels under the first 90 letters of their names."""
    return {name[:90]: round(time, 4) for name, time in list(times.items())[:count]}
