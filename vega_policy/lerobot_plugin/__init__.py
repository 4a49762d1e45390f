"""LeRobot imports this module by the distribution's name; it registers policy, environments and robot."""

import envs.lerobot_configs
import vega_policy.configuration_vega

__all__ = ["envs", "vega_policy"]
