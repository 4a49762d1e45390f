"""Configuration of a training run: frozen dataclasses, decoded from a composed Hydra config."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from typing import Any

import draccus
import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from omegaconf import DictConfig, OmegaConf

from vega_policy.config import check_choice, check_choices, check_numbers, from_config
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig

GROUPS = ("prior", "fusion", "backbone", "head", "base")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
_REFERRED = (*GROUPS, "env")  # groups beside the run's own fields, to which `policy` and `simulation` refer


@dataclass(frozen=True)
class EnvironmentConfig:
    """A suite and how it is rendered."""

    suite: str = "lift_wide"
    frame_size: int | None = None  # pixels; None takes those of the training data
    rendering: str | None = None  # profile, `full` or `fast`; None takes the training data's


@dataclass(frozen=True)
class SimulationConfig:
    """Closed-loop evaluation during training."""

    # Steps between two evaluations; 0 for none. The last step has one too.
    every: int = 0
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)  # the suite to evaluate on
    episodes_per_task: int = 10  # episodes of each task, divided among the processes
    # Seed of the evaluation; 99 leaves all usual ones to the final evaluation, so that `best` is not chosen
    # on its episodes.
    seed: int = 99
    processes: int = 1  # simulator processes of one training process
    videos: int = 1  # successes and failures of each training process that are rendered as videos
    make: str = "envs.make"  # function that makes environments, a dotted path
    tasks: str = "envs.tasks"  # function that lists a suite's tasks, a dotted path

    def __post_init__(self) -> None:
        check_numbers(self, "simulation.", every="[0, inf)", videos="[0, inf)")
        check_numbers(self, "simulation.", episodes_per_task="[1, inf)", processes="[1, inf)")


@dataclass(frozen=True)
class TrackerConfig:
    """Where Trackio and Weights & Biases file a run."""

    project: str = "vega"
    entity: str | None = None  # W&B's user or team; None takes the account's own
    mode: str = "online"  # or `offline`, of W&B

    def __post_init__(self) -> None:
        check_choices(self, "tracker.", mode=("online", "offline"))


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Learning rates, decay, warm-up and clipping are the policy's own (`optimizer_*`, `scheduler_*`), as in
    LeRobot.
    """

    # The policy (`type: vega`), declared as LeRobot's choice type so that it decodes and encodes with its
    # type; read it as `vega`.
    policy: PreTrainedConfig
    dataset: DatasetConfig
    output_dir: str
    # Resume from the newest intact checkpoint in `output_dir`, or start at step 0 if there is none yet; the
    # same command can be repeated until the run is complete.
    resume: bool = False
    # With `policy.pretrained_path`: take its weights but for those of projector and fusion, which start as in
    # a new run; prior and fusion may then be others than its own.
    new_fusion: bool = False
    seed: int = 0  # seed of initial weights, order of samples, and noise
    steps: int = 30_000  # optimizer steps of the whole run
    # Stop with a checkpoint after this many steps, to be resumed; None runs to the end, 0 builds the cache
    # only and writes nothing into `output_dir`.
    stop_after: int | None = None
    shards: int = 1  # commands that share the building of the cache (`stop_after=0`), by episode
    shard: int = 0  # the part of it that this command builds, from 0 on
    batch_size: int = 64  # samples of one process in one forward pass
    accumulate: int = 1  # forward passes per optimizer step
    # Decay of the averaged weights, which a checkpoint's policy holds; 0 keeps the raw ones.
    average_decay: float = 0.999
    precision: str = "no"  # `no` or `bf16` autocast
    # Compile the blocks of the compact backbone and the head (`torch.compile`): a minute at the start, fewer
    # kernels in each step.
    compile: bool = False
    # Run loss and gradient of each step as one CUDA graph, so that no kernel waits for the host; requires one
    # GPU, the compact backbone, and a cache. A prior that is not cached encodes each batch before the graph.
    # A trainable text encoder then has other draws of its dropout.
    capture: bool = False
    # `none`: each process has all weights (DDP); `full`: weights, gradients and optimizer are spread over the
    # processes (FSDP2).
    sharding: str = "none"
    # A step whose loss or gradient is not finite is skipped; this many in a row end the training.
    max_skipped_steps: int = 10
    log_every: int = 50  # steps between two log lines
    save_every: int = 2_000  # steps between two checkpoints; the last step always has one
    keep_last: int | None = 3  # newest checkpoints to keep; None keeps all
    keep_best: int = 1  # best checkpoints to keep besides
    # Steps between two measurements of the held-out loss (requires `dataset.held_out`); each checkpoint has
    # one too.
    evaluate_every: int = 500
    held_out_frames: int | None = 2_048  # held-out frames that are measured, evenly spaced; None takes all
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    # `none`, `tensorboard`, `trackio` or `wandb`; `metrics.jsonl` is written with each.
    tracking: str = "tensorboard"
    tracker: TrackerConfig = field(default_factory=TrackerConfig)  # project of Trackio and Weights & Biases

    def __post_init__(self) -> None:
        check_choices(self, "", precision=("no", "bf16"), sharding=("none", "full"), tracking=TRACKERS)
        if self.tracking != "none" and find_spec(self.tracking) is None:
            raise ValueError(f"tracking={self.tracking}: not installed. Run: pip install {self.tracking}")
        size, shift = getattr(self.policy, "frame_size", None), self.dataset.shift
        if size is not None and 4 * shift > size:
            raise ValueError(
                f"dataset.shift must be at most a quarter of policy.frame_size ({size}); got {shift}."
            )
        if self.compile and self.sharding != "none":
            raise ValueError(f"compile=true needs sharding=none; got sharding={self.sharding}.")
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "evaluate_every")
        counts += ("shards", "max_skipped_steps", "keep_last", "held_out_frames")
        check_numbers(self, "", **dict.fromkeys(counts, "[1, inf)"), keep_best="[0, inf)")
        check_numbers(self, "", average_decay="[0, 1)", stop_after="[0, inf)")
        self._check_shards()
        self._check_pairs()
        if self.new_fusion and self.policy.pretrained_path is None:
            raise ValueError(
                "new_fusion=true needs policy.pretrained_path, whose other weights are taken. Give it, or "
                "leave new_fusion out: a new run has a new fusion."
            )
        if self.policy.push_to_hub and not self.policy.repo_id:
            raise ValueError(
                "policy.push_to_hub=true needs policy.repo_id=USER/NAME, the model's repository."
            )

    def _check_shards(self) -> None:
        """Refuse parts of a cache that do not exist, and training from a part of one."""
        if self.shards > 1 and self.stop_after != 0:
            raise ValueError("shards divides the building of the cache. Add stop_after=0, or set shards=1.")
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"shard: expected a number from 0 to {self.shards - 1}; got {self.shard}.")

    def _check_pairs(self) -> None:
        if self.dataset.pairs and self.batch_size % 2:
            raise ValueError(f"dataset.pairs=true needs an even batch_size; got {self.batch_size}.")
        base = getattr(self.policy, "base", None)
        if self.dataset.pairs and base is not None and base.name != "none":
            raise ValueError(
                "dataset.pairs=true shares the noise of a pair, and a base samples its own. Take base=none."
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
                f"policy.type: expected 'vega', got {self.policy.type!r}; train LeRobot's other policies "
                "with lerobot-train."
            )
        return self.policy


