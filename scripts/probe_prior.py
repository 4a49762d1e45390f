"""Where does a prior know space? `python scripts/probe_prior.py prior=wan_tiny scenes=libero_spatial`.

Writes a page with correspondence, linear probes, spatial questions, and pictures; `--help` lists groups and
fields. Scenes and numbers are cached: started again, only what is new is computed.
"""

import logging
import sys
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.overrides import refuse_unknown_options

logger = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="probe")
def main(config: DictConfig) -> None:
    """Probe, then print the verdict and where the page lies; a user's mistake ends in one message."""
    from vega_policy.analysis.config import decode
    from vega_policy.analysis.probe import run  # heavy imports, not needed for --help

    missing = OmegaConf.missing_keys(config)
    if missing:
        sys.exit(f"No value for {', '.join(sorted(missing))}. For posed frames: 'scenes.folders=[PATH,PATH]'")
    try:
        values = OmegaConf.to_container(config, resolve=True)
        page = run(decode(cast(dict[str, Any], values)))
    except (ValueError, FileNotFoundError, ImportError) as error:
        logger.debug("Where it came from (shown by hydra.verbose=true):", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"report: {page}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
