"""`vega-train`: train a policy on a LeRobot dataset."""

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vega_policy.cli.app import Command

logger = logging.getLogger(__name__)


class SweepTable(Callback):
    """Hydra callback that writes and prints one table of all jobs when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write `sweep.json` and `sweep.txt` into the sweep's folder."""
        from vega_policy.training.sweep import write_table

        folder = Path(config.hydra.sweep.dir)
        logger.info("%s\n\nsweep: %s", write_table(folder), folder)


def run(config: DictConfig) -> str:
    """Train and return where the checkpoint is."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from vega_policy.training.config import from_hydra
    from vega_policy.training.train import train

    if HydraConfig.get().mode is RunMode.MULTIRUN:  # each job of a sweep has a folder below output_dir
        config.output_dir = HydraConfig.get().runtime.output_dir
    return f"checkpoint: {train(from_hydra(config))}"


main = Command(
    config="train",
    run=run,
    summary="Train a VEGA-3D policy on a LeRobot dataset. With resume=true an interrupted run continues.",
    examples=[
        "vega-train experiment=demo                                the demo's policy, two CPU cores",
        "vega-train experiment=demo prior=none                     one field changed: an ablation",
        "vega-train dataset.repo_id=ORG/NAME                       a dataset of the hub",
        "vega-train output_dir=outputs/train/RUN resume=true       continue",
        "vega-train -m experiment=demo fusion=token_gate,add seed=0,1    a sweep, one table",
    ],
).main
