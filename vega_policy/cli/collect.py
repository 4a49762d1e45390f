"""`vega-collect`: collect demonstrations with scripted demonstrators."""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Collect and return the number of demonstrations of each task."""
    collect = import_module("envs.demos.collect")  # by name: vega_policy does not depend on envs
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    root = Path(values["root"])
    metadata = collect.collect(collect.CollectionSettings.of(values), root, processes=values["processes"])
    lines = [
        f"{name}: {counts['demonstrations']} demonstrations from {counts['attempts']} episodes"
        for name, counts in metadata["tasks"].items()
    ]
    if values["format"] == "states":
        return "\n".join([*lines, f"states: {root.with_suffix('.safetensors')}"])
    return "\n".join([*lines, f"dataset: {root}"])


main = Command(
    config="collect",
    run=run,
    summary="Collect demonstrations into a LeRobotDataset, or into one file of simulator states.\n"
    "The same command resumes after an interruption.",
    examples=[
        "vega-collect env=lift_wide episodes_per_task=50",
        "vega-collect env=libero_spatial episodes_per_task=50 processes=16 demonstrator.noise=0.2",
        "vega-collect env=libero_spatial format=states root=outputs/states/libero_spatial processes=16",
    ],
).main
