"""The simulated robot's options: `lerobot-rollout --robot.type=vega_sim --robot.suite=lift_wide`.

LeRobot imports this module through the distribution's plugin, and the robot's module only to build one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("vega_sim")
@dataclass(kw_only=True)
class VegaSimConfig(RobotConfig):
    """A task of `envs` that runs on the wall clock, whether or not a policy keeps up.

    Attributes:
        seed: Episode i of seed k starts as in an evaluation with that seed: 1000000 + 10000 k + i.
        first_episode: The first i. A new scene is created when the robot is sent back to its start, as
            LeRobot does at the end of an episode and of a rollout, never while a policy runs.
        latency_steps: Steps by which observations are late, to imitate a slower robot.
    """

    suite: str = "lift_wide"
    task_index: int = 0
    frame_size: int = 128  # height and width in pixels
    rendering: str = "fast"  # or "full"; use the one of the policy's training data
    seed: int = 0
    first_episode: int = 0
    latency_steps: int = 0
    log_file: Path | None = None  # JSON lines, one per episode or event; None logs to the console only
