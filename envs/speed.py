"""What rendering and simulating cost on this machine: `python -m envs.speed`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

import envs
from envs.base import ManipulationEnv
from envs.rendering import PROFILES


@dataclass(frozen=True)
class RenderingSpeed:
    """What one process manages with one task.

    Attributes:
        simulated: Control steps a second that render nothing.
        watched: Control steps a second that render every camera, by profile.
        cameras: Number of cameras.
    """

    simulated: float
    watched: dict[str, float]
    cameras: int

    def gain(self) -> float:
        """Return how many times faster watched steps are in the fast profile than in the full one."""
        return self.watched["fast"] / self.watched["full"]


def measure_rendering(suite: str = "lift", *, frame_size: int = 128, steps: int = 60) -> RenderingSpeed:
    """Time control steps of the suite's first task, blind and watched in each rendering profile.

    Args:
        suite: Suite whose first task is timed.
        frame_size: Height and width of a frame in pixels.
        steps: Timed steps of each kind.
    """
    blind = envs.make(suite, 0, render=False)
    simulated = _steps_a_second(blind, steps, watched=False)
    watched: dict[str, float] = {}
    cameras = 0
    for name in PROFILES:
        env = envs.make(suite, 0, frame_size=frame_size, rendering=name)
        cameras = len(env.reset(seed=0)[0]["pixels"])
        watched[name] = _steps_a_second(env, steps, watched=True)
    return RenderingSpeed(simulated, watched, cameras)


def _steps_a_second(env: ManipulationEnv, steps: int, *, watched: bool) -> float:
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, env.action_size))
    started = time.perf_counter()
    for action in actions:
        env.step_blindly(action)
        if watched:
            env.observe()
    seconds = time.perf_counter() - started
    env.close()
    return steps / seconds


def main() -> None:
    """Print the speeds of a suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", nargs="?", default="lift", choices=envs.suite_names())
    parser.add_argument("--frame-size", type=int, default=128, help="pixels")
    chosen = parser.parse_args()
    speed = measure_rendering(chosen.suite, frame_size=chosen.frame_size)
    lines = [f"{chosen.suite}, steps/s of one process, {speed.cameras} cameras of {chosen.frame_size} pixels"]
    lines += [f"  without rendering {speed.simulated:6.1f}"]
    lines += [f"  rendering {name:8s}{rate:6.1f}" for name, rate in speed.watched.items()]
    lines += [f"  fast is {speed.gain():.1f} times as fast as full"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
