"""Parts of a training run's config: dataset, closed-loop evaluation, Weights & Biases."""

from dataclasses import dataclass, field

STREAMS = ("frames", "semantic", "prior")


@dataclass(frozen=True)
class DatasetConfig:
    """Which LeRobot dataset is learned from, and how its pictures are read.

    Attributes:
        repo_id: The dataset's name; on the hub if `root` is None.
        root: Local folder of the dataset.
        revision: Hub revision; None takes the newest.
        episodes: Episode numbers to use; None takes all.
        held_out: Share of each task's episodes kept for the held-out loss, in [0, 1).
        shift: Largest random shift of training frames; 0 for none. In pixels of `policy.frame_size` with a
            cache, of the dataset's own frames without. It needs frames: a cache of features holds those of
            pictures that were not moved, and a cached prior does so even beside cached frames.
        video_backend: Decoder that LeRobot uses, `pyav` or `torchcodec`.
        workers: Processes that decode videos while a step runs; unused with a cache.
        cache: `none` decodes videos in every step; `disk` maps a cache of frames or features into memory;
            `ram` holds it there, `gpu` on the device that trains.
        cached: Which streams the cache holds: `frames` (uint8), `semantic`, `prior`.
        cache_root: Folder of all caches.
        collect_command: Command that collects this dataset, told to the user where it is missing.
    """

    repo_id: str
    root: str | None = None
    revision: str | None = None
    episodes: list[int] | None = None
    held_out: float = 0.0
    shift: int = 0
    video_backend: str = "pyav"
    workers: int = 2
    cache: str = "none"
    cached: list[str] = field(default_factory=lambda: ["semantic", "prior"])
    cache_root: str = "outputs/cache"
    collect_command: str | None = None

    def __post_init__(self) -> None:
        one_of("dataset.cache", self.cache, ("none", "disk", "ram", "gpu"))
        for stream in self.cached:
            one_of("dataset.cached", stream, STREAMS)
        share("dataset.held_out", self.held_out)
        at_least("dataset.shift", self.shift, 0)
        if self.shift and self.cache != "none" and ("frames" not in self.cached or "semantic" in self.cached):
            raise ValueError(
                f"dataset.shift={self.shift} needs frames in the cache and no semantic features; got "
                f"dataset.cached={list(self.cached)}. Take [frames] (the prior sees shifted frames too), "
                "[frames,prior] (faster; its features stay unshifted), or dataset.shift=0."
            )


@dataclass(frozen=True)
class EnvironmentConfig:
    """A suite and how it is rendered.

    Attributes:
        suite: Name of the suite.
        frame_size: Height and width of a frame in pixels.
        rendering: Profile, `full` or `fast`; the dataset's.
    """

    suite: str = "lift_wide"
    frame_size: int = 128
    rendering: str = "fast"


@dataclass(frozen=True)
class SimulationConfig:
    """Closed-loop evaluation while training.

    Attributes:
        every: Steps between two; 0 never plays. The last step plays too.
        env: What is played.
        episodes_per_task: Episodes of each task, shared out over the processes.
        seed: Seed of the evaluation; 99 leaves all that is usual to the final one, so that `best` is not
            chosen on its episodes.
        slots: Environments of one process.
        processes: Simulator processes of one training process.
        videos: So many successes and failures of each training process are filmed.
        make: Where environments come from, a dotted path.
        tasks: Where a suite's tasks come from, a dotted path.
    """

    every: int = 0
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    episodes_per_task: int = 10
    seed: int = 99
    slots: int = 5
    processes: int = 1
    videos: int = 1
    make: str = "envs.make"
    tasks: str = "envs.tasks"

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("episodes_per_task", 1), ("slots", 1), ("processes", 1)):
            at_least(f"simulation.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside TensorBoard.

    Attributes:
        project: Its project; None leaves it off.
        entity: User or team; None takes the account's own.
        mode: `online` or `offline`.
    """

    project: str | None = None
    entity: str | None = None
    mode: str = "online"

    def __post_init__(self) -> None:
        one_of("wandb.mode", self.mode, ("online", "offline"))


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a value that is not one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}.")


def at_least(name: str, value: int, least: int) -> None:
    """Refuses a number that is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def share(name: str, value: float) -> None:
    """Refuses what is no share in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a share in [0, 1); got {value}.")
