"""Measures what features encode about space and about the future. Here: the settings of a run.

Space: correspondence between views, linear probes and spatial questions, of frames with known cameras and
depth (`geometry`), rendered by a simulator or read from a folder. Sources: the correspondence score of
VEGA-3D (arXiv 2603.19235); the questions of VSI-Bench (arXiv 2412.14171) and ScanRefer (arXiv 1912.08830).
Future: linear probes (`linear_probes`) of what happens next in demonstrations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vega_policy.config import check_choices, check_numbers
from vega_policy.model.config import STRIDE, BackboneConfig, FusionConfig, PriorConfig

BASELINES = ("semantic", "vae", "random", "pixels", "position")
"""Feature sources that the prior is compared with."""


@dataclass(frozen=True)
class SceneSettings:
    """Source of the scenes: a simulated suite, or folders of posed RGB-D frames in nerfstudio's layout."""

    name: str  # in reports
    suite: str | None = None  # a robosuite or LIBERO suite; None reads `folders`
    folders: list[str] = field(default_factory=list)  # each is one scene
    tasks: list[int] = field(default_factory=lambda: [0, 1])  # of the suite; scenes are spread over them
    count: int = 24  # scenes of the suite
    layout: str = "random"  # objects anywhere, some absent; "task": as each task places them
    views: int = 6  # per scene; of a folder, the largest number of frames
    camera: str = "agentview"  # simulation camera that the views are placed around
    rendering: str = "fast"  # rendering profile, `full` or `fast`

    def __post_init__(self) -> None:
        if (self.suite is None) == (not self.folders):
            raise ValueError(
                "scenes: expected either a suite or folders of posed frames (scenes=folder "
                f"'scenes.folders=[PATH]'); got suite {self.suite!r} and folders {self.folders}"
            )


@dataclass(frozen=True)
class SweepSettings:
    """Features that are measured."""

    layers: list[int] | None = None  # of the prior; None: all of a Wan, the default of other priors
    noise_levels: list[float] | None = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))

    def __post_init__(self) -> None:
        wrong = [level for level in self.noise_levels or [] if not 0 <= level <= 1]
        if wrong:
            raise ValueError(f"sweep.noise_levels lie in [0, 1]; got {wrong}")


@dataclass(frozen=True)
class QuestionSettings:
    """Spatial questions about random layouts of the suite, and how models learn to answer them."""

    scenes: int = 600  # 0 switches questions off; scenes from folders have no objects and no questions
    frame_size: int = 128  # side of the frames in pixels
    max_per_kind: int = 6000  # training questions of one kind
    max_texts: int = 120  # different texts of one kind
    steps: int = 800  # optimizer steps of each model
    scenes_per_step: int = 16
    questions_per_scene: int = 16
    learning_rate: float = 1e-3  # peak
    dropout: float = 0.1  # in the answer head
    depth: int = 0  # trunk blocks of the backbone; the answer head attends to its output
    latents: int | None = None  # latents into which views are resampled; None keeps all tokens
    # Of measure=questions alone.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of each model's weights and order
    arms: list[str] | None = None  # names of the models, as in the tables; None trains all
    future_path: str | None = None  # weights of the same prior that are read with clip=future, too
    future_layers: list[int] = field(default_factory=lambda: [2, 5])

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "scenes_per_step", "questions_per_scene"), "[1, inf)")
        check_numbers(self, "questions.", **counts, dropout="[0, 1)", scenes="[0, inf)")
        if not self.seeds or not self.future_layers or self.arms == []:
            raise ValueError("questions: expected at least one of seeds, of arms and of future_layers")


@dataclass(frozen=True)
class EpisodeSettings:
    """The demonstrated episode whose video shows the gate of the fused question-answering model."""

    steps: int = 160  # the episode is cut there; 0 records none
    task: int = 0
    seed: int = 0
    every: int = 4  # steps between two frames


