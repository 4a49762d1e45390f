"""`vega-deploy`: let a policy control a robot."""

import logging

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Run the deployment and return what the safety layer did."""
    from vega_policy.deployment.deploy import deploy

    logging.getLogger("websockets").setLevel(logging.WARNING)
    values = OmegaConf.to_container(config, resolve=True)
    outcome = deploy(values)  # pyright: ignore[reportArgumentType] the root of a config is a mapping
    if outcome.stopped is not None:
        raise RuntimeError(f"stopped: {outcome.stopped}")
    return f"{outcome.steps} steps; interventions of the safety layer: {outcome.interventions or 'none'}"


main = Command(
    config="deploy",
    run=run,
    summary="Let a policy control a robot. Nothing moves before the preflight has passed.",
    examples=[
        "vega-deploy checkpoint=... robot=vega_sim 'task=lift the red cube' dry_run=true    moves nothing",
        "vega-deploy checkpoint=... robot=vega_sim 'task=lift the red cube' inference=rtc",
        "vega-deploy server.url=wss://gpu.lab:8765 server.token_file=token robot=so101 task=...",
    ],
).main
