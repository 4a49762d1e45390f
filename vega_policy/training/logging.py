"""Progress bar, metrics.jsonl, trackers, provenance, model card and upload of a training run."""

import io
import json
import logging
import math
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import imageio.v3 as imageio
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from huggingface_hub import HfApi, ModelCard, ModelCardData
from lerobot.configs import PreTrainedConfig
from tensorboard.compat.proto import summary_pb2
from tqdm import tqdm

from vega_policy.checkpoints import BEST, CHECKPOINTS, PRETRAINED, list_checkpoints, read_scores
from vega_policy.configuration_vega import VegaConfig
from vega_policy.evaluation.policies import checkpoint_fingerprint
from vega_policy.run_dir import (
    code_revision,
    drop_lines_after,
    environment,
    hardware,
    read_json,
    write_json,
    write_text,
)
from vega_policy.training.checkpoint import CARD, METRICS, read_step
from vega_policy.training.config import TrainConfig, encode

logger = logging.getLogger(__name__)

PROVENANCE, TRACKER_RUN = "provenance.json", "{}_run.txt"
_GIF_FRAMES = 60  # of a video that TensorBoard gets
_BAR_INTERVAL = 0.5  # s, at least, between two refreshes of the bar
_PROTO: Any = summary_pb2


def open_trackers(config: TrainConfig, run: Path, first: int) -> list[GeneralTracker]:
    """Open the tracker of `tracking`, if any; a resumed run continues in it.

    TensorBoard hides what an earlier start wrote after step `first`; Trackio and W&B show it as well.
    """
    project = config.tracker.project
    known = run / TRACKER_RUN.format(config.tracking)  # the run's identity there
    identity = known.read_text().strip() if known.is_file() else None
    tracker: Any
    match config.tracking:
        case "tensorboard":
            tracker = TensorBoardTracker("tensorboard", run, purge_step=first + 1)
            tracker.start()
        case "trackio":
            # Trackio finds a run by its name, which those of other folders may share.
            identity = identity or f"{run.name}-{secrets.token_hex(3)}"
            tracker = TrackioTracker(
                project, name=identity, resume="allow", config=encode(config), embed=False
            )
            tracker.start()
            write_text(known, f"{identity}\n")
        case "wandb":
            mode = "offline" if config.tracker.mode == "offline" else "online"
            tracker = WandBTracker(
                project,
                entity=config.tracker.entity,
                mode=mode,
                dir=str(run),
                name=run.name,
                id=identity,
                resume="allow",
                config=encode(config),
            )
            tracker.start()
            write_text(known, f"{tracker.run.id}\n")
        case _:
            return []
    return [tracker]


