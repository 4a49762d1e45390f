"""`vega-eval`: evaluate a checkpoint in closed loop."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> str:
    """Evaluate and return the table of success rates."""
    logger.info("evaluating %s in %s", config.checkpoint, config.env.suite)
    from vega_policy.evaluation.evaluate import evaluate_checkpoint
    from vega_policy.evaluation.policies import load_lerobot_policy
    from vega_policy.evaluation.report import format_summary

    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    is_local = values["server"]["url"] is None
    load_policy = load_lerobot_policy if is_local else partial(_connect_policy, values["server"])
    summary = evaluate_checkpoint(values, load_policy)
    return f"{format_summary(summary)}\nreport: {Path(config.output_dir) / 'report.html'}"


def _connect_policy(server: Mapping[str, Any], folder: Path, *, device: str, action_steps: int | None) -> Any:
    """Return the policy on a server; it must serve the checkpoint that is evaluated."""
    from vega_policy.deployment.client import RemotePolicy, ServerAddress
    from vega_policy.evaluation.policies import checkpoint_fingerprint

    token_file, ca_file = (
        None if server[name] is None else Path(server[name]) for name in ("token_file", "ca_file")
    )
    policy = RemotePolicy(ServerAddress(server["url"], token_file, ca_file), action_steps=action_steps)
    expected = checkpoint_fingerprint(folder)
    if policy.served.fingerprint != expected:
        raise ValueError(
            f"expected a server of the checkpoint {folder} ({expected}), but {server['url']} serves "
            f"{policy.served.fingerprint}; serve the one that is to be evaluated"
        )
    return policy


main = Command(
    config="eval",
    run=run,
    summary="Evaluate a checkpoint in closed loop. The same command resumes with the missing episodes.",
    examples=[
        "vega-eval checkpoint=outputs/demo/train/checkpoints/last",
        "vega-eval checkpoint=... env=stack episodes_per_task=20 'ablations=[none,blind]'",
        "vega-eval -m machines=slurm shards=8 'shard=range(8)' checkpoint=... env=libero_10",
    ],
).main
