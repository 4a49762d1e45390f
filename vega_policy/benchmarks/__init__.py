"""Time, memory, kernels and the ceiling of matrix products; rows of results as a table and as JSON."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vega_policy.model.config import ActionHeadConfig, BackboneConfig, ModelConfig, PriorConfig
from vega_policy.run_dir import write_json

Call = Callable[[], Any]
Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(call: Call, device: torch.device, seconds: float = 1.0, warm_up: int = 3) -> Row:
    """Time a call to the end of its work on the device, for about `seconds`, at least five times.

    Returns `p50_ms`, `p95_ms`, and `peak_gib`, the peak of allocated device memory, None on the CPU.
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
    p95 = times[int(0.95 * (len(times) - 1))]
    return {"p50_ms": statistics.median(times), "p95_ms": p95, "peak_gib": peak}


def busy_time(call: Call, device: torch.device, repeat: int = 20) -> float:
    """Return the mean milliseconds of a call when calls follow each other without a pause."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / repeat


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product, the ceiling for what consists of such products."""
    side = 8192 if device.type == "cuda" else 1024
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    milliseconds = busy_time(lambda: first @ second, device, repeat=20 if device.type == "cuda" else 5)
    return 2 * side**3 / milliseconds / 1e9


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'' if count == 1 else 's'}"


KINDS = {
    "attention": ("fmha", "flash", "attention", "softmax"),
    "convolution": ("conv", "wgrad", "dgrad", "fprop", "nchwtonhwc", "nhwctonchw", "depthwise"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "mm_", "splitk"),
    "compiled": ("triton",),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kind -> parts of kernel names, the first that fits; all others are `pointwise and sums`."""


def kernel_fields(call: Call, device: torch.device) -> Row:
    """Return milliseconds of all CUDA kernels of a call, by kind, and of the longest; empty on the CPU."""
    if device.type != "cuda":
        return {}
    times = kernel_times(call)
    return {"kernels_ms": sum(times.values()), **by_kind(times), "kernels": longest(times)}


def kernel_times(call: Call, repeat: int = 5) -> dict[str, float]:
    """Return milliseconds of each CUDA kernel, the longest first, as the mean over calls after the first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeat):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        times[event.key] = times.get(event.key, 0.0) + event.self_device_time_total / 1000 / repeat
    return dict(sorted(((name, time) for name, time in times.items() if time), key=lambda pair: -pair[1]))


def operator_times(call: Call, count: int = 24) -> dict[str, float]:
    """Return milliseconds on the GPU by operator and input shapes, the longest first.

    The shapes show what a copy copies, which its kernel's name does not.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = [
        event for event in profiler.key_averages(group_by_input_shape=True) if event.key.startswith("aten")
    ]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        f"{event.key} x{event.count} {event.input_shapes}"[:150]: event.self_device_time_total / 1000
        for event in events[:count]
    }


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Return milliseconds by kind of kernel, as columns `<kind>_ms`."""
    sums: dict[str, float] = {}
    for name, milliseconds in times.items():
        lower = name.lower()
        fitting = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
        kind = next(fitting, "pointwise and sums")
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    return {f"{kind}_ms": time for kind, time in sums.items()}


def longest(times: dict[str, float], count: int = 14) -> dict[str, float]:
    """Return the longest kernels under the first 90 letters of their names."""
    return {name[:90]: round(time, 4) for name, time in list(times.items())[:count]}


def table(rows: Sequence[Row]) -> str:
    """Return rows as aligned columns; a missing field is empty, nested fields are left out."""
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


def summarize(part: str, rows: Sequence[Row]) -> list[str]:
    """Return the sentences that compare the rows of a part."""
    if part == "prior":
        baselines = ("released", "all_blocks", "early_stop")
        return [sentence for baseline in baselines for sentence in ratios(rows, baseline, "fast")]
    return {"train": cost_of_prior, "simulate": rendering_gain}.get(part, lambda _: [])(rows)


