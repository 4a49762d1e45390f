"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vega_policy.evaluation.ablations import ABLATIONS, check_ablations
from vega_policy.evaluation.episodes import TaskDescription


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Raises:
        ValueError: If an ablation is unknown, or a number is out of range.
    """

    suite: str
    tasks: tuple[int, ...] | None = None  # indices; None evaluates all tasks of the suite
    episodes_per_task: int = 50
    seed: int = 0  # different seeds share no episode
    official_states: bool = False  # episode i starts from the suite's official initial state i
    ablations: tuple[str, ...] = ("none",)  # the first one is the headline of the report
    batch_size: int = 1  # rows of a prediction of the policy; their number may change the last bits
    processes: int = 2  # simulators, one a process; without influence on results
    videos: int = 3  # number of successes and of failures that are rendered to videos
    video_frame_size: int = 256  # pixels
    latency_calls: int = 20  # timed policy calls with a single observation

    def __post_init__(self) -> None:
        check_ablations(self.ablations)
        for name, least in (("batch_size", 1), ("processes", 1), ("videos", 0), ("latency_calls", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")

    def decisive(self) -> dict[str, Any]:
        """Return the settings that influence results and so must not change when an evaluation resumes."""
        free = {"latency_calls"} if self.mixes_rows else {"latency_calls", "processes"}
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def mixes_rows(self) -> bool:
        """Whether an ablation exchanges features between the rows of a batch."""
        return not all(ABLATIONS[name].rows_independent for name in self.ablations)


def default_batch_size(device: str) -> int:
    """Return the number of rows of a prediction: one on a CPU, which takes as long for each row of more."""
    return 1 if device.startswith("cpu") else 16


def read_settings(
    config: Mapping[str, Any], suite: str, tasks: Sequence[TaskDescription], device: str
) -> EvaluationSettings:
    """Return the settings of a composed configs/eval.yaml in a suite, given all its tasks.

    `ablations` is one name or a list of names. Official initial states are the default where all tasks of the
    suite have them; the batch size defaults by `device`.
    """
    ablations, indices, official = config["ablations"], config["tasks"], config["official_states"]
    numbers = ("episodes_per_task", "seed", "processes", "videos", "video_frame_size", "latency_calls")
    return EvaluationSettings(
        suite=suite,
        tasks=None if indices is None else tuple(indices),
        ablations=(ablations,) if isinstance(ablations, str) else tuple(ablations),
        official_states=all(task.official_states for task in tasks) if official is None else official,
        batch_size=config["batch_size"] or default_batch_size(device),
        **{name: config[name] for name in numbers},
    )
