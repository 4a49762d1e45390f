"""What one training run is: frozen values, decoded from a composed Hydra config in one place."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

import draccus
from draccus.utils import DecodingError, ParsingError
from lerobot.configs import PreTrainedConfig
from omegaconf import DictConfig, OmegaConf

from vega_policy.configuration_vega import VegaConfig

STREAMS = ("frames", "semantic", "prior")
GROUPS = ("prior", "fusion", "backbone", "expert", "base")


@dataclass(frozen=True)
class DatasetConfig:
    """Which LeRobot dataset is learned from, and how its pictures are read.

    Attributes:
        repo_id: The dataset's name; on the hub if `root` is None.
        root: Local folder of the dataset.
        revision: Hub revision; None takes the newest.
        episodes: Episode numbers to use; None takes all.
        held_out: Share of each task's episodes kept for the held-out loss, in [0, 1).
        video_backend: Decoder that LeRobot uses, `pyav` or `torchcodec`.
        workers: Processes that decode videos while a step runs; unused with a cache.
        cache: `none` decodes videos in every step; `disk` maps a cache of frames or features into memory;
            `ram` holds it there.
        cached: Which streams the cache holds: `frames` (uint8), `semantic`, `prior`.
        cache_root: Folder of all caches.
        collect_command: Command that collects this dataset, told to the user where it is missing.
    """

    repo_id: str
    root: str | None = None
    revision: str | None = None
    episodes: list[int] | None = None
    held_out: float = 0.0
    video_backend: str = "pyav"
    workers: int = 2
    cache: str = "none"
    cached: list[str] = field(default_factory=lambda: ["semantic", "prior"])
    cache_root: str = "outputs/cache"
    collect_command: str | None = None

    def __post_init__(self) -> None:
        _choice("dataset.cache", self.cache, ("none", "disk", "ram"))
        for stream in self.cached:
            _choice("dataset.cached", stream, STREAMS)
        _share("dataset.held_out", self.held_out)


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
        resume: Go on from the newest checkpoint in `output_dir`, from step 0 if there is none yet; the same
            command can be repeated until the run is complete.
        seed: Seed of initial weights, order of samples, and noise.
        steps: Optimizer steps of the whole run.
        stop_after: Stop with a checkpoint once this many steps are made, to be resumed; None runs to the end.
        batch_size: Samples of one process in one forward pass.
        accumulate: Forward passes per optimizer step.
        average_decay: Decay of the averaged weights, which are what a checkpoint's policy holds; 0 keeps
            the raw ones.
        precision: `no` or `bf16` autocast.
        log_every: Steps between two log lines.
        save_every: Steps between two checkpoints; the last step always has one.
        evaluate_every: Steps between two held-out losses (needs `dataset.held_out`).
    """

    policy: PreTrainedConfig
    dataset: DatasetConfig
    output_dir: str
    resume: bool = False
    seed: int = 0
    steps: int = 10_000
    stop_after: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    average_decay: float = 0.999
    precision: str = "no"
    log_every: int = 50
    save_every: int = 2_000
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        _choice("precision", self.precision, ("no", "bf16"))
        _share("average_decay", self.average_decay)
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

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
    plain = {key: value for key, value in node.items() if key not in GROUPS}
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


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}.")


def _share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a share in [0, 1); got {value}.")
