"""Configuration of a pre-training run."""

from dataclasses import dataclass, field
from typing import Any

from vega_policy.config import check_choices

STAGES = ("prompts", "clips", "vae", "transformer", "report", "film")


@dataclass(frozen=True)
class ClipSettings:
    """Training clips."""

    folder: str
    order: dict[str, Any]  # arguments of `write` and `instructions`
    write: str = "envs.clips.write_clips"  # function that renders missing clips, by dotted path
    instructions: str = "envs.clips.instructions"  # function that lists instructions, by dotted path
    processes: int = 2  # simulator processes
    held_out: float = 0.05  # fraction of the shards kept for validation, in (0, 1); at least one shard


@dataclass(frozen=True)
class LearningSettings:
    """Optimization of one network."""

    steps: int
    batch_size: int  # clips a step
    learning_rate: float  # the highest, after a linear warm-up; a cosine lowers it to a tenth
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    gradient_norm: float = 1.0  # the largest; longer gradients are scaled
    average_decay: float = 0.999  # the largest, of the averaged weights, which are exported

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.warmup) < 1:
            raise ValueError(f"steps, batch_size and warmup must be at least 1; got {self}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: expected a value in [0, 1); got {self.average_decay}")


@dataclass(frozen=True)
class AutoencoderSettings:
    """Training of the autoencoder."""

    learning: LearningSettings  # its optimization
    # Frames of a step's clips, one of these drawn for each step; 1 is a single image, as a policy's prior
    # reads it. Each is 1 + 4 k.
    lengths: list[int] = field(default_factory=lambda: [1, 5, 9])
    crop: int | None = None  # side of a random square crop in pixels; None takes the whole frame
    gradient_weight: float = 0.5  # weight of the difference of image gradients, which keeps edges
    kl_weight: float = 1e-6  # weight of the posterior's divergence from a standard normal
    # Use channels-last memory for activations: the same results up to rounding, at another speed.
    channels_last: bool = False

    def __post_init__(self) -> None:
        wrong = [length for length in self.lengths if length % 4 != 1]
        if wrong or not self.lengths:
            raise ValueError(f"vae.lengths: expected numbers 1 + 4 k; got {self.lengths}")
        if self.crop is not None and self.crop % 16:
            raise ValueError(f"vae.crop: expected a multiple of 16; got {self.crop}")


@dataclass(frozen=True)
class TransformerSettings:
    """Training of the transformer."""

    learning: LearningSettings
    time_mean: float = 0.0  # of the logit of the noise level
    time_deviation: float = 1.0  # standard deviation of that logit
    shift: float = 1.0  # noise levels t become s t / (1 + (s - 1) t); 1 leaves them
    single_frames: float = 0.5  # fraction of the steps on single images, as a policy's prior reads them
    # Fraction of the steps on clips that continue a frame: the first latent is clean, the others are noisy.
    image_to_video: float = 0.0
    pure_noise: float = 0.25  # fraction of their clips at noise level 1, which `prior.clip=future` reads

    def __post_init__(self) -> None:
        for name in ("single_frames", "image_to_video", "pure_noise"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"transformer.{name}: expected a fraction in [0, 1]; got {value}")


@dataclass(frozen=True)
class ReportSettings:
    """Measurements and samples at the end."""

    clips: int = 64  # held-out clips that are measured, at most
    noise_levels: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    sample_steps: int = 30  # solver steps of the sample video
    sample_shift: float = 3.0  # shift of its schedule
    hardware: str | None = None  # training hardware for the card; None takes that of the report


@dataclass(frozen=True)
class PretrainSettings:
    """One pre-training run."""

    output_dir: str  # its folder; the same command resumes the run in it
    clips: ClipSettings  # training clips
    vae: AutoencoderSettings  # training of the autoencoder
    transformer: TransformerSettings  # training of the transformer
    report: ReportSettings = field(default_factory=ReportSettings)  # measurements at the end
    stages: list[str] = field(default_factory=lambda: list(STAGES))  # stages to run, in the order of `STAGES`
    prior: str = "wan_tiny"  # entry of the table of priors whose architecture is trained
    # Folder of exported weights that both networks start from; None starts from the seed's. Without the stage
    # `vae` its autoencoder is kept.
    start: str | None = None
    # Safetensors file of the instructions' embeddings; None takes that of `output_dir`.
    prompts: str | None = None
    seed: int = 0  # seed of initial weights, order of clips and noise
    device: str | None = None  # cpu, cuda, ...; None takes the best there is
    precision: str = "bf16"  # `no` or `bf16`, which is autocast on a GPU
    # Stop with a checkpoint after this time, to be resumed; None runs to the end.
    max_seconds: float | None = None
    log_every: int = 20  # steps between two log lines
    save_every: int = 500  # steps between two checkpoints
    validate_every: int = 500  # steps between two measurements on held-out clips
    tensorboard: bool = True  # write curves for TensorBoard as well

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}; got {self.stages}")
        check_choices(self, "", precision=("no", "bf16"))