def log_video(tracker: Any, step: int, name: str, path: Path) -> None:
    """Log an mp4 file; accelerate's trackers have no call for videos."""
    if tracker.name in ("trackio", "wandb"):
        module: Any = import_module(tracker.name)  # takes seconds, and most runs do without
        options = {"format": "mp4"} if tracker.name == "wandb" else {}
        tracker.log({name: module.Video(str(path), **options)}, step=step)
        return
    frames = imageio.imread(path, plugin="pyav")  # [t h w 3]
    buffer = io.BytesIO()
    shown = frames[:: max(1, len(frames) // _GIF_FRAMES)]
    imageio.imwrite(buffer, shown, extension=".gif", plugin="pillow", duration=100, loop=0)
    height, width, depth = frames.shape[1:]
    image = _PROTO.Summary.Image(
        height=height, width=width, colorspace=depth, encoded_image_string=buffer.getvalue()
    )
    value = _PROTO.Summary.Value(tag=name, image=image)  # `add_video` would need moviepy
    tracker.tracker._get_file_writer().add_summary(_PROTO.Summary(value=[value]), step)


class Progress:
    """Averages values between two log lines, and writes them to the bar, metrics.jsonl and the trackers.

    Only the main process (`shown`) shows and writes anything. Lines that an earlier start wrote after step
    `first` are dropped.
    """

    def __init__(
        self, run: Path, first: int, steps: int, trackers: Sequence[GeneralTracker], *, shown: bool
    ) -> None:
        self._trackers, self._shown = trackers, shown
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._waited = self._steps = 0.0
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc="Training",
            unit="step",
            mininterval=_BAR_INTERVAL,
            disable=not shown,
        )
        if shown:
            drop_lines_after(run / METRICS, first)
            self._file = (run / METRICS).open("a")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, values: Mapping[str, float]) -> None:
        """Add the values of one optimizer step; those that are not finite are left out of the means."""
        self._steps += 1
        for name, value in values.items():
            counted = math.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + (value if counted else 0.0)
            self._counts[name] = self._counts.get(name, 0) + counted
        self._bar.update()

    def interval(self) -> dict[str, float]:
        """Return the means since the last call, steps per second and the percentage of time waiting for data.

        The mean of a value that was never finite is NaN.
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

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Write the finite ones of a step's values, as `<group>/<name>` to the trackers."""
        if not self._shown:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log({f"{group}/{name}": value for name, value in values.items()}, step=step)
        shown = {
            name: f"{value:.4g}" for name, value in values.items() if not name.startswith("learning_rate")
        }
        self._bar.set_postfix(shown, refresh=False)

    def write_video(self, step: int, name: str, path: Path) -> None:
        """Log an mp4 file to all trackers."""
        for tracker in self._trackers:
            log_video(tracker, step, name, path)

    def close(self) -> None:
        """Flush and close all logs."""
        self._bar.close()
        if self._shown:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def record_start(run: Path, step: int, processes: int) -> None:
    """Add this start, from `step` on, to the run's `provenance.json`."""
    path = run / PROVENANCE
    starts = read_json(path, kind=list) if path.is_file() else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"time": now, "from_step": step, "processes": processes, "command": sys.argv, **environment()}
    write_json(path, [*starts, start])


