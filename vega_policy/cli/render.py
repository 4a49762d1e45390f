"""`vega-render`: render collected demonstrations at another frame size or rendering profile."""

from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig

from vega_policy.cli.app import Command

FIELDS = {
    "source": "???",  # dataset of vega-collect
    "root": "???",  # new dataset
    "frame_size": 256,  # height and width in pixels
    "rendering": "full",  # full or fast
    "video": None,  # lossless or h264; null: as the source
    "processes": 2,
}


def run(config: DictConfig) -> str:
    """Render and return the number of demonstrations."""
    render_again = import_module("envs.demos.collect").render_again
    options = {name: config[name] for name in ("frame_size", "rendering", "video", "processes")}
    metadata = render_again(Path(config.source), Path(config.root), **options)
    return f"{len(metadata['episodes'])} demonstrations of {config.frame_size} pixels: {config.root}"


main = Command(
    config="render",
    run=run,
    summary="Render collected demonstrations again from their simulator states, without simulating again.",
    examples=["vega-render outputs/demonstrations/libero_spatial NEW_FOLDER frame_size=128 rendering=fast"],
    node=FIELDS,
    positional=("source", "root"),
).main
