"""The simulated robot's options: `lerobot-rollout --robot.type=vega_sim --robot.suite=lift_wide`.

LeRobot imports this module through the distribution's plugin, and the robot itself only to build one.
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
        suite: A suite of `envs`, such as `lift_wide`.
        task_index: Index of the task in the suite.
        frame_size: Height and width of a frame in pixels.
        rendering: Profile `full` or `fast`; use the one that the policy was trained with.
        seed: Episode i of seed k starts as in an evaluation with that seed: 1000000 + 10000 k + i.
        first_episode: The first i, to go on where another run ended.
        auto_reset: Whether a success or the task's horizon ends an episode and a new scene is laid out. If
            not, the scene stays until the robot is sent back to where it started, as LeRobot's episodic
            rollout does.
        reset_seconds: How long a new scene is shown before its episode begins. Commands are ignored
            meanwhile, so that what was planned for the old scene is not executed in the new one.
        log_file: JSON lines, one for each episode that ended and each thing that happened to the robot; None
            logs to the console only.
    """

    suite: str = "lift_wide"
    task_index: int = 0
    frame_size: int = 128
    rendering: str = "fast"
    seed: int = 0
    first_episode: int = 0
    auto_reset: bool = True
    reset_seconds: float = 1.0
    log_file: Path | None = None
