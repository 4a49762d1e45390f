"""A deployment that moves nothing: what the policy would do, for a person to look at in rerun."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import rerun
from lerobot.rollout.context import RolloutContext
from lerobot.utils.robot_utils import precise_sleep

from vega_policy.deployment.facts import predict_once
from vega_policy.deployment.safety import SafetyFilter

logger = logging.getLogger(__name__)

FILE = "dry_run.rrd"


def dry_run(context: RolloutContext, safety: SafetyFilter, seconds: float, folder: Path) -> int:
    """Predict from what the robot sees and write both, and what the safety layer would say, to a file.

    Args:
        context: LeRobot's rollout; nothing is sent to its robot.
        safety: The safety layer; it believes that its commands were sent.
        seconds: How long.
        folder: Where `dry_run.rrd` is written; look at it with `rerun FOLDER/dry_run.rrd`.

    Returns:
        The number of control steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = rerun.RecordingStream("vega_policy_dry_run")
    stream.save(folder / FILE)
    keys, robot, fps = (
        context.data.ordered_action_keys,
        context.hardware.robot_wrapper,
        context.runtime.cfg.fps,
    )
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        start = time.perf_counter()
        observation = robot.get_observation()
        safety.observed(time.monotonic())
        chunk = predict_once(context, observation)
        wanted = dict(zip(keys, chunk[0].tolist(), strict=True))
        told = safety.command(wanted, observation)
        stream.set_time("step", sequence=steps)
        _show(stream, observation, chunk, keys, told)
        steps += 1
        precise_sleep(max(1 / fps - (time.perf_counter() - start), 0.0))
    stream.disconnect()
    logger.info("%d steps, nothing was sent; interventions: %s", steps, dict(safety.counts) or "none")
    logger.info("look at it with: rerun %s", folder / FILE)
    return steps


def _show(
    stream: rerun.RecordingStream,
    observation: dict[str, Any],
    chunk: np.ndarray,
    keys: list[str],
    told: dict[str, float],
) -> None:
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and value.ndim == 3:
            stream.log(f"cameras/{key}", rerun.Image(value).compress())
        else:
            stream.log(f"state/{key}", rerun.Scalars(float(value)))
    for entry, key in enumerate(keys):
        stream.log(f"wanted/{key}", rerun.Scalars(float(chunk[0, entry])))
        stream.log(f"would_be_told/{key}", rerun.Scalars(told[key]))
    stream.log("chunk", rerun.Tensor(chunk, dim_names=("step", "joint")))