_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if has_prior -%}
A vision-language-action policy with VEGA-3D ([arXiv 2603.19235](https://arxiv.org/abs/2603.19235)) as its
observation encoder: features of a frozen video diffusion model, fused token by token with a semantic encoder.
{%- else -%}
A vision-language-action policy with a semantic image encoder as its observation encoder, without a video
diffusion model (`prior=none`).
{%- endif %}

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
Nothing was measured during training. Evaluate with `python scripts/eval_policy.py checkpoint=... env=...`.
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
{%- if has_prior %}

The prior's weights are not in this repository: they come from their own source, and weights with another
fingerprint than the one above are refused.
{%- endif %}
"""

_SCORES = {
    "held_out_loss": "loss on held-out episodes",
    "held_out_action_error": "mean absolute action error on held-out episodes, in the dataset's units",
    "success": "closed-loop success during training",
    "episodes": "episodes of that",
}


def model_card(
    config: TrainConfig, policy: VegaConfig, step: int, scores: Mapping[str, float], data: str
) -> ModelCard:
    """Return the card of the checkpoint after `step`, with its scores and a short description of the data.

    `policy` is the checkpoint's own configuration, in which the prior's layer and weights are known.
    """
    header = ModelCardData(
        license="apache-2.0",
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=["lerobot", "robotics", "vega"],
        datasets=[part.repo_id for part in config.dataset.parts],
        model_name="vega",
    )
    return ModelCard.from_template(
        header,
        template_str=_TEMPLATE,
        name=policy.repo_id or "vega",
        place=policy.repo_id or "FOLDER/pretrained_model",
        has_prior=policy.prior.name != "none",
        inputs=", ".join(f"`{key}`" for key in policy.input_features or ()),
        facts=_describe_run(config, policy, step, data),
        scores={_SCORES[name]: f"{value:.4g}" for name, value in scores.items() if name in _SCORES},
    )


def _describe_run(config: TrainConfig, policy: VegaConfig, step: int, data: str) -> dict[str, Any]:
    machine, code = hardware(), code_revision()
    prior = policy.prior
    changed = ", with changed files" if code["changed"] else ""
    facts = {"dataset": data, "cameras": ", ".join(policy.image_features), "prior": prior.name}
    if prior.name != "none":
        clip = "" if prior.clip == "frame" else f", clip {prior.clip}"
        facts["prior"] += f"{clip}, layer {prior.layer}, noise level {prior.noise_level}"
        facts["prior"] += f", fingerprint {prior.fingerprint}"
        facts["fusion"] = policy.fusion.name
    return facts | {
        "backbone": policy.backbone.name,
        "action head": policy.head.name,
        "steps": f"{step} of {config.steps}, seed {config.seed}",
        "batch": f"{config.batch_size} a process, {config.accumulate} accumulated",
        "learning rate": policy.optimizer_lr,
        "code": f"{code['revision']}{changed}",
        "hardware": ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores",
    }


def complete_card(folder: Path, evaluations: Sequence[Path]) -> str:
    """Return the card of the policy in `folder`, with its training and its evaluations.

    The folder is an exported policy, or the `pretrained_model` of a run, whose commands and minutes are
    added. `evaluations` are output folders of evaluations of the policy.

    Raises:
        ValueError: If an evaluation is of another policy.
    """
    card = (folder / CARD).read_text().replace("FOLDER/pretrained_model", "FOLDER").rstrip()
    run = folder.resolve().parents[2]
    if folder.name == PRETRAINED and (run / PROVENANCE).is_file():
        starts = read_json(run / PROVENANCE, kind=list)
        commands = [shlex.join(["python", *start["command"]]) for start in starts]
        card += "\n".join(["\n\n## Training\n", "```bash", *commands, "```\n"])
        card += f"\n{training_minutes(run):.1f} minutes of optimizer steps.\n"
    if not evaluations:
        return card
    mark = checkpoint_fingerprint(folder)
    rows = ["suite | pixels | rendering | seed | episodes | success, % | 95% interval", "|".join(7 * ["---"])]
    rows += [_evaluation_row(path, mark) for path in evaluations]
    return card + f"\n\n## Evaluated (policy {mark})\n\n" + "".join(f"| {row} |\n" for row in rows)


def _evaluation_row(folder: Path, mark: str) -> str:
    summary = read_json(folder / "summary.json", "settings")
    settings = summary["settings"]
    if settings["checkpoint_sha256"] != mark:
        raise ValueError(
            f"{folder} evaluates another policy: expected {mark}, got {settings['checkpoint_sha256']}. Give "
            "evaluations of the folder that is exported."
        )
    success, low, high = (f"{100 * summary[name]:.1f}" for name in ("success_rate", "ci_low", "ci_high"))
    where = (settings[name] for name in ("suite", "frame_size", "rendering", "seed"))
    return " | ".join([*map(str, where), str(summary["episodes"]), success, f"{low} to {high}"])


def training_minutes(run: Path) -> float:
    """Return the minutes that a run's optimizer steps took, by its log."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    speeds = {line["step"]: line["steps_per_s"] for line in lines if "steps_per_s" in line}
    return sum((step - last) / speeds[step] for last, step in pairwise([0, *sorted(speeds)])) / 60


def push_to_hub(config: TrainConfig, data: str) -> str:
    """Upload `pretrained_model` of the best checkpoint to `policy.repo_id`, and return its address."""
    run, policy = Path(config.output_dir), config.vega
    assert policy.repo_id is not None  # TrainConfig refuses to push without
    best = run / CHECKPOINTS / BEST
    checkpoint = best if best.exists() else list_checkpoints(run)[-1]
    step = read_step(checkpoint)
    saved = cast(VegaConfig, PreTrainedConfig.from_pretrained(checkpoint / PRETRAINED))
    card = model_card(config, saved, step, read_scores(run).get(step, {}), data)
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
