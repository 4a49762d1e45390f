"""What one run of the probes is asked to do: frozen values, decoded from a composed Hydra config."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

import draccus
from draccus.utils import ParsingError

from vega_policy.model.config import STRIDE, BackboneConfig, FusionConfig, PriorConfig

COMPARED = ("semantic", "vae", "random", "pixels", "position")
"""Readers beside the prior."""


@dataclass(frozen=True)
class SceneSettings:
    """Where the scenes come from: a suite of our simulators, or folders in nerfstudio's layout.

    Attributes:
        name: What the scenes are called in reports.
        suite: A robosuite or LIBERO suite; None reads `folders`.
        folders: Folders of posed RGB-D frames, each one scene.
        tasks: Tasks of the suite between which scenes are dealt.
        count: Scenes of the suite.
        layout: `random` (objects anywhere on the table, some absent) or `task` (as each task draws them).
        views: Views a scene; of a folder, at most so many frames.
        camera: The simulation's camera about which views are taken.
        rendering: Rendering profile, `full` or `fast`.
    """

    name: str
    suite: str | None = None
    folders: list[str] = field(default_factory=list)
    tasks: list[int] = field(default_factory=lambda: [0, 1])
    count: int = 24
    layout: str = "random"
    views: int = 6
    camera: str = "agentview"
    rendering: str = "fast"

    def __post_init__(self) -> None:
        if (self.suite is None) == (not self.folders):
            raise ValueError(
                "scenes: expected either a suite or folders of posed frames (scenes=folder "
                f"'scenes.folders=[PATH]'); got suite {self.suite!r} and folders {self.folders}"
            )


@dataclass(frozen=True)
class SweepSettings:
    """What is read.

    Attributes:
        layers: Layers of the prior; None takes all of a Wan, the default of other priors.
        noise_levels: Noise levels in [0, 1]; None takes the prior's default.
        compare: What the prior is held against, of semantic, vae, random, pixels, position.
    """

    layers: list[int] | None = None
    noise_levels: list[float] | None = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
    compare: list[str] = field(default_factory=lambda: list(COMPARED))

    def __post_init__(self) -> None:
        wrong = [level for level in self.noise_levels or [] if not 0 <= level <= 1]
        if wrong:
            raise ValueError(f"sweep.noise_levels lie in [0, 1]; got {wrong}")


@dataclass(frozen=True)
class QuestionSettings:
    """Which questions are asked, and how their answers are learned.

    Attributes:
        scenes: Scenes that are asked about; 0 asks nothing. Folders have no things to ask about.
        frame_size: Side of the frames in pixels.
        per_kind: Most training questions of one type.
        texts: Most different texts of one type.
        steps: Optimizer steps of each model.
        scenes_a_step: Scenes a step.
        questions_a_scene: Questions about each of them.
        rate: Peak learning rate.
        depth: Trunk blocks of the backbone that answers; the head looks things up in what it gives.
        latents: Latents into which its views are resampled; None keeps all tokens, to be looked up.
    """

    scenes: int = 240
    frame_size: int = 128
    per_kind: int = 1500
    texts: int = 60
    steps: int = 400
    scenes_a_step: int = 16
    questions_a_scene: int = 12
    rate: float = 1e-3
    depth: int = 0
    latents: int | None = None


@dataclass(frozen=True)
class EpisodeSettings:
    """The episode that is filmed with the gate of the model that answers questions.

    Attributes:
        steps: Steps after which it is cut; 0 films nothing.
        task: Index of the task.
        seed: Seed of the episode.
        every: Steps from one picture to the next.
    """

    steps: int = 160
    task: int = 0
    seed: int = 0
    every: int = 4


@dataclass(frozen=True)
class ProbeSettings:
    """One run of the probes.

    Attributes:
        prior: The prior that is probed.
        fusion: Fusion of the model that answers questions.
        backbone: Its backbone; its image encoder is the semantic comparison.
        scenes: Where scenes come from.
        sweep: What is read.
        questions: What is asked.
        episode: What is filmed.
        output_dir: Folder of the report.
        cache_root: Folder of scenes and numbers that were computed before.
        frame_size: Side of the frames in pixels; a multiple of 16, one token for 16x16 pixels.
        voxel: Side of a voxel of the correspondence score (m).
        radius: How far a retrieved token may lie from the point (m).
        farthest: Depth beyond which a pixel counts as unknown (m).
        processes: Simulator processes.
        seed: Of scenes, weights and draws.
        still_scenes: Function that writes scenes of a suite, by dotted path.
        played_episodes: Function that writes an episode of a suite, by dotted path.
    """

    prior: PriorConfig
    backbone: BackboneConfig
    scenes: SceneSettings
    output_dir: str
    fusion: FusionConfig = field(default_factory=FusionConfig)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    episode: EpisodeSettings = field(default_factory=EpisodeSettings)
    cache_root: str = "outputs/cache/analysis"
    frame_size: int = 224
    voxel: float = 0.1
    radius: float = 0.1
    farthest: float = 10.0
    processes: int = 2
    seed: int = 0
    still_scenes: str = "envs.posed_views.write_scenes"
    played_episodes: str = "envs.posed_views.write_episode"

    def __post_init__(self) -> None:
        if self.prior.name == "none":
            raise ValueError("prior=none leaves nothing to probe; choose a prior, such as prior=wan_tiny")
        if self.prior.clip != "frame":
            raise ValueError(f"probes read single frames (prior.clip=frame); got {self.prior.clip!r}")
        if self.frame_size % STRIDE:
            raise ValueError(f"frame_size must be a multiple of {STRIDE}; got {self.frame_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (gh, gw)."""
        return self.frame_size // STRIDE, self.frame_size // STRIDE


def decode(node: Mapping[str, Any]) -> ProbeSettings:
    """Turn composed and resolved values into settings.

    Raises:
        ValueError: If a key is unknown or a value does not fit its field.
    """
    _refuse_missing_groups(node)
    try:
        return draccus.decode(ProbeSettings, dict(node))
    except ParsingError as error:
        raise ValueError(f"Config: {error.__cause__ or error}") from error


def _refuse_missing_groups(node: Mapping[str, Any]) -> None:
    off = {"questions": "; questions.scenes=0 asks nothing", "episode": "; episode.steps=0 films nothing"}
    for name, owner in get_type_hints(ProbeSettings).items():
        if is_dataclass(owner) and not isinstance(node.get(name, {}), Mapping):
            known = ", ".join(one.name for one in fields(owner))
            raise ValueError(
                f"{name}: expected a group of fields ({known}); got {node[name]!r}. Leave {name} out, or set "
                f"fields of it, such as {name}.{fields(owner)[0].name}=...{off.get(name, '')}"
            )
