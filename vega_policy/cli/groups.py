"""Config groups generated from the registries: `prior`, `fusion`, `base`, `env`, `scenes`, `dataset`.

A prior, a fusion or a suite is registered in one place of the code. Its command-line option follows from
there, with the defaults of the frozen dataclasses; no YAML file repeats them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigStore

from vega_policy.analysis.config import SceneSettings
from vega_policy.model.config import BASES, FUSIONS, BaseConfig, FusionConfig, PriorConfig
from vega_policy.priors import PRIORS

Options = dict[str, dict[str, Any]]

SINGLE_TASK = ("lift", "lift_wide", "stack", "pick_place_can", "nut_assembly_square")
SCENE_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "lift_wide")


def register_groups() -> None:
    """Store all generated options in Hydra's ConfigStore, and the settings that every command shares."""
    store = ConfigStore.instance()
    shared = {
        "run": {"dir": "."},  # no folder and no log file of Hydra's own
        "output_subdir": None,
        "job": {"chdir": False},
    }
    defaults = [{"override hydra/job_logging": "stdout"}]
    store.store(name="command", node={"defaults": defaults, "hydra": shared}, package="_global_")
    for group, options in generated_groups().items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node, provider="vega_policy")


def generated_groups() -> dict[str, Options]:
    """Return group -> option -> plain values."""
    return {
        "prior": {name: _fields(PriorConfig(name=name)) for name in ("none", *PRIORS)},
        "fusion": {name: asdict(FusionConfig(name=name)) for name in FUSIONS},
        "base": {name: _fields(BaseConfig(name=name)) for name in ("none", *BASES)},
        "env": dict(_environments()),
        "scenes": _scenes(),
        "dataset": dict(_demonstrations()),
    }


def _environments() -> Iterator[tuple[str, dict[str, Any]]]:
    families: dict[str, tuple[str, ...]] = import_module("envs").FAMILIES
    for family, suites in families.items():
        # Published numbers of LIBERO and Meta-World are of 256 pixels; robosuite's tasks are ours.
        size, rendering = (128, "fast") if family == "envs.robosuite" else (256, "full")
        for suite in suites:
            yield suite, {"suite": suite, "frame_size": size, "rendering": rendering}


def _demonstrations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the datasets that collect_demos.py writes; other fields are those of dataset/lerobot.yaml."""
    for suite in import_module("envs").suite_names():
        root, command = f"outputs/demonstrations/{suite}", f"python scripts/collect_demos.py env={suite}"
        node = {"repo_id": f"vega/{suite}", "root": root, "collect_command": command}
        if suite in SINGLE_TASK:
            node["cache"] = "ram"
        yield suite, {"defaults": ["lerobot", "_self_"], **node}


def _scenes() -> Options:
    options = {name: asdict(SceneSettings(name=name, suite=name)) for name in SCENE_SUITES}
    options["lift_wide"]["tasks"] = [0]
    options["folder"] = {"name": "folder", "suite": None, "folders": "???", "views": 32}
    return options


def _fields(config: PriorConfig | BaseConfig) -> dict[str, Any]:
    node = asdict(config)
    del node["fingerprint"]  # follows from the weights
    return node
