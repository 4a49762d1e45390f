"""Open-loop evaluation: errors of a checkpoint's actions on recorded episodes, joint by joint.

Each error is compared with that of two predictions that need no policy: the last action goes on, and the
dataset's mean action. A policy that does not beat them has not learned from its data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vega_policy.config import from_config
from vega_policy.data.dataset import DatasetConfig, FrameTable, open_dataset, read_table
from vega_policy.data.loader import VideoSource
from vega_policy.data.video import FrameRows
from vega_policy.evaluation.compare import OPEN_LOOP_REPORT
from vega_policy.evaluation.policies import LeRobotChunkPolicy
from vega_policy.run_dir import atomic_file, read_yaml, write_json

Predict = Callable[[Tensor], np.ndarray]
"""Rows of the table [b] -> actions in the dataset's units [b t a]."""


@dataclass(frozen=True)
class OpenLoopErrors:
    """Mean absolute errors by entry of the action [a], in the dataset's units."""

    names: Sequence[str]
    policy: np.ndarray
    last_action: np.ndarray  # of repeating the action before the chunk
    mean_action: np.ndarray  # of the dataset's mean action
    by_episode: Mapping[int, np.ndarray]  # of the policy
    frames: int

    def table(self) -> str:
        """Return one line for each entry of the action."""
        width = max(len("joint"), *(len(name) for name in self.names))
        lines = [f"{'joint':{width}}  {'policy':>10}  {'last action':>11}  {'mean action':>11}"]
        for row in zip(self.names, self.policy, self.last_action, self.mean_action, strict=True):
            lines.append("{:{width}}  {:>10.4g}  {:>11.4g}  {:>11.4g}".format(*row, width=width))
        better = int((self.policy < np.minimum(self.last_action, self.mean_action)).sum())
        lines.append(
            f"mean absolute error over {self.frames} chunks; lower than both in {better} of {len(self.names)}"
        )
        return "\n".join(lines)


def read_recorded(
    checkpoint: Path, root: str | None, repo_id: str | None, episodes: Sequence[int] | None
) -> tuple[DatasetConfig, list[int], FrameTable]:
    """Return the dataset of a checkpoint's run, the episodes to evaluate, and the table of all frames.

    Without `episodes` these are the episodes that the run held out.

    Raises:
        ValueError: If the checkpoint lies in no run and no dataset is given, or no episode was held out.
    """
    stored = checkpoint.resolve().parents[2] / "config.yaml"
    values: dict[str, Any] = read_yaml(stored, "dataset")["dataset"] if stored.is_file() else {}
    if values.get("mixture") and root is None and repo_id is None:
        names = ", ".join(entry["repo_id"] for entry in values["mixture"])
        raise ValueError(f"{checkpoint} learned from a mixture; give root=FOLDER of one of {names}.")
    values["mixture"] = None
    if root is not None:
        values |= {"root": root, "repo_id": repo_id or values.get("repo_id", "local/dataset")}
    elif repo_id is not None:
        values |= {"repo_id": repo_id, "root": None}
    if values.keys() == {"mixture"}:
        raise ValueError(
            f"{checkpoint} lies in no run that names its dataset; give root=FOLDER (or repo_id)."
        )
    config = from_config(DatasetConfig, values)
    dataset = open_dataset(config)
    table = read_table(dataset.root, dataset.stored_names, config.task)
    chosen = list(episodes) if episodes is not None else table.split(config.held_out, config.episodes)[1]
    if not chosen:
        raise ValueError(
            "The run held out no episodes (dataset.held_out=0). Give episodes=[...], best ones that were not "
            "trained on."
        )
    return config, chosen, table


