"""From a composed configuration to an evaluated checkpoint: what scripts/eval_policy.py calls."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lerobot.utils.constants import PRETRAINED_MODEL_DIR

from vega_policy.evaluation.controls import apply_control
from vega_policy.evaluation.episodes import TaskDescription
from vega_policy.evaluation.evaluate import Evaluation
from vega_policy.evaluation.lerobot_policy import checkpoint_fingerprint, find_checkpoint, load_lerobot_policy
from vega_policy.evaluation.policies import ChunkPolicy
from vega_policy.evaluation.pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.settings import EvaluationSettings
from vega_policy.evaluation.shards import Shard
from vega_policy.evaluation.worker import resolve
from vega_policy.training.retention import require_sound

logger = logging.getLogger(__name__)

_SETTINGS = (
    "episodes_per_task",
    "seed",
    "slots",
    "processes",
    "videos",
    "video_frame_size",
    "latency_calls",
)


def launch(config: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate a checkpoint as configs/eval.yaml describes it.

    Args:
        config: The composed configuration as plain values; configs/eval.yaml explains each field.

    Returns:
        The content of summary.json.

    Raises:
        FileNotFoundError: If the checkpoint, or a file that a control needs, does not exist.
        ValueError: If a setting is wrong, the output folder holds something else, the policy does not fit
            the environment, or the server offers another checkpoint.
        PolicyUnavailableError: If there is no policy server at the address given.
        WorkerError: If a simulator failed.
    """
    environment = config["env"]
    tasks = resolve(config["environments"]["tasks"])(environment["suite"])
    settings = read_settings(config, tasks)
    factory = EnvironmentFactory(
        config["environments"]["make"], environment["frame_size"], environment["rendering"]
    )
    checkpoint = find_checkpoint(Path(config["checkpoint"]))
    require_sound(checkpoint)
    device = choose_device(config["device"])
    provenance = {
        "checkpoint": str(config["checkpoint"]),
        "checkpoint_sha256": checkpoint_fingerprint(checkpoint),
        "action_steps": config["action_steps"],
        "device": device,
        "frame_size": factory.frame_size,
        "rendering": factory.rendering,
    }
    warn_of_other_pictures(checkpoint, factory)
    shard = Shard(config["shard"], config["shards"])
    evaluation = Evaluation(settings, tasks, Path(config["output_dir"]), provenance, shard)
    left, total = evaluation.episodes_left()
    logger.info("%s: %d of %d episodes left to play", config["output_dir"], left, total)
    logger.info("loading %s on %s, and the environments of %s", checkpoint, device, settings.suite)
    with WorkerPool(factory, min(settings.processes, settings.slots)) as pool:
        evaluation.prepare(pool)
        policy = _policy(config, checkpoint, device)
        policies = {control: apply_control(control, policy, checkpoint) for control in settings.controls}
        return evaluation.run(policies, pool)


def _policy(config: Mapping[str, Any], checkpoint: Path, device: str) -> ChunkPolicy:
    """Return the checkpoint's policy, in this process or on the server that the config names."""
    server, steps = config["server"], config["action_steps"]
    if server["url"] is None:
        return load_lerobot_policy(checkpoint, device=device, action_steps=steps)
    from vega_policy.deployment.client import RemotePolicy, ServerAddress

    token_file, ca_file = (
        None if server[name] is None else Path(server[name]) for name in ("token_file", "ca_file")
    )
    policy = RemotePolicy(ServerAddress(server["url"], token_file, ca_file), action_steps=steps)
    if policy.served.fingerprint != checkpoint_fingerprint(checkpoint):
        raise ValueError(
            f"{server['url']} serves the checkpoint {policy.served.fingerprint}, but {checkpoint} is "
            f"{checkpoint_fingerprint(checkpoint)}; serve the one that is to be evaluated"
        )
    return policy


def read_settings(config: Mapping[str, Any], suite_tasks: Sequence[TaskDescription]) -> EvaluationSettings:
    """Read the settings of an evaluation from a composed configuration.

    Args:
        config: Plain values; `control` is one name or a list of names.
        suite_tasks: All tasks of the suite: where all have official initial states, these are the default.
    """
    control, tasks, official = config["control"], config["tasks"], config["official_states"]
    if official is None:
        official = all(task.official_states for task in suite_tasks)
    return EvaluationSettings(
        suite=config["env"]["suite"],
        tasks=None if tasks is None else tuple(tasks),
        controls=(control,) if isinstance(control, str) else tuple(control),
        official_states=official,
        **{name: config[name] for name in _SETTINGS},
    )


def warn_of_other_pictures(checkpoint: Path, factory: EnvironmentFactory) -> None:
    """Warn if the policy was trained on pictures of another size or rendering profile than it will be shown.

    What it was trained on is known where the run's folder and its dataset, collected here, are still there.

    Args:
        checkpoint: Folder of the checkpoint's `config.json`.
        factory: How environments are built.
    """
    run = checkpoint.parents[2] / "config.yaml"
    if checkpoint.name != PRETRAINED_MODEL_DIR or not run.is_file():
        return
    root = yaml.safe_load(run.read_text())["dataset"]["root"]
    collected = None if root is None else Path(root) / "meta" / "vega.json"
    if collected is None or not collected.is_file():
        return
    trained = json.loads(collected.read_text())["settings"]
    for name, shown in (("rendering", factory.rendering), ("frame_size", factory.frame_size)):
        if trained[name] != shown:
            logger.warning(
                "the policy was trained on frames with %s=%s, but is evaluated with %s=%s: such results "
                "say little about it. Set env.%s=%s, or render the demonstrations again "
                "(scripts/render_demos.py).",
                name,
                trained[name],
                name,
                shown,
                name,
                trained[name],
            )


def choose_device(device: str | None) -> str:
    """Return a torch device; None takes a GPU if there is one, else the CPU."""
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
