"""What a user watches: a progress bar, metrics.jsonl and the boards of `loggers.py`."""

import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import imageio.v3 as imageio
from huggingface_hub import HfApi, ModelCard, ModelCardData
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vega_policy.checkpoints import BEST, CHECKPOINTS, LAST, PRETRAINED, read_scores
from vega_policy.provenance import code_revision, environment, hardware
from vega_policy.run_dir import drop_lines_after, write_json, write_text
from vega_policy.training.checkpoint import METRICS, read_step
from vega_policy.training.config import TrainConfig, encode

logger = logging.getLogger(__name__)

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
        write_text(known, f"{self._run.id}\n")

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


BAR_INTERVAL = 0.5
"""Least seconds between two refreshes of the bar."""


class Progress:
    """Averages what the steps report between two log lines and writes it in three places.

    Values named `loss`, `gate` and so on become `train/<name>` on the boards. In a process that is not the
    main one nothing is shown or written.
    """

    def __init__(self, run: Path, first: int, steps: int, boards: Sequence[Board], *, shown: bool) -> None:
        """Opens the logs.

        Args:
            run: The run's folder.
            first: Steps made before; later lines of an earlier start are dropped.
            steps: Steps of the whole run.
            boards: Where curves and films go.
            shown: Whether this process shows and writes anything.
        """
        self._boards, self._shown = boards, shown
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._waited = self._steps = 0.0
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc="Training",
            unit="step",
            mininterval=BAR_INTERVAL,
            disable=not shown,
        )
        if shown:
            drop_lines_after(run / METRICS, first)
            self._file = (run / METRICS).open("a")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Notes one optimizer step.

        Args:
            step: Its number, from 1.
            values: What it reports; a value that is not finite is left out of the means.
        """
        self._steps += 1
        for name, value in values.items():
            counted = math.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + (value if counted else 0.0)
            self._counts[name] = self._counts.get(name, 0) + counted
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Writes one line of values to all places.

        Args:
            step: Step they belong to.
            values: The values; those that are not finite are left out.
            group: Heading on the boards.
        """
        if not self._shown:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.scalars(step, {f"{group}/{name}": value for name, value in values.items()})
        shown = {
            name: f"{value:.4g}" for name, value in values.items() if not name.startswith("learning_rate")
        }
        self._bar.set_postfix(shown, refresh=False)

    def film(self, step: int, name: str, path: Path) -> None:
        """Shows a film on all boards."""
        for board in self._boards:
            board.film(step, name, path)

    def close(self) -> None:
        """Flushes and closes the logs."""
        self._bar.close()
        if self._shown:
            self._file.close()
        for board in self._boards:
            board.close()

    def interval(self) -> dict[str, float]:
        """Means since the last call, steps per second and the share of time spent waiting for data.

        A value that was never finite in between has no mean: it is NaN.
        """
        now = time.perf_counter()
        seconds = now - self._since
        means = {
            name: total / self._counts[name] if self._counts[name] else math.nan
            for name, total in self._sums.items()
        }
        means |= {"steps_per_s": self._steps / seconds, "data_wait_percent": 100 * self._waited / seconds}
        self._sums, self._counts, self._steps, self._waited, self._since = {}, {}, 0.0, 0.0, now
        return means


PROVENANCE = "provenance.json"


def note_start(run: Path, step: int, processes: int) -> None:
    """Adds this start to the run's `provenance.json`.

    Args:
        run: The run's folder.
        step: Step it goes on from.
        processes: Training processes.
    """
    path = run / PROVENANCE
    starts = json.loads(path.read_text()) if path.is_file() else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"time": now, "from_step": step, "processes": processes, "command": sys.argv, **environment()}
    write_json(path, [*starts, start])


