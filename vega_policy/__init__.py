"""Vision-language-action policy with VEGA-3D as its observation encoder.

`from vega_policy import VegaConfig, VegaPolicy` registers the policy type `vega` with LeRobot, as
does LeRobot's own plugin discovery. `VegaEncoder`, and the method itself (`model`, `backbones`, `priors`),
require no LeRobot.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parent

_EXPORTS = {
    "VegaConfig": "vega_policy.configuration_vega",
    "VegaEncoder": "vega_policy.model.vega",
    "VegaPolicy": "vega_policy.modeling_vega",
}


def __getattr__(name: str) -> Any:
    """Import an exported class when it is first used, so that `--help` loads neither torch nor LeRobot."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def resource(name: str) -> Path:
    """Return the folder `configs` or `assets`: in an installed package, else in the repository.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    for path in (PACKAGE / name, PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"no folder {name} in {PACKAGE} or {PACKAGE.parent}; install the package again.")


def packaged_policies() -> dict[str, Path]:
    """Return the folders of the policies in `assets/policies` by name."""
    configs = sorted((resource("assets") / "policies").glob("*/config.json"))
    return {config.parent.name: config.parent for config in configs}
