"""`vega-benchmark`: measure the time of each part on this machine."""

import math
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
    "defaults": [
        *({"prior": "wan_tiny"}, {"backbone": "compact"}, {"head": "flow"}),  # with random weights
        {"env": "lift_wide"},
    ],
    "part": "???",  # prior, policy, train, dataset, simulate; deployment: latency, logs, server
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
    # latency: success in the suite of the group env against delays in control steps, on any machine the same
    "checkpoint": None,
    "methods": [
        "aligned",
        "naive",
        "lerobot",
        "async",
        "rtc",
    ],  # the first one with the first delays: reference
    "delays": [0, 1, 2, 4, 8],  # from an observation until its chunk arrives
    "under_way": [0, 1, 2],  # from sending a command to its execution
    "tasks": None,  # indices; null: the whole suite
    "episodes": 40,  # of each cell, spread over the tasks; logs: null counts all
    "action_steps": None,  # actions executed of each chunk; null takes the policy's own n_action_steps
    "num_envs": 10,  # batch size of the policy
    "processes": 2,  # simulator processes
    "folder": "outputs/latency/${env.suite}",  # raw episodes and plot; the same command resumes
    # logs
    "logs": {},  # name: file of a simulated robot
    # server
    "url": "ws://127.0.0.1:8765",
    "token_file": None,
    "ca_file": None,
    "clients": [1, 4, 16],
}

DEPLOYMENT = ("latency", "logs", "server")


@partial(
    Command,
    config="benchmark",
    examples=[
        "vega-benchmark prior prior=wan2.1_t2v_1.3b 'frames=[1,2,8,32]'",
        "vega-benchmark policy prior=wan_tiny device=cpu output=outputs/policy.json",
        "vega-benchmark latency checkpoint=outputs/demo/train/checkpoints/last 'delays=[0,4,8]'",
        "vega-benchmark logs +logs.sync=outputs/rollout/sync.jsonl",
    ],
    node=FIELDS,
    positional=("part",),
)
def benchmark(config: DictConfig) -> str:
    """Measure a part on this machine.

    Parts: prior, policy, train, dataset, simulate; deployment: latency, logs, server.
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
    else:
        yield from _latency(options)


def _latency(options: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Yield success in virtual time, a row for each method, delay and number of commands under way."""
    from vega_policy.deployment.latency_benchmark import Cell, benchmark_latency
    from vega_policy.deployment.server import load_served_policy
    from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
    from vega_policy.evaluation.episodes import plan_episodes, select_tasks

    if options.checkpoint is None:
        raise ValueError("latency: no value for checkpoint. Add checkpoint=FOLDER to the command line.")
    env = options.env
    tasks = select_tasks(import_module("envs").tasks(env["suite"]), options.tasks)
    official = all(task.official_states for task in tasks)
    episodes = plan_episodes(tasks, math.ceil(options.episodes / len(tasks)), 0, official_states=official)
    cells = [
        Cell(method, delay, under_way)
        for under_way in options.under_way
        for delay in options.delays
        for method in options.methods
    ]
    factory = EnvironmentFactory("envs.make", env["frame_size"], env["rendering"])
    policy = load_served_policy(
        Path(options.checkpoint), device=options.device, action_steps=options.action_steps
    )
    settings = {"checkpoint": policy.fingerprint, "action_steps": policy.description.action_steps, "env": env}
    settings |= {"tasks": options.tasks, "episodes": options.episodes, "num_envs": options.num_envs}
    output = Path(options.folder)
    with WorkerPool(factory, min(options.processes, options.num_envs)) as pool:
        sizes = {"num_envs": options.num_envs, "settings": settings}
        yield from benchmark_latency(policy, pool, episodes, cells, output=output, **sizes)
