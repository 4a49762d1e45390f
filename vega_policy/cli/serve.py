"""`vega-serve`: serve a checkpoint to robots over WebSocket."""

import logging

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command


def run(config: DictConfig) -> None:
    """Serve until SIGINT or SIGTERM; running requests finish."""
    from vega_policy.deployment.server import serve_forever

    logging.getLogger("websockets").setLevel(logging.WARNING)
    serve_forever(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


main = Command(
    config="serve",
    run=run,
    summary="Serve a checkpoint to robots over WebSocket. SIGINT and SIGTERM let running requests finish.",
    examples=[
        "vega-serve checkpoint=outputs/demo/train/checkpoints/last",
        "vega-serve checkpoint=... server.host=0.0.0.0 server.token_file=token "
        "server.certificate=cert.pem server.key=key.pem",
    ],
).main
