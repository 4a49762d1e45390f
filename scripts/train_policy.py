"""Train a policy: `python scripts/train_policy.py experiment=demo`; `--help` lists groups and fields.

A run that was stopped goes on with `output_dir=<its folder> resume=true`. With `-m` and several values of a
field (`fusion=token_gate,add seed=0,1`) it trains them all, and ends in one table.
"""

import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vega_policy.cli.overrides import refuse_missing_fields, refuse_unknown_options

logger = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Train, then print where the checkpoint lies; a user's mistake ends in one message."""
    refuse_missing_fields(config)
    from vega_policy.training.config import from_hydra  # heavy imports, not needed for --help
    from vega_policy.training.failure_guards import TrainingStoppedError
    from vega_policy.training.train import train

    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:  # the folder of this job, below output_dir
        config.output_dir = HydraConfig.get().runtime.output_dir
    try:
        checkpoint = train(from_hydra(config))
    except (ValueError, FileNotFoundError, TrainingStoppedError) as error:
        logger.debug("Where it came from (shown by hydra.verbose=true):", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        if not sweep:
            sys.exit(message)
        logger.error("%s", message)  # the other jobs go on, and the table says that this one failed
        return
    print(f"checkpoint: {checkpoint}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
