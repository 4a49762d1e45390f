"""Part `prior` for every other one: the reader as a policy calls it, with random weights."""

from collections.abc import Iterator
from typing import Any

import torch

from vega_policy.benchmark.timing import measure
from vega_policy.parts import PriorConfig
from vega_policy.priors import PRIORS
from vega_policy.priors.architectures import reader_without_weights
from vega_policy.priors.reader import PriorReader

CELL = 16
"""Pixels a token of the grid to which features are pooled, as with the compact backbone."""


@torch.no_grad()
def benchmark_reader(
    name: str, device: torch.device, sizes: list[tuple[int, int]], batches: list[int], seconds: float = 1.0
) -> Iterator[dict[str, Any]]:
    """One row for each size and number of frames.

    Args:
        name: A prior.
        device: Where it runs, in float32 on the CPU and in the prior's own type elsewhere.
        sizes: Heights and widths of the frames in pixels; a prior may read them larger (`reads`).
        batches: Numbers of frames encoded at once.
        seconds: About how long each is timed.

    Yields:
        `path` (`plain`), `size`, `frames`, `reads`, `p50_ms`, `p95_ms`, `frames_per_s`, `peak_gib`.

    Raises:
        ValueError: If the prior is unknown or has no networks of its own.
    """
    dtype = "float32" if device.type == "cpu" or name not in PRIORS else PRIORS[name].dtype
    torch.manual_seed(0)
    for size in sizes:
        grid = (size[0] // CELL, size[1] // CELL)
        prior = reader_without_weights(PriorConfig(name=name, dtype=dtype), grid, str(device))
        reads = prior.input_size if isinstance(prior, PriorReader) else size
        for n in batches:
            frames = torch.rand(1, n, 1, 3, *size, device=device)
            latency = measure(lambda prior=prior, frames=frames: prior(frames), device, seconds)
            yield {
                "path": "plain",
                "size": f"{size[0]}x{size[1]}",
                "frames": n,
                "reads": f"{reads[0]}x{reads[1]}",
                "p50_ms": latency.p50,
                "p95_ms": latency.p95,
                "frames_per_s": 1000 * n / latency.p50,
                "peak_gib": latency.peak_gib,
            }
