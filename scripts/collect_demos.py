"""Collect demonstrations: `python scripts/collect_demos.py env=lift_wide episodes_per_task=50 processes=2`.

Every field of configs/collect.yaml can be set on the command line. Started again with the same settings, it
goes on where it stopped, and does nothing when the dataset is there.
"""

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from envs.demos.collect import CollectionSettings, collect
from vega_policy.cli.overrides import refuse_unknown_options


@hydra.main(version_base=None, config_path="../configs", config_name="collect")
def main(config: DictConfig) -> None:
    """Collect, then print what came out of each task."""
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    root = Path(values["root"])
    try:
        metadata = collect(CollectionSettings.of(values), root, processes=values["processes"])
    except KeyboardInterrupt:
        sys.exit(
            f"interrupted; finished shards lie in {root}.partial, and the same command goes on with them"
        )
    except (ValueError, FileExistsError, RuntimeError) as error:
        sys.exit(str(error))
    for name, counts in metadata["tasks"].items():
        print(f"{name}: {counts['demonstrations']} demonstrations from {counts['attempts']} episodes")
    print(f"dataset: {root}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