def ratios(rows: Sequence[Row], baseline: str, subject: str) -> list[str]:
    """Compare a path, with any options (`fast/encode=8`), to a baseline at each size and number of frames."""
    times = {(row["size"], row["frames"], row["path"]): row["p50_ms"] for row in rows}
    return [
        f"{size}, {frames} frames: {path} is {times[size, frames, baseline] / time:.1f} times as fast as "
        f"{baseline}"
        for (size, frames, path), time in times.items()
        if path.split("/")[0] == subject and (size, frames, baseline) in times
    ]


def cost_of_prior(rows: Sequence[Row]) -> list[str]:
    """Compare training with a prior to training without one, in rows of the part `train`."""
    none = {row["variant"]: row["step_ms"] for row in rows if row["prior"] == "none"}
    return [
        f"prior {row['prior']}, {row['variant']}: {none[row['variant']] / row['step_ms']:.2f} of the steps a "
        "second without a prior"
        for row in rows
        if row["prior"] != "none" and row["variant"] in none
    ]


def rendering_gain(rows: Sequence[Row]) -> list[str]:
    """Compare the fast rendering profile to the full one, in rows of the part `simulate`."""
    rates = {(row["suite"], row["rendering"]): row["steps_per_s"] for row in rows}
    return [
        f"{suite}: fast rendering is {rate / rates[suite, 'full']:.1f} times as fast as full"
        for (suite, rendering), rate in rates.items()
        if rendering == "fast" and (suite, "full") in rates
    ]


def write(path: Path, part: str, rows: Sequence[Row], command: str, device: torch.device) -> None:
    """Write the rows of a part as JSON, with the command line, the device and the versions that made them."""
    report = {
        "part": part,
        "command": command,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": list(rows),
    }
    write_json(path, report)


PARTS = ("prior", "policy", "train", "dataset", "simulate")


def benchmark(part: str, options: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure one part of `PARTS` and yield its rows; `options` has the fields of the command.

    Raises:
        ValueError: If a size is not HEIGHTxWIDTH in multiples of 16, or a path, case or variant is unknown.
    """
    from vega_policy.benchmarks import parts

    if part == "prior":
        released = ["released"] if device.type == "cuda" else []
        paths = options.paths or [*released, "all_blocks", "early_stop", "fast"]
        for path in paths:
            parts.parse_path(path)  # refuses unknown ones before anything is measured
        sizes = [parse_size(text) for text in options.sizes]
        if options.prior not in parts.WAN:
            return parts.benchmark_any_prior(options.prior, device, sizes, options.frames, options.seconds)
        return parts.benchmark_prior(options.prior, device, sizes, options.frames, paths, options.seconds)
    if part == "policy":
        return parts.benchmark_policy(model_config(options), device, options.seconds)
    if part == "train":
        variants = options.variants or (["eager", "compiled"] if device.type == "cuda" else ["eager"])
        config, cases = model_config(options), tuple(options.cases)
        return parts.benchmark_train(config, device, options.batch, options.seconds, cases, tuple(variants))
    if part == "dataset":
        return parts.benchmark_dataset(options, device, options.seconds)
    return parts.benchmark_simulate(options.suites, options.frame_size, options.seconds)


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of a size such as `256x256`."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"sizes: expected HEIGHTxWIDTH in multiples of 16, such as 256x256; got {text!r}.")
    return int(sides[0]), int(sides[1])


def model_config(options: Any) -> ModelConfig:
    """Return the model of the parts `policy` and `train`, without pre-trained weights."""
    backbone = BackboneConfig(pretrained=False, text_encoder=options.text_encoder, freeze_text_encoder=True)
    if options.backbone != "compact":
        backbone = BackboneConfig(name=options.backbone, pretrained=False, dtype="bfloat16")
    return ModelConfig(
        views=options.views,
        state_dim=8,
        action_dim=7,
        frame_size=options.frame_size,
        prior=PriorConfig(name=options.prior),
        backbone=backbone,
        head=ActionHeadConfig(name=options.head),
    )
