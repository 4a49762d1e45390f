"""`vega-eval`: evaluate a checkpoint in closed loop."""

import logging
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> str:
    """Evaluate and return the table of success rates."""
    logger.info("evaluating %s in %s", config.checkpoint, config.env.suite)
    from vega_policy.evaluation.evaluate import launch
    from vega_policy.evaluation.report import table

    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    return f"{table(launch(values))}\nreport: {Path(config.output_dir) / 'report.html'}"


main = Command(
    config="eval",
    run=run,
    summary="Evaluate a checkpoint in closed loop. The same command resumes with the missing episodes.",
    examples=[
        "vega-eval checkpoint=outputs/demo/train/checkpoints/last",
        "vega-eval checkpoint=... env=stack episodes_per_task=20 'ablation=[none,blind]'",
        "vega-eval -m machines=slurm shards=8 'shard=range(8)' checkpoint=... env=libero_10",
    ],
).main
