"""VEGA-3D vision-language-action policy; importing it registers the policy type `vega` with LeRobot.

The method itself (`model`, `flow`, `fusion`, `heads`, `backbones`, `priors`) needs no LeRobot; where
LeRobot is not installed, nothing is registered.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("lerobot") is not None:
    from vega_policy.configuration_vega import VegaConfig as VegaConfig
