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
        auto_reset: Whether a success or the task's horizon ends an episode and resets the scene. If not, the
            scene stays until the robot is sent back to its start, as LeRobot's episodic rollout does.
        reset_seconds: How long a new scene is shown before its episode begins. Commands are ignored
            meanwhile, so that a plan for the old scene is not executed in the new one.
    """

    suite: str = "lift_wide"
    task_index: int = 0
    frame_size: int = 128  # height and width in pixels
    rendering: str = "fast"  # or "full"; use the one of the policy's training data
    seed: int = 0
    first_episode: int = 0  # the first i, to continue after another run
    auto_reset: bool = True
    reset_seconds: float = 1.0
    log_file: Path | None = None  # JSON lines, one per episode or event; None logs to the console only