@dataclass(frozen=True)
class FutureSettings:
    """Moments of demonstrations, and what is read out of them about the steps that follow."""

    states: str | None = None  # folder of SUITE.safetensors; None: the shipped demonstrations of LIBERO
    suites: list[str] = field(default_factory=lambda: ["libero_goal", "libero_10"])
    tasks: list[int] = field(default_factory=lambda: list(range(8)))  # of each suite
    episodes_per_task: int = 5
    every: int = 8  # control steps from one moment to the next
    horizons: list[int] = field(default_factory=lambda: [8, 16, 32])  # control steps
    moved: float = 0.01  # m, displacement beyond which something has moved
    grid: int = 4  # side of the grid to which the tokens of a view are pooled
    components: int = 128  # principal components of all pooled tokens, of every encoder alike
    prompts: list[str] = field(default_factory=lambda: ["empty", "instruction"])  # of prior.clip=future
    frame_path: str | None = None  # weights of the same prior that are read with clip=frame, too

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("episodes_per_task", "every", "grid", "components"), "[1, inf)")
        check_numbers(self, "future.", **counts, moved="(0, inf)")
        if not self.horizons or sorted({0, *self.horizons}) != [0, *self.horizons]:
            raise ValueError(f"future.horizons: expected rising numbers of steps; got {self.horizons}")
        if not self.suites or not self.tasks or not self.prompts:
            raise ValueError("future: expected at least one of suites, of tasks and of prompts")


@dataclass(frozen=True)
class ProbeSettings:
    """One probe run."""

    prior: PriorConfig
    backbone: BackboneConfig  # its image encoder is the semantic baseline
    scenes: SceneSettings
    output_dir: str
    fusion: FusionConfig = field(default_factory=FusionConfig)  # of the models that answer questions
    sweep: SweepSettings = field(default_factory=SweepSettings)
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    episode: EpisodeSettings = field(default_factory=EpisodeSettings)
    measure: str = "space"  # or "future", "questions"
    future: FutureSettings = field(default_factory=FutureSettings)
    cache_root: str = "outputs/cache/analysis"  # rendered scenes and measured numbers
    frame_size: int = 224  # pixels, a multiple of 16: one token for 16x16 pixels
    voxel: float = 0.1  # m, side of a voxel of the correspondence score
    radius: float = 0.1  # m, distance within which a retrieved token is correct
    max_depth: float = 10.0  # m, depth beyond it counts as unknown
    processes: int = 2  # simulator processes
    device: str | None = None  # of measure=questions (None: the best there is); the others run on the CPU
    seed: int = 0  # of scenes, weights and question sampling
    scene_writer: str = "envs.posed_views.write_scenes"  # dotted path: analysis does not import envs
    episode_writer: str = "envs.posed_views.write_episode"
    demonstration_writer: str = "envs.posed_views.write_demonstrations"

    def __post_init__(self) -> None:
        if self.prior.name == "none":
            raise ValueError("prior=none leaves nothing to probe; choose a prior, such as prior=wan_tiny")
        check_choices(self, "", measure=("space", "future", "questions"))
        if self.frame_size % STRIDE:
            raise ValueError(f"frame_size must be a multiple of {STRIDE}; got {self.frame_size}")
        if self.measure != "questions" and self.device not in (None, "cpu"):
            raise ValueError(f"device={self.device}: measure={self.measure} runs on the CPU; leave it null")
        if self.measure == "future":
            self._check_future()
        elif self.prior.clip != "frame":
            raise ValueError(
                f"probes of space read single frames (prior.clip=frame); got {self.prior.clip!r}. Those of "
                "the future also read prior.clip=future: measure=future"
            )
        elif self.measure == "questions" and not (self.questions.scenes and self.scenes.suite):
            raise ValueError("measure=questions renders its scenes: it needs a suite and questions.scenes")
        elif len(self.prior.layers) > 1:
            raise ValueError(
                f"probes of space read one layer at a time; got prior.layer={list(self.prior.layers)}"
            )

    def _check_future(self) -> None:
        if self.prior.clip not in ("frame", "future"):
            raise ValueError(
                f"measure=future reads moments: prior.clip=frame or future; got {self.prior.clip!r}"
            )
        if self.future.grid > self.grid[0]:
            raise ValueError(
                f"future.grid={self.future.grid}: frames of {self.frame_size} pixels have only "
                f"{self.grid[0]} tokens a side"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (gh, gw)."""
        return self.frame_size // STRIDE, self.frame_size // STRIDE


def decode(node: Mapping[str, Any]) -> ProbeSettings:
    """Turn composed and resolved values into settings.

    Raises:
        ValueError: If a field is unknown or missing, or a value does not fit its field.
    """
    from vega_policy.config import from_config  # loads draccus; `--help` imports this module

    return from_config(ProbeSettings, node)
