"""`vega-benchmark`: measure the time of each part on this machine."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command

FIELDS: dict[str, Any] = {
    "defaults": [{"prior": "wan_tiny"}, {"backbone": "compact"}, {"head": "flow"}],  # with random weights
    "part": "???",  # prior, policy, train, dataset, simulate
    "device": None,  # null: cuda where there is one
    "output": None,  # JSON file, written after each row
    "seconds": 1.0,  # duration of each measurement
    # prior, policy, train
    "sizes": ["256x256"],  # frames, HEIGHTxWIDTH
    "frames": [2],  # frames encoded at once
    "paths": None,  # of released, all_blocks, early_stop, fast
    # policy, train
    "views": 2,
    "frame_size": 128,
    "batch": 256,  # samples of a training step
    "text_encoder": None,  # folder of a sentence encoder's config
    "cases": ["live", "cached", "none"],  # of the prior's features
    "variants": None,  # of eager, compiled
    # dataset
    "root": "outputs/demo/demonstrations",
    "repo_id": "vega/lift_wide",
    "cache_root": "outputs/cache",
    "cached": ["semantic", "prior"],  # of frames, semantic, prior
    "small": False,  # the demo's small trunk and head
    # simulate
    "suites": ["lift_wide"],
}


def run(config: DictConfig) -> str:
    """Measure one part and return its table."""
    import torch

    from vega_policy.benchmarks import PARTS, benchmark
    from vega_policy.benchmarks.timing import device_name, summarize, table, write

    if config.part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}; got {config.part!r}.")
    options = SimpleNamespace(**OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportCallIssue]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for group in ("prior", "backbone", "head"):
        setattr(options, group, config[group].name)
    device = torch.device(options.device)
    command, rows = shlex.join(["vega-benchmark", *sys.argv[1:]]), []
    for row in benchmark(options.part, options, device):
        rows.append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)  # noqa: T201
        if options.output is not None:  # after each row: a killed run keeps what it measured
            write(Path(options.output), options.part, rows, command, device)
    lines = [f"{options.part} on {device_name(device)}", table(rows), *summarize(options.part, rows)]
    return "\n".join(lines)


main = Command(
    config="benchmark",
    run=run,
    summary="Measure the time of each part on this machine: prior, policy, train, dataset, simulate.",
    examples=[
        "vega-benchmark prior prior=wan2.1_t2v_1.3b 'frames=[1,2,8,32]'",
        "vega-benchmark policy prior=wan_tiny device=cpu output=outputs/policy.json",
    ],
    node=FIELDS,
    positional=("part",),
).main