def from_hydra(config: DictConfig) -> TrainConfig:
    """Return the run that a composed Hydra config describes.

    Raises:
        ValueError: If a mandatory value is missing, or as `decode`.
    """
    entries = config.dataset.get("mixture")
    if entries and OmegaConf.is_missing(config.dataset, "repo_id"):
        config.dataset.repo_id = "+".join(str(entry.get("repo_id")) for entry in entries)
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise ValueError(
            f"No value for {', '.join(sorted(missing))}. Give it on the command line "
            "(dataset.repo_id=ORG/NAME, with dataset.root=FOLDER for a local one), or choose an experiment "
            "(experiment=demo)."
        )
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    check_device(values["policy"].get("device"))
    for kind, mode in (values["policy"].get("normalization_mapping") or {}).items():
        check_choice(f"policy.normalization_mapping.{kind}", mode, NormalizationMode.__members__)
    return decode({str(key): value for key, value in values.items()})


def check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have; LeRobot would take another one.

    Raises:
        ValueError: Lists the devices that there are.
    """
    if name is None:
        return
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.mps.is_available() else [])]
    other = torch.accelerator.current_accelerator(check_available=True)
    if name not in known and (other is None or other.type != name):
        raise ValueError(
            f"policy.device: this machine has {', '.join(known)}; got {name!r}. Give one of these, or "
            "null for the best."
        )


def decode(node: Mapping[str, Any]) -> TrainConfig:
    """Decode plain nested values; the groups that `policy` refers to may lie beside it and are left out.

    Raises:
        ValueError: As `from_config`.
    """
    return from_config(TrainConfig, {key: value for key, value in node.items() if key not in _REFERRED})


def encode(config: TrainConfig) -> dict[str, Any]:
    """Return plain nested values from which `decode` makes the same run."""
    return json.loads(json.dumps(draccus.encode(config, TrainConfig)))  # enumerations and tuples made plain


def defaults(config: Any) -> dict[str, Any]:
    """Return the default values of the fields that have one, nested as the config is."""
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
