"""Where curves and films go: TensorBoard always, Weights & Biases where a project is named."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import imageio.v3 as imageio
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter

from vega_policy.training.config import TrainConfig, encode
from vega_policy.training.folders import replace_text

WANDB_RUN = "wandb_run.txt"
_PROTO: Any = summary_pb2
_FILM_FRAMES = 60
"""Frames of a film that TensorBoard gets, as a GIF."""


class Board(Protocol):
    """A place that shows curves and films."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values at a step."""
        ...

    def film(self, step: int, name: str, path: Path) -> None:
        """Shows an mp4 file at a step."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run: Path, first: int) -> None:
        """Opens it; what an earlier start wrote after step `first` is hidden."""
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def film(self, step: int, name: str, path: Path) -> None:
        """Shows an mp4 file at a step, as a GIF among the images."""
        frames = imageio.imread(path, plugin="pyav")  # [t h w 3]
        shown = frames[:: max(1, len(frames) // _FILM_FRAMES)]
        buffer = io.BytesIO()
        imageio.imwrite(buffer, shown, extension=".gif", plugin="pillow", duration=100, loop=0)
        height, width, depth = frames.shape[1:]
        image = _PROTO.Summary.Image(
            height=height, width=width, colorspace=depth, encoded_image_string=buffer.getvalue()
        )
        value = _PROTO.Summary.Value(tag=name, image=image)
        self._writer._get_file_writer().add_summary(_PROTO.Summary(value=[value]), step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """One run there; a run that goes on here goes on there."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        """Begins it, or goes on with it."""
        import wandb  # takes seconds, and most runs do without

        self._wandb = wandb
        known = run / WANDB_RUN
        self._run: Any = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            mode="offline" if config.wandb.mode == "offline" else "online",
            dir=str(run),
            name=run.name,
            id=known.read_text().strip() if known.is_file() else None,
            resume="allow",
            config=encode(config),
        )
        replace_text(known, f"{self._run.id}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values at a step."""
        self._run.log(dict(values), step=step)

    def film(self, step: int, name: str, path: Path) -> None:
        """Shows an mp4 file at a step."""
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()


def open_boards(config: TrainConfig, run: Path, first: int) -> list[Board]:
    """The boards that a config asks for.

    Args:
        config: The run.
        run: Its folder.
        first: Steps made before this start.
    """
    boards: list[Board] = [TensorBoard(run, first)]
    if config.wandb.project is not None:
        boards.append(WeightsAndBiases(config, run))
    return boards
