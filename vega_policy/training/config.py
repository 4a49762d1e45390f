"""What one training run is: frozen values, decoded from a composed Hydra config in one place."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

import draccus
from draccus.utils import DecodingError, ParsingError
from lerobot.configs import PreTrainedConfig
from omegaconf import DictConfig, OmegaConf

from vega_policy.configuration_vega import VegaConfig

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
        num_envs: Environments of one process.
        processes: Simulator processes of one training process.
        videos: So many successes and failures of each training process are filmed.
        make: Where environments come from, a dotted path.
        tasks: Where a suite's tasks come from, a dotted path.
    """

    every: int = 0
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    episodes_per_task: int = 10
    seed: int = 99
    num_envs: int = 5
    processes: int = 1
    videos: int = 1
    make: str = "envs.make"
    tasks: str = "envs.tasks"

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("episodes_per_task", 1), ("num_envs", 1), ("processes", 1)):
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


GROUPS = ("prior", "fusion", "backbone", "head", "base")
REFERRED = (*GROUPS, "env")
"""Groups beside the run's own fields, to which `policy` and `simulation` refer."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Learning rates, decay, warm-up and clipping are the policy's own (`optimizer_*`, `scheduler_*`), as in
    LeRobot.

    Attributes:
        policy: The policy (`type: vega`), declared as LeRobot's choice type so that it decodes and encodes
            with its type; read it as `vega`.
        dataset: The demonstrations.
        output_dir: The run's folder.
        resume: Go on from the newest sound checkpoint in `output_dir`, from step 0 if there is none yet; the
            same command can be repeated until the run is complete.
        seed: Seed of initial weights, order of samples, and noise.
        steps: Optimizer steps of the whole run.
        stop_after: Stop with a checkpoint once this many steps are made, to be resumed; None runs to the end.
        batch_size: Samples of one process in one forward pass.
        accumulate: Forward passes per optimizer step.
        average_decay: Decay of the averaged weights, which are what a checkpoint's policy holds; 0 keeps
            the raw ones.
        precision: `no` or `bf16` autocast.
        compile: Compile the compact backbone's blocks and the head's (`torch.compile`): a minute at the
            start, fewer kernels in each step.
        capture: Loss and gradient of each step as one CUDA graph, so that no kernel waits for the host; needs
            one GPU, the compact backbone, and a cache that holds the prior. A text encoder that learns then
            has other draws of its dropout.
        sharding: `none`: each process has all weights (DDP); `full`: weights, gradients and optimizer are
            spread over the processes (FSDP2).
        max_skipped_steps: A step whose loss or gradient is not finite is skipped; so many in a row end the
            training.
        log_every: Steps between two log lines.
        save_every: Steps between two checkpoints; the last step always has one.
        keep_last: Newest checkpoints that are kept; None keeps all.
        keep_best: Best checkpoints that are kept besides.
        evaluate_every: Steps between two looks at the held-out episodes (needs `dataset.held_out`); each
            checkpoint has one too.
        held_out_frames: Frames of the held-out episodes that are looked at, evenly spaced; None takes all.
        simulation: Closed-loop evaluation while training.
        wandb: Weights & Biases.
    """

    policy: PreTrainedConfig
    dataset: DatasetConfig
    output_dir: str
    resume: bool = False
    seed: int = 0
    steps: int = 30_000
    stop_after: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    average_decay: float = 0.999
    precision: str = "no"
    compile: bool = False
    capture: bool = False
    sharding: str = "none"
    max_skipped_steps: int = 10
    log_every: int = 50
    save_every: int = 2_000
    keep_last: int | None = 3
    keep_best: int = 1
    evaluate_every: int = 500
    held_out_frames: int | None = 2_048
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("no", "bf16"))
        one_of("sharding", self.sharding, ("none", "full"))
        size, shift = getattr(self.policy, "frame_size", None), self.dataset.shift
        if size is not None and 4 * shift > size:
            raise ValueError(
                f"dataset.shift must be at most a quarter of policy.frame_size ({size}); got {shift}."
            )
        if self.compile and self.sharding != "none":
            raise ValueError(f"compile=true needs sharding=none; got sharding={self.sharding}.")
        share("average_decay", self.average_decay)
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "evaluate_every")
        for name in (*counts, "max_skipped_steps", "keep_last", "held_out_frames", "stop_after"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("keep_best", self.keep_best, 0)
        if self.policy.push_to_hub and not self.policy.repo_id:
            raise ValueError(
                "policy.push_to_hub=true needs policy.repo_id=USER/NAME, the model's repository."
            )

    @property
    def last_step(self) -> int:
        """Step at which this start of the run ends."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)

    @property
    def vega(self) -> VegaConfig:
        """The policy's config.

        Raises:
            TypeError: If it is of another type.
        """
        if not isinstance(self.policy, VegaConfig):
            raise TypeError(
                f"policy.type: this trainer trains 'vega', got {self.policy.type!r}; lerobot-train trains "
                "LeRobot's other policies."
            )
        return self.policy


def decode(node: Mapping[str, Any]) -> TrainConfig:
    """Turns a composed and resolved config into a run.

    Args:
        node: Plain nested values. The groups that `policy` refers to may lie beside it; they are left out.

    Returns:
        The run.

    Raises:
        ValueError: If a key is unknown (near and known ones are listed), or a value does not fit its field.
    """
    plain = {key: value for key, value in node.items() if key not in REFERRED}
    _refuse_unknown(plain, TrainConfig, "")
    try:
        return draccus.decode(TrainConfig, plain)
    except ParsingError as error:
        raise ValueError(_reason(error)) from error


def from_hydra(config: DictConfig) -> TrainConfig:
    """The run that a composed Hydra config describes.

    Raises:
        ValueError: If a mandatory value is missing, or as `decode`.
    """
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise ValueError(
            f"No value for {', '.join(sorted(missing))}. Give it on the command line "
            "(dataset.repo_id=ORG/NAME, with dataset.root=FOLDER for a local one), or choose an experiment "
            "(experiment=demo)."
        )
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return decode({str(key): value for key, value in values.items()})


def encode(config: TrainConfig) -> dict[str, Any]:
    """Plain nested values from which `decode` makes the same run."""
    return json.loads(json.dumps(draccus.encode(config, TrainConfig)))  # enumerations and tuples made plain


def defaults(config: Any) -> dict[str, Any]:
    """Default values of the fields that have one, nested as the config is."""
    found: dict[str, Any] = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            found[one.name] = defaults(value)
        elif one.default is not MISSING:
            found[one.name] = one.default
        elif one.default_factory is not MISSING:
            found[one.name] = one.default_factory()
    return found


def _reason(error: ParsingError) -> str:
    """The decoder's message; where it only says that it could not build a part, what the part itself said."""
    if not isinstance(error, DecodingError) and error.__cause__ is not None:
        return f"Config: {error.__cause__}"
    return f"Config: {error}"


def _refuse_unknown(node: Mapping[str, Any], owner: type, path: str) -> None:
    """Raises at the first key that its dataclass does not have, naming near and known ones."""
    types = get_type_hints(owner)
    known = [field.name for field in fields(owner)]
    for key, value in node.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {path}{near[0]}?" if near else ""
            raise ValueError(f"Unknown config field {path}{key}.{hint} Known there: {', '.join(known)}.")
        if key == "policy":
            choice = policy_class(value)
            _refuse_unknown({name: kept for name, kept in value.items() if name != "type"}, choice, "policy.")
        elif is_dataclass(types[key]) and isinstance(value, Mapping):
            _refuse_unknown(value, types[key], f"{path}{key}.")


def policy_class(node: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """Config class of the policy type that a `policy` node names.

    Raises:
        ValueError: If there is no type or it is not registered.
    """
    known = PreTrainedConfig.get_known_choices()
    if node.get("type") not in known:
        raise ValueError(
            f"policy.type: expected one of {', '.join(sorted(known))}; got {node.get('type')!r}."
        )
    return PreTrainedConfig.get_choice_class(node["type"])
