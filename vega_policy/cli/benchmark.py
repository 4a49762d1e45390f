"""`vega-benchmark`: measure the time of each part on this machine."""

import shlex
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli import Command

FIELDS: dict[str, Any] = {
    "defaults": [{"prior": "wan_tiny"}, {"backbone": "compact"}, {"head": "flow"}],  # with random weights
    "part": "???",  # prior, policy, train, dataset, simulate; deployment: latency, inference, logs, server
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
    # simulate; latency takes the first suite
    "suites": ["lift_wide"],
    # latency (success against thinking steps, without a clock), inference (sync and rtc on the wall clock)
    "checkpoint": None,
    "episodes": 50,  # logs: null counts all
    "thinking_steps": [8],  # environment steps between an observation and its chunk
    "threshold": 10,  # actions left when real-time chunking predicts the next chunk
    "overrides": [],  # inference: further fields of configs/deploy.yaml, such as robot.device.seed=1
    "extra_latency": 0.3,  # inference: seconds added to each prediction
    "folder": "outputs/inference",  # inference: logs; the same command resumes
    # logs
    "logs": {},  # name: file of a simulated robot
    # server
    "url": "ws://127.0.0.1:8765",
    "token_file": None,
    "ca_file": None,
    "clients": [1, 4, 16],
}

DEPLOYMENT = ("latency", "inference", "logs", "server")


@partial(
    Command,
    config="benchmark",
    examples=[
        "vega-benchmark prior prior=wan2.1_t2v_1.3b 'frames=[1,2,8,32]'",
        "vega-benchmark policy prior=wan_tiny device=cpu output=outputs/policy.json",
        "vega-benchmark latency checkpoint=outputs/demo/train/checkpoints/last 'thinking_steps=[0,4,8]'",
        "vega-benchmark logs +logs.sync=outputs/rollout/sync.jsonl",
    ],
    node=FIELDS,
    positional=("part",),
)
def benchmark(config: DictConfig) -> str:
    """Measure a part on this machine.

    Parts: prior, policy, train, dataset, simulate; deployment: latency, inference, logs, server.
    """
    import torch

    from vega_policy.benchmarks import PARTS, benchmark, device_name, summarize, table, write

    if config.part not in (*PARTS, *DEPLOYMENT):
        raise ValueError(f"part: expected one of {', '.join((*PARTS, *DEPLOYMENT))}; got {config.part!r}.")
    options = SimpleNamespace(**OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportCallIssue]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for group in ("prior", "backbone", "head"):
        setattr(options, group, config[group].name)
    device = torch.device(options.device)
    command, rows = shlex.join(["vega-benchmark", *sys.argv[1:]]), []
    measure = _deployment(options) if options.part in DEPLOYMENT else benchmark(options.part, options, device)
    for row in measure:
        rows.append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)  # noqa: T201
        if options.output is not None:  # after each row: a killed run keeps what it measured
            write(Path(options.output), options.part, rows, command, device)
    lines = [f"{options.part} on {device_name(device)}", table(rows), *summarize(options.part, rows)]
    return "\n".join(lines)


def _deployment(options: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of `DEPLOYMENT`."""
    from vega_policy.deployment import latency_benchmark as latency
    from vega_policy.deployment.client import ServerAddress
    from vega_policy.evaluation.policies import find_checkpoint, load_lerobot_policy

    if options.part == "logs":
        for name, file in options.logs.items():
            yield latency.summarize_log(name, Path(file), options.episodes)
    elif options.part == "server":
        token, certificate = options.token_file, options.ca_file
        address = ServerAddress(
            options.url,
            None if token is None else Path(token),
            None if certificate is None else Path(certificate),
        )
        yield from latency.benchmark_server(address, clients=options.clients, seconds=options.seconds)
    elif options.checkpoint is None:
        raise ValueError(
            f"{options.part}: no value for checkpoint. Add checkpoint=FOLDER to the command line."
        )
    elif options.part == "latency":
        envs = import_module("envs")
        environment = envs.make(options.suites[0], 0, frame_size=options.frame_size, rendering="fast")
        yield from latency.benchmark_discrete_time(
            load_lerobot_policy(find_checkpoint(Path(options.checkpoint)), device=options.device),
            environment,
            first_seed=import_module("envs.base").EVALUATION_SEED,
            episodes=options.episodes,
            thinking_steps=options.thinking_steps,
            threshold=options.threshold,
        )
    else:
        overrides = [f"checkpoint={options.checkpoint}", *options.overrides]
        settings = {"episodes": options.episodes, "extra_latency": options.extra_latency}
        yield from latency.benchmark_inference(overrides, output=Path(options.folder), **settings)
