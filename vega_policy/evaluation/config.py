"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vega_policy.evaluation.ablations import check_ablations
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
    num_envs: int = 10  # batch size of the policy
    processes: int = 2  # worker processes; without influence on results
    videos: int = 3  # number of successes and of failures that are rendered to videos
    video_frame_size: int = 256  # pixels
    latency_calls: int = 20  # timed policy calls with a single observation

    def __post_init__(self) -> None:
        check_ablations(self.ablations)
        for name, least in (("num_envs", 1), ("processes", 1), ("videos", 0), ("latency_calls", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")

    def decisive(self) -> dict[str, Any]:
        """Return the settings that influence results and so must not change when an evaluation resumes."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("processes", "latency_calls")
        }


def read_settings(config: Mapping[str, Any], tasks: Sequence[TaskDescription]) -> EvaluationSettings:
    """Return the settings of a composed configs/eval.yaml, given all tasks of its suite.

    `ablations` is one name or a list of names. Official initial states are the default where all tasks of the
    suite have them.
    """
    ablations, indices, official = config["ablations"], config["tasks"], config["official_states"]
    numbers = ("episodes_per_task", "seed", "num_envs", "processes", "videos", "video_frame_size")
    return EvaluationSettings(
        suite=config["env"]["suite"],
        tasks=None if indices is None else tuple(indices),
        ablations=(ablations,) if isinstance(ablations, str) else tuple(ablations),
        official_states=all(task.official_states for task in tasks) if official is None else official,
        **{name: config[name] for name in (*numbers, "latency_calls")},
    )