_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A vision-language-action policy with the eyes of VEGA-3D ([arXiv 2603.19235](https://arxiv.org/abs/2603.19235)):
a frozen video diffusion model, read in the middle, mixed token by token with a semantic encoder.

| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Measured

{% if scores -%}
| | |
|---|---|
{% for key, value in scores.items() -%}
| {{ key }} | {{ value }} |
{% endfor -%}
{% else -%}
Nothing was measured while it learned. `python scripts/eval_policy.py checkpoint=... env=...` plays it.
{% endif %}
## Use

```python
from lerobot.policies.factory import make_pre_post_processors
from vega_policy.modeling_vega import VegaPolicy

path = "{{ place }}"
policy = VegaPolicy.from_pretrained(path)
before, after = make_pre_post_processors(policy.config, pretrained_path=path)
policy.reset()  # at the start of every episode
action = after(policy.select_action(before(observation)))
```

`observation` holds {{ inputs }} and `task`, the instruction; frames are float32 `[3 h w]` in [0, 1].

The prior's weights are not in here: they come from their own source, and others than those of the
fingerprint above are refused.
"""

_SCORES = {
    "held_out_loss": "loss on held-out episodes",
    "held_out_action_error": "mean absolute action error on held-out episodes, in the dataset's units",
    "success": "closed-loop success while training",
    "episodes": "episodes of that",
}


def model_card(config: TrainConfig, step: int, scores: Mapping[str, float], data: str) -> ModelCard:
    """The card of the checkpoint after some step.

    Args:
        config: The run.
        step: Steps made.
        scores: What was measured after that step.
        data: The dataset in a few words.
    """
    policy = config.vega
    header = ModelCardData(
        license="apache-2.0",
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=["lerobot", "robotics", "vega"],
        datasets=[config.dataset.repo_id],
        model_name="vega",
    )
    measured = {_SCORES[name]: f"{value:.4g}" for name, value in scores.items() if name in _SCORES}
    return ModelCard.from_template(
        header,
        template_str=_TEMPLATE,
        name=policy.repo_id or "vega",
        place=policy.repo_id or "FOLDER/pretrained_model",
        inputs=", ".join(f"`{key}`" for key in policy.input_features or ()),
        facts=_facts(config, step, data),
        scores=measured,
    )


def _facts(config: TrainConfig, step: int, data: str) -> dict[str, Any]:
    policy, machine, code = config.vega, hardware(), code_revision()
    prior = policy.prior
    changed = ", with changed files" if code["changed"] else ""
    return {
        "dataset": data,
        "cameras": ", ".join(policy.image_features),
        "prior": f"{prior.name}, layer {prior.layer}, noise level {prior.noise_level}, "
        f"fingerprint {prior.fingerprint}",
        "fusion": policy.fusion.name,
        "backbone": policy.backbone.name,
        "action head": policy.head.name,
        "steps": f"{step} of {config.steps}, seed {config.seed}",
        "batch": f"{config.batch_size} a process, {config.accumulate} accumulated",
        "learning rate": policy.optimizer_lr,
        "code": f"{code['revision']}{changed}",
        "hardware": ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores",
    }


def push(config: TrainConfig, data: str) -> str:
    """Uploads `pretrained_model` of the best checkpoint to `policy.repo_id`.

    Args:
        config: The run; a token of the hub is expected where huggingface_hub looks for one.
        data: The dataset in a few words.

    Returns:
        Address of the commit.
    """
    run, policy = Path(config.output_dir), config.vega
    assert policy.repo_id is not None  # TrainConfig refuses to push without
    best = run / CHECKPOINTS / BEST
    checkpoint = best if best.exists() else run / CHECKPOINTS / LAST
    step = read_step(checkpoint)
    card = model_card(config, step, read_scores(run).get(step, {}), data)
    api = HfApi()
    api.create_repo(policy.repo_id, private=policy.private, exist_ok=True)
    with TemporaryDirectory() as folder:
        card.save(Path(folder) / "README.md")
        api.upload_folder(
            repo_id=policy.repo_id, folder_path=checkpoint / PRETRAINED, ignore_patterns=["README.md"]
        )
        commit = api.upload_file(
            repo_id=policy.repo_id, path_or_fileobj=Path(folder) / "README.md", path_in_repo="README.md"
        )
    logger.info("Uploaded %s to %s", checkpoint, commit)
    return str(commit)
