"""Evaluate a checkpoint in closed loop: `scripts/eval_policy.py checkpoint=outputs/run/checkpoints/last`.

Every field of configs/eval.yaml can be set on the command line, such as `env=lift_wide episodes_per_task=50
ablation=[none,blind]`. Started again with the same settings, it goes on with the missing episodes.
"""

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.overrides import refuse_missing_fields, refuse_unknown_options


@hydra.main(version_base=None, config_path="../configs", config_name="eval")
def main(config: DictConfig) -> None:
    """Evaluate, then print the table and where the report lies; a user's mistake ends in one message."""
    refuse_missing_fields(config)
    print(f"evaluating {config.checkpoint} in {config.env.suite}", flush=True)
    from vega_policy.evaluation.evaluate import launch  # heavy imports, not needed for --help
    from vega_policy.evaluation.report import table

    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    try:
        summary = launch(values)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(table(summary))
    print(f"report: {Path(config.output_dir) / 'report.html'}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
