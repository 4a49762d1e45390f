"""Measures what features encode about space: correspondence between views, linear probes, spatial questions.

All of it measures frozen features of frames with known cameras and depth (`scenes`), rendered by a simulator
or read from a folder. Sources: the correspondence score of VEGA-3D (arXiv 2603.19235); the questions of
VSI-Bench (arXiv 2412.14171) and ScanRefer (arXiv 1912.08830). Here: the settings of a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

    scenes: int = 240  # 0 switches questions off; scenes from folders have no objects and no questions
    frame_size: int = 128  # side of the frames in pixels
    max_per_kind: int = 1500  # training questions of one kind
    max_texts: int = 60  # different texts of one kind
    steps: int = 400  # optimizer steps of each model
    scenes_per_step: int = 16
    questions_per_scene: int = 12
    learning_rate: float = 1e-3  # peak
    depth: int = 0  # trunk blocks of the backbone; the answer head attends to its output
    latents: int | None = None  # latents into which views are resampled; None keeps all tokens


@dataclass(frozen=True)
class EpisodeSettings:
    """The demonstrated episode whose video shows the gate of the fused question-answering model."""

    steps: int = 160  # the episode is cut there; 0 records none
    task: int = 0
    seed: int = 0
    every: int = 4  # steps between two frames


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
    cache_root: str = "outputs/cache/analysis"  # rendered scenes and measured numbers
    frame_size: int = 224  # pixels, a multiple of 16: one token for 16x16 pixels
    voxel: float = 0.1  # m, side of a voxel of the correspondence score
    radius: float = 0.1  # m, distance within which a retrieved token is correct
    max_depth: float = 10.0  # m, depth beyond it counts as unknown
    processes: int = 2  # simulator processes
    seed: int = 0  # of scenes, weights and question sampling
    scene_writer: str = "envs.posed_views.write_scenes"  # dotted path: analysis does not import envs
    episode_writer: str = "envs.posed_views.write_episode"

    def __post_init__(self) -> None:
        if self.prior.name == "none":
            raise ValueError("prior=none leaves nothing to probe; choose a prior, such as prior=wan_tiny")
        if self.prior.clip != "frame":
            raise ValueError(f"probes read single frames (prior.clip=frame); got {self.prior.clip!r}")
        if len(self.prior.layers) > 1:
            raise ValueError(f"probes read one layer at a time; got prior.layer={list(self.prior.layers)}")
        if self.frame_size % STRIDE:
            raise ValueError(f"frame_size must be a multiple of {STRIDE}; got {self.frame_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (gh, gw)."""
        return self.frame_size // STRIDE, self.frame_size // STRIDE


def decode(node: Mapping[str, Any]) -> ProbeSettings:
    """Turn composed and resolved values into settings."""
    from vega_policy.config import from_config  # loads draccus; `--help` imports this module

    return from_config(ProbeSettings, node)
