"""A run's folder: who may write there, and what of an earlier start is kept.

outputs/<run>/config.yaml          the resolved config, from which the same run can be started again
              provenance.json      code revision, package versions and hardware of each start
              metrics.jsonl        one line a log step
              scores.json          what was measured after each step
              tensorboard/
              checkpoints/<step>/  pretrained_model/ and training_state/
              checkpoints/last     -> newest one; checkpoints/best -> best one
              simulation/<step>/   closed-loop evaluations: report, films
"""

from pathlib import Path
from typing import Any

import yaml

from vega_policy.training.config import TrainConfig, defaults, encode
from vega_policy.training.folders import drop_lines_after, remove_partial, replace_text
from vega_policy.training.retention import CHECKPOINTS, checkpoints_of, set_aside_after, tidy

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "stop_after",
    "log_every",
    "save_every",
    "keep_last",
    "keep_best",
    "evaluate_every",
    "max_skipped_steps",
    "simulation.every",
    "simulation.processes",
    "wandb.project",
    "wandb.entity",
    "wandb.mode",
    "dataset.workers",
    "dataset.cache_root",
    "dataset.collect_command",
    "policy.device",
)
"""Fields that may differ between the starts of one run: they do not change its numbers."""


class RunFolderError(ValueError):
    """The output folder does not fit what was asked for."""


def check_folder(config: TrainConfig) -> None:
    """Refuses an output folder that does not fit, before anything is built or written.

    Args:
        config: The run. With `resume` the folder may hold an earlier start of the same run.

    Raises:
        RunFolderError: If the folder holds another run, or anything at all and `resume` is off.
    """
    folder = Path(config.output_dir)
    saved = folder / CONFIG
    if saved.exists() and config.resume:
        _check_same_run(config, yaml.safe_load(saved.read_text()), folder)
    elif folder.exists() and any(folder.iterdir()):
        raise RunFolderError(_occupied(folder))


def claim(config: TrainConfig, values: dict[str, Any], step: int) -> None:
    """Takes a folder that `check_folder` let pass: notes the config, clears what is half-written.

    Args:
        config: The run.
        values: The config as it was asked for, by `encode`.
        step: Step that the run goes on from; later checkpoints are damaged ones and are set aside.
    """
    folder = Path(config.output_dir)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    remove_partial(folder / CHECKPOINTS)
    if not (folder / CONFIG).exists():
        replace_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))
    set_aside_after(folder, step)
    tidy(folder, keep_last=None, keep_best=config.keep_best)


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drops log lines of steps that a killed start made after its last checkpoint; they are made again."""
    drop_lines_after(folder / METRICS, step)


def _occupied(folder: Path) -> str:
    last = next(reversed(checkpoints_of(folder)), None)
    content = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    run = f"a run at step {int(last.name)}" if last is not None else f"no run that can go on ({content})"
    if last is None and (folder / CONFIG).exists():
        run = "a run without a checkpoint yet"
    return (
        f"{folder}: expected an empty or new folder for a new run, found {run}. Give another output_dir, or "
        "resume=true to go on with that run, or delete the folder."
    )


def _check_same_run(config: TrainConfig, saved: dict[str, Any], folder: Path) -> None:
    asked = flatten(encode(config))
    before = {name: value for name, value in flatten(defaults(config)).items() if name in asked}
    expected = before | flatten(saved)  # a run from before a field existed had what is its default now
    silent = expected.get("simulation.every") == 0  # nothing was played yet that could be compared
    differing = [
        f"{name} (run: {expected.get(name)!r}, asked for: {asked.get(name)!r})"
        for name in sorted(expected.keys() | asked.keys())
        if expected.get(name) != asked.get(name)
        and name not in FREE_TO_CHANGE
        and not (silent and name.startswith("simulation."))
    ]
    if differing:
        raise RunFolderError(
            f"{folder} holds another run; resume=true goes on with the same run only. Differing: "
            f"{'; '.join(differing)}. Give those values again, or another output_dir."
        )


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Nested values by dotted path; lists and tuples are values.

    Args:
        node: A value or nested values.
        path: Dotted path of `node`.
    """
    if not isinstance(node, dict):
        return {path: list(node) if isinstance(node, tuple) else node}
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat
