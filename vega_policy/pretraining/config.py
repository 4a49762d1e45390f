"""What one pre-training run is: frozen values, decoded from plain nested ones."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

STAGES = ("prompts", "clips", "vae", "transformer", "report", "film")


@dataclass(frozen=True)
class ClipSettings:
    """Clips that are learned from.

    Attributes:
        folder: Where they lie.
        write: Function that films what is missing, by dotted path.
        instructions: Function that lists what the robot is told, by dotted path.
        processes: Simulator processes.
        order: What is filmed; see that function.
        held_out: Share of the shards that nothing is learned from, in (0, 1); at least one shard.
    """

    folder: str
    order: dict[str, Any]
    write: str = "envs.clips.write_clips"
    instructions: str = "envs.clips.instructions"
    processes: int = 2
    held_out: float = 0.05


@dataclass(frozen=True)
class LearningSettings:
    """Optimization of one network.

    Attributes:
        steps: Optimizer steps.
        batch_size: Clips a step.
        learning_rate: Highest learning rate, after a linear warm-up; it falls as a cosine to a tenth.
        warmup: Steps of the warm-up.
        weight_decay: Of AdamW.
        gradient_norm: Largest norm of the gradient.
        average_decay: Largest decay of the averaged weights, which are the ones that are written.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 500
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.warmup) < 1:
            raise ValueError(f"steps, batch_size and warmup must be at least 1; got {self}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay lies in [0, 1); got {self.average_decay}")


@dataclass(frozen=True)
class AutoencoderSettings:
    """Training of the autoencoder.

    Attributes:
        learning: Its optimization.
        lengths: Frames of a step's clips, one of these drawn for each step; 1 is a single picture, as a
            policy's prior reads it. Each is 1 + 4 k.
        crop: Side of the square that is cut from a clip; None takes all of it.
        gradient_weight: Weight of the difference of image gradients, which keeps edges.
        kl_weight: Weight of the posterior's divergence from a standard normal.
        channels_last: Whether activations lie in memory pixel by pixel instead of channel by channel: the
            same numbers up to rounding, at another speed.
    """

    learning: LearningSettings
    lengths: list[int] = field(default_factory=lambda: [1, 5, 9])
    crop: int | None = None
    gradient_weight: float = 0.5
    kl_weight: float = 1e-6
    channels_last: bool = False

    def __post_init__(self) -> None:
        wrong = [length for length in self.lengths if length % 4 != 1]
        if wrong or not self.lengths:
            raise ValueError(f"vae.lengths: expected numbers 1 + 4 k; got {self.lengths}")
        if self.crop is not None and self.crop % 16:
            raise ValueError(f"vae.crop: expected a multiple of 16; got {self.crop}")


@dataclass(frozen=True)
class TransformerSettings:
    """Training of the transformer.

    Attributes:
        learning: Its optimization.
        time_mean: Mean of the logit of the noise level.
        time_deviation: Its standard deviation.
        shift: Noise levels t become s t / (1 + (s - 1) t); 1 leaves them.
        single_frames: Share of the steps that learn single pictures, as a policy's prior reads them.
    """

    learning: LearningSettings
    time_mean: float = 0.0
    time_deviation: float = 1.0
    shift: float = 1.0
    single_frames: float = 0.5


@dataclass(frozen=True)
class ReportSettings:
    """What is measured and shown at the end.

    Attributes:
        clips: Held-out clips that are measured, at most.
        noise_levels: Noise levels of the validation loss.
        sample_steps: Solver steps of the sample video.
        sample_shift: Its schedule's shift.
        hardware: What the card says of the machine that trained; None takes that of the report.
    """

    clips: int = 64
    noise_levels: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    sample_steps: int = 30
    sample_shift: float = 3.0
    hardware: str | None = None


@dataclass(frozen=True)
class PretrainSettings:
    """One pre-training run.

    Attributes:
        output_dir: Its folder; the same command goes on with what is there.
        clips: What is learned from.
        vae: Training of the autoencoder.
        transformer: Training of the transformer.
        report: What is measured.
        stages: Which stages are run, in the order of `STAGES`.
        prior: Entry of the table of priors whose architecture is trained.
        start: Folder of weights, as a run writes it, from which both networks set out; None starts from the
            seed's.
        prompts: Safetensors file of the instructions' embeddings; None takes that of `output_dir`.
        seed: Of initial weights, order of clips and noise.
        device: cpu, cuda, ...; None takes the best there is.
        precision: `no` or `bf16`, which is autocast on a GPU.
        max_seconds: Stop with a checkpoint after so many seconds, to be resumed; None runs to the end.
        log_every: Steps between two log lines.
        save_every: Steps between two checkpoints.
        validate_every: Steps between two looks at held-out clips.
        tensorboard: Whether curves are written for TensorBoard as well.
    """

    output_dir: str
    clips: ClipSettings
    vae: AutoencoderSettings
    transformer: TransformerSettings
    report: ReportSettings = field(default_factory=ReportSettings)
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    prior: str = "wan_tiny"
    start: str | None = None
    prompts: str | None = None
    seed: int = 0
    device: str | None = None
    precision: str = "bf16"
    max_seconds: float | None = None
    log_every: int = 20
    save_every: int = 500
    validate_every: int = 500
    tensorboard: bool = True

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}; got {self.stages}")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision: expected no or bf16; got {self.precision!r}")


def decode(values: Mapping[str, Any], cls: type[Any] = PretrainSettings, path: str = "") -> Any:
    """Turn plain nested values into settings.

    Args:
        values: As a YAML file holds them.
        cls: The settings' class.
        path: Where the values lie, for messages.

    Raises:
        ValueError: If a key is unknown or missing, or a value lies outside its range.
    """
    hints, known = get_type_hints(cls), [one.name for one in fields(cls)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {path}{near[0]}?" if near else ""
            raise ValueError(f"unknown field {path}{key}.{hint} Known: {', '.join(known)}.")
    nested = {
        key: decode(value, hints[key], f"{path}{key}.") if is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    needed = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
    missing = [f"{path}{name}" for name in needed if name not in values]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}")
    return cls(**nested)
