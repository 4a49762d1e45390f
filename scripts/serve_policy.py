"""Serve a checkpoint to robots: `python scripts/serve_policy.py checkpoint=outputs/run/checkpoints/last`.

Every field of configs/serve.yaml can be set on the command line. Ctrl-C or SIGTERM lets running requests
finish.
"""

import logging
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.overrides import refuse_unknown_options


@hydra.main(version_base=None, config_path="../configs", config_name="serve")
def main(config: DictConfig) -> None:
    """Serve until a signal comes; a user's mistake ends in one message."""
    from vega_policy.deployment.server import serve_forever  # heavy imports, not needed for --help

    logging.getLogger("websockets").setLevel(logging.WARNING)
    try:
        serve_forever(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
