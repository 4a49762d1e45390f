"""`vega-pretrain`: train a small Wan on video clips of the simulators."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Pre-train and return where the weights are."""
    from vega_policy.config import from_config
    from vega_policy.pretraining.config import PretrainSettings
    from vega_policy.pretraining.trainer import pretrain

    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    folder = pretrain(from_config(PretrainSettings, values))
    return f"weights: {folder}" if folder else "max_seconds reached; the same command resumes"


main = Command(
    config="pretrain_prior",
    run=run,
    summary="Train a small video diffusion model (Wan2.1's architecture) on clips of the simulators.",
    examples=[
        "vega-pretrain                                          all stages",
        "vega-pretrain 'stages=[clips]' clips.processes=16      record clips only",
        "vega-pretrain 'stages=[vae]' max_seconds=540           stop in time; the same command resumes",
    ],
).main
