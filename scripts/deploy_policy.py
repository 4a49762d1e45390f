"""Let a policy drive a robot: `python scripts/deploy_policy.py checkpoint=... robot=vega_sim task="lift it"`.

Every field of configs/deploy.yaml can be set on the command line. With `dry_run=true` nothing moves. Without
it, nothing moves either until the preflight has passed.
"""

import logging
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.overrides import refuse_unknown_options


@hydra.main(version_base=None, config_path="../configs", config_name="deploy")
def main(config: DictConfig) -> None:
    """Check, then run; print what the safety layer had to do."""
    missing = OmegaConf.missing_keys(config)
    if missing:
        sys.exit(f"No value for {', '.join(sorted(missing))}; give each on the command line: FIELD=VALUE")
    values = OmegaConf.to_container(config, resolve=True)
    from vega_policy.deployment.deploy import deploy  # heavy imports, not needed for --help

    logging.getLogger("websockets").setLevel(logging.WARNING)
    try:
        outcome = deploy(values)  # pyright: ignore[reportArgumentType] a config's root is a mapping
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{outcome.steps} steps; interventions of the safety layer: {outcome.interventions or 'none'}")
    if outcome.stopped is not None:
        sys.exit(f"stopped: {outcome.stopped}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
