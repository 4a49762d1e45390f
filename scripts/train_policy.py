"""Train a policy: `python scripts/train_policy.py experiment=demo`; `--help` lists groups and fields.

A run that was stopped goes on with `output_dir=<its folder> resume=true`.
"""

import logging
import sys

import hydra
from omegaconf import DictConfig

logger = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Train, then print where the checkpoint lies; a user's mistake ends in one message."""
    from vega_policy.training.config import from_hydra  # heavy imports, not needed for --help
    from vega_policy.training.setup import train

    try:
        checkpoint = train(from_hydra(config))
    except (ValueError, FileNotFoundError) as error:
        logger.debug("Where it came from (shown by hydra.verbose=true):", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"checkpoint: {checkpoint}")


if __name__ == "__main__":
    main()
