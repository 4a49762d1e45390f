"""From a composed configuration to a running server: what scripts/serve_policy.py calls."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np

from vega_policy.deployment.protocol import MessageLimits
from vega_policy.deployment.servable import ServablePolicy
from vega_policy.deployment.served_policy import load_served_policy
from vega_policy.deployment.server import PolicyServer
from vega_policy.deployment.server_settings import ServerSettings, read_token
from vega_policy.evaluation.launch import choose_device
from vega_policy.evaluation.policies import ObservationBatch

logger = logging.getLogger(__name__)


def read_server_settings(config: dict[str, Any]) -> ServerSettings:
    """Read the settings of a server from the `server` node of configs/serve.yaml.

    Raises:
        ValueError: If it would be open to everybody (see `ServerSettings`).
        OSError: If the token's file is missing or can be read by others.
    """
    values: dict[str, Any] = dict(config)
    values["token"] = read_token(_path(values.pop("token_file")))
    values["limits"] = MessageLimits(**values["limits"])
    for name in ("certificate", "key"):
        values[name] = _path(values[name])
    return ServerSettings(**values)


def serve_forever(config: Any) -> None:
    """Serve a checkpoint as configs/serve.yaml describes it, until SIGINT or SIGTERM.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If a setting is wrong.
        OSError: If the address is taken, or a file cannot be used.
    """
    settings = read_server_settings(config["server"])
    policy = load_served_policy(
        Path(config["checkpoint"]),
        device=choose_device(config["device"]),
        action_steps=config["action_steps"],
    )
    warm_up(policy, config["warm_up_side"])
    asyncio.run(_serve(PolicyServer(policy, settings)))


async def _serve(server: PolicyServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.run(stop)


def warm_up(policy: ServablePolicy, side: int) -> None:
    """Ask a policy once with black frames of a size, so that the first client does not wait for start-up."""
    description = policy.description
    shape = (*description.frame_axes(1), side, side, 3)
    frames = {camera: np.zeros(shape, np.uint8) for camera in description.cameras}
    state = np.zeros((1, description.state_size or 0), np.float32)
    noise = None if policy.noise_shape is None else np.zeros((1, *policy.noise_shape), np.float32)
    policy.chunk(ObservationBatch(frames, state, ["warm up"]), noise)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
