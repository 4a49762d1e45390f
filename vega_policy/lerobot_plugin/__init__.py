"""LeRobot imports this module by the distribution's name; it registers policy and environments."""

import envs.lerobot_configs
import vega_policy

__all__ = ["envs", "vega_policy"]
