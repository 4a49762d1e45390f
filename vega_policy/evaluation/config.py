"""What an evaluation is asked to do, and which of that decides its results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vega_policy.evaluation.ablations import check_ablations


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        suite: Name of the suite.
        tasks: Indices of the tasks played; None plays all tasks of the suite.
        episodes_per_task: Episodes of each task.
        seed: Seed of the evaluation; different seeds share no episode.
        official_states: Whether episode i starts from the suite's official initial state i.
        ablations: Ablations played, `none` being the policy as it is.
        num_envs: Rows of the policy's batch, each with an environment of its own.
        processes: Worker processes; they decide how long it takes, not what comes out.
        videos: How many successes and how many failures of the policy as it is are filmed.
        video_frame_size: Height and width of a film in pixels.
        latency_calls: Timed policy calls with a single observation.
    """

    suite: str
    tasks: tuple[int, ...] | None = None
    episodes_per_task: int = 50
    seed: int = 0
    official_states: bool = False
    ablations: tuple[str, ...] = ("none",)
    num_envs: int = 10
    processes: int = 2
    videos: int = 3
    video_frame_size: int = 256
    latency_calls: int = 20

    def __post_init__(self) -> None:
        """Check what can be checked without simulator or policy.

        Raises:
            ValueError: If an ablation is unknown, or a number is out of range.
        """
        check_ablations(self.ablations)
        for name, least in (("num_envs", 1), ("processes", 1), ("videos", 0), ("latency_calls", 1)):
            value = vars(self)[name]
            if value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")

    def decisive(self) -> dict[str, Any]:
        """Return what decides the results and so must not change when an evaluation goes on."""
        settings = asdict(self)
        for indifferent in ("processes", "latency_calls"):
            del settings[indifferent]
        return settings