def predict_recorded(
    policy: LeRobotChunkPolicy, config: DatasetConfig, table: FrameTable, batch_size: int = 32
) -> Predict:
    """Return a function that predicts the chunks of recorded frames, each row with the same noise."""
    dataset = open_dataset(config)
    settings: Any = policy.policy.config
    history = len(settings.observation_delta_indices or ())
    frames = FrameRows(dataset, table, list(settings.image_features), config.video_backend, history)
    source = VideoSource(table, frames, chunk_size=1, workers=0, seed=0)
    shape = policy.noise_shape
    noise = None if shape is None else np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def predict(rows: Tensor) -> np.ndarray:
        chunks = []
        for part in tqdm(rows.split(batch_size), desc="Predicting", unit="batch"):
            batch = source.batch(part)
            inputs = policy.preprocessor({k: batch[k] for k in batch if not k.startswith("action")})
            start = None if noise is None else np.repeat(noise[None], len(part), axis=0)
            chunks.append(policy.predict(inputs, start))
        return np.concatenate(chunks)

    return predict


def measure(predict: Predict, table: FrameTable, rows: Tensor, names: Sequence[str] | None) -> OpenLoopErrors:
    """Compare predicted chunks from rows [m] with the recorded actions, without those beyond an episode."""
    predicted = predict(rows)
    actions, is_pad = (part.numpy() for part in table.chunks(rows, predicted.shape[1]))
    same_episode = table.episode[(rows - 1).clamp(min=0)] == table.episode[rows]
    last = table.action[torch.where(same_episode, (rows - 1).clamp(min=0), rows)].numpy()[:, None]
    mean = table.action.mean(dim=0).numpy()

    def error(guess: np.ndarray, chosen: Any = slice(None)) -> np.ndarray:
        return np.abs(guess - actions)[chosen][~is_pad[chosen]].mean(axis=0)

    labels = list(names) if names else [f"action[{entry}]" for entry in range(actions.shape[-1])]
    episode = table.episode[rows].numpy()
    by_episode = {int(number): error(predicted, episode == number) for number in np.unique(episode)}
    return OpenLoopErrors(labels, error(predicted), error(last), error(mean), by_episode, len(rows))


def write_report(
    folder: Path, errors: OpenLoopErrors, predict: Predict, table: FrameTable, episode: int, stride: int
) -> None:
    """Write `open_loop.json` and `open_loop.png`: one episode, a predicted chunk every `stride` frames."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    values = {name: getattr(errors, name).tolist() for name in ("policy", "last_action", "mean_action")}
    values["by_episode"] = {str(number): error.tolist() for number, error in errors.by_episode.items()}
    write_json(folder / OPEN_LOOP_REPORT, {"joints": list(errors.names), "chunks": errors.frames, **values})
    rows = table.rows_of([episode])
    starts = rows[::stride]
    predicted = predict(starts)[:, :stride]
    count = len(errors.names)
    figure, axes = plt.subplots(count, 1, sharex=True, squeeze=False, figsize=(9, 1.6 * count))
    for entry, (axis, name) in enumerate(zip(axes[:, 0], errors.names, strict=True)):
        axis.plot(table.action[rows, entry], color="black", label="recorded")
        for number, chunk in enumerate(predicted):
            steps = np.arange(len(chunk)) + number * stride
            axis.plot(steps, chunk[:, entry], color="tab:orange", label=None if number else "predicted")
        axis.set_ylabel(name, fontsize=7)
    axes[0, 0].legend(loc="upper right", fontsize=7)
    axes[-1, 0].set_xlabel(f"frame of episode {episode}")
    with atomic_file(folder / "open_loop.png") as draft:
        figure.savefig(draft, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def evaluate_open_loop(
    policy: LeRobotChunkPolicy, checkpoint: Path, output: Path, *, frames: int, **data: Any
) -> OpenLoopErrors:
    """Evaluate at most `frames` evenly spaced frames of recorded episodes, and write a report."""
    config, episodes, table = read_recorded(checkpoint, **data)
    rows = table.rows_of(episodes)
    if len(rows) > frames:
        rows = rows[torch.linspace(0, len(rows) - 1, frames).round().long()]
    predict = predict_recorded(policy, config, table)
    names = vars(policy.policy.config).get("action_feature_names")
    errors = measure(predict, table, rows, names)
    output.mkdir(parents=True, exist_ok=True)
    write_report(output, errors, predict, table, episodes[0], policy.description.action_steps)
    return errors
