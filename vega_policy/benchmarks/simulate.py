"""Part `simulate`: environment steps a second, by rendering profile and without any rendering."""

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np


def benchmark_simulate(suites: list[str], frame_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a suite and rendering profile: full, fast, and `blind` (nothing is rendered).

    Args:
        suites: Suites of the package `envs`; the first task of each is played.
        frame_size: Side of a camera's frames in pixels.
        seconds: About how long each figure is timed.

    Yields:
        `suite`, `rendering`, `steps_per_s`, `reset_s`.
    """
    make: Callable[..., Any] = import_module("envs").make
    for suite in suites:
        for rendering in ("full", "fast", "blind"):
            blind = rendering == "blind"
            profile = "full" if blind else rendering
            env = make(suite, 0, frame_size=frame_size, rendering=profile, render=not blind)
            start = time.perf_counter()
            env.reset(seed=0)
            reset = time.perf_counter() - start
            rate = _rate(env, seconds)
            env.close()
            yield {"suite": suite, "rendering": rendering, "steps_per_s": rate, "reset_s": reset}


def _rate(env: Any, seconds: float) -> float:
    """Steps a second of a motionless arm, after one step that fills caches."""
    action = np.zeros(env.action_space.shape, dtype=np.float32)
    env.step(action)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(action)
        steps += 1
    return steps / (time.perf_counter() - start)
