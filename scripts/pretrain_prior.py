"""Train a small Wan on clips of our simulators: `python scripts/pretrain_prior.py`; `--help` lists fields.

Prints where the weights lie, for `prior=wan_tiny prior.path=FOLDER`. Started again, it goes on where it
stopped. Where Hydra is not installed: `python -m vega_policy.pretraining`.
"""

import logging
import sys
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.overrides import refuse_unknown_options

logger = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="pretrain_prior")
def main(config: DictConfig) -> None:
    """Pre-train, then print where the weights lie; a user's mistake ends in one message."""
    from vega_policy.pretraining.config import decode  # heavy imports, not needed for --help
    from vega_policy.pretraining.pretrain import pretrain

    try:
        values = OmegaConf.to_container(config, resolve=True)
        folder = pretrain(decode(cast(dict[str, Any], values)))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        logger.debug("Where it came from (shown by hydra.verbose=true):", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"weights: {folder}" if folder else "time is up: run the same command again")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
