"""The whole run behind `scripts/probe_prior.py`: scenes, sweep, questions, pictures, page."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_method

from vega_policy.analysis import report as page
from vega_policy.analysis import report as pictures
from vega_policy.analysis.config import ProbeSettings
from vega_policy.analysis.correspondence import Estimate
from vega_policy.analysis.features import token_geometry
from vega_policy.analysis.linear_probes import (
    BATCH,
    HEADLINE,
    METRICS,
    Reader,
    Readout,
    Setup,
    cache_key,
    prior_readers,
)
from vega_policy.analysis.report import Episode, load_episode, write_recording
from vega_policy.analysis.scenes import TRANSFORMS, read_folder
from vega_policy.analysis.spatial_qa import KINDS, Features
from vega_policy.analysis.spatial_qa_model import (
    AnswerModel,
    AnswerTraining,
    Eyes,
    Looker,
    Reasoning,
    compare,
    question_set,
)
from vega_policy.analysis.sweep import SceneSet, Sweep, comparison_readers, sweep
from vega_policy.data.scenes import Scene, load_scene
from vega_policy.evaluation.videos import encode_video
from vega_policy.model.observation import resize
from vega_policy.priors import has_trained_weights, resolve

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
QUESTION_SHOTS, QUESTION_VIEWS = "overview_and_pan", 4


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage; says when it begins and when it is done."""
        logger.info("%s ...", stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 1)
        logger.info("%s: %.0f s", stage, self.seconds[stage])


def run(settings: ProbeSettings) -> Path:
    """Measure, ask, draw, and write the report.

    Returns:
        The page.

    Raises:
        ValueError: If settings do not fit each other.
        FileNotFoundError: If weights or posed frames are missing.
    """
    folder, clock = Path(settings.output_dir), Clock()
    folder.mkdir(parents=True, exist_ok=True)
    with clock("scenes"):
        scenes = measured_scenes(settings)
    with clock("sweep"):
        readers = all_readers(settings)
        default = default_readout(settings, readers[0])
        setup = Setup(settings.grid, settings.voxel, settings.radius)
        found = sweep(scenes, readers, default, setup, Path(settings.cache_root) / "measures")
    with clock("pictures"):
        drawn = draw(folder, settings, scenes, readers, found)
    reasoning = None
    if settings.questions.scenes and settings.scenes.suite:
        with clock("questions"):
            reasoning = answer_questions(settings)
    filmed = {}
    if reasoning is not None and settings.episode.steps:
        with clock("episode"):
            filmed = film_episode(folder, settings, reasoning.model)
    return report(folder, settings, found, len(scenes.scenes), drawn, reasoning, filmed, clock.seconds)


def measured_scenes(settings: ProbeSettings) -> SceneSet:
    """The scenes of the sweep: rendered, or read from folders."""
    wanted = settings.scenes
    if wanted.suite is not None:
        order = _order(settings) | {"count": wanted.count, "views": wanted.views, "shots": "arc"}
        key, scenes = rendered(settings, order | {"frame_size": settings.frame_size})
        return SceneSet(key, scenes, settings.farthest)
    folders = [Path(name) for name in wanted.folders]
    scenes = [read_folder(folder, settings.frame_size, wanted.views) for folder in folders]
    key = cache_key(
        listed=[(folder / TRANSFORMS).read_text() for folder in folders],
        frame_size=settings.frame_size,
        views=wanted.views,
    )
    return SceneSet(key, scenes, settings.farthest)


def rendered(settings: ProbeSettings, order: dict[str, Any]) -> tuple[str, list[Scene]]:
    """Scenes of a suite and the hash that names them, from the cache where they were rendered before."""
    key = cache_key(**order)
    write: Callable[..., list[Path]] = get_method(settings.still_scenes)
    paths = write(Path(settings.cache_root) / f"scenes-{key}", processes=settings.processes, **order)
    return key, [load_scene(path) for path in paths]


def _order(settings: ProbeSettings) -> dict[str, Any]:
    scenes = settings.scenes
    return {
        "suite": scenes.suite,
        "tasks": scenes.tasks,
        "layout": scenes.layout,
        "camera": scenes.camera,
        "rendering": scenes.rendering,
        "seed": settings.seed,
    }


def all_readers(settings: ProbeSettings) -> list[Reader]:
    """The prior first, its untrained copy, then what they are compared with."""
    wanted = settings.sweep
    readers = prior_readers(settings.prior, settings.grid, wanted.layers, wanted.noise_levels)
    compared = comparison_readers(wanted.compare, readers[0], settings.backbone, settings.grid, settings.seed)
    return readers + compared


def default_readout(settings: ProbeSettings, prior: Reader) -> Readout:
    """The readout that a policy would use, or the first of the sweep if the sweep leaves it out."""
    resolved = resolve(settings.prior)
    wanted = Readout(prior.label, resolved.layer, resolved.noise_level)
    return wanted if wanted in prior.readouts else prior.readouts[0]


def untrained(settings: ProbeSettings) -> bool:
    """Whether the prior's weights come from a seed."""
    return not has_trained_weights(settings.prior)


def draw(
    folder: Path, settings: ProbeSettings, scenes: SceneSet, readers: list[Reader], found: Sweep
) -> dict[str, list[Path]]:
    """Feature maps, correspondence lines and heat maps."""
    scene, grid = scenes.scenes[0], settings.grid
    shown = SceneSet(scenes.key, [scene]).pictures()
    maps = {}
    for reader in readers:
        chosen = [readout for readout in found.compared() if readout in reader.readouts]
        maps |= {str(readout): tokens for readout, tokens in reader.read(shown, chosen)}
    paths = {"maps": [folder / "feature_maps.png"], "lines": [folder / "correspondences.png"], "heat": []}
    pictures.draw_feature_maps(paths["maps"][0], scene.views, maps, grid)
    geometry = token_geometry(scene.views, grid, farthest=settings.farthest)
    places = {name: tokens for name, tokens in maps.items() if name != "position"}
    pictures.draw_correspondences(paths["lines"][0], scene.views, geometry, places, grid, settings.radius)
    numbers = found.table()
    for name in HEADLINE:
        swept = {readout: row[name] for readout, row in numbers.items() if readout.layer is not None}
        others = {str(readout): row[name] for readout, row in numbers.items() if readout.layer is None}
        if any(np.isfinite(number.value) for number in swept.values()):
            paths["heat"].append(folder / f"sweep_{name}.png")
            pictures.draw_heat_maps(paths["heat"][-1], METRICS[name].title, swept, others)
    return paths


def answer_questions(settings: ProbeSettings) -> Reasoning:
    """Ask about random layouts, train the models, score them on unseen scenes."""
    wanted = settings.questions
    order = {"count": wanted.scenes, "frame_size": wanted.frame_size, "seed": settings.seed + 1}
    order |= {"shots": QUESTION_SHOTS, "views": QUESTION_VIEWS, "layout": "random"}
    key, scenes = rendered(settings, _order(settings) | order)
    asked = question_set(scenes, wanted.per_kind, wanted.texts, settings.seed)
    backbone = replace(settings.backbone, depth=wanted.depth, latents=wanted.latents)
    eyes = Eyes(backbone, settings.fusion, wanted.frame_size, QUESTION_VIEWS)
    how = AnswerTraining(
        wanted.steps, wanted.scenes_a_step, wanted.questions_a_scene, wanted.rate, seed=settings.seed
    )
    looker = Looker(scenes, key, wanted.frame_size, Path(settings.cache_root) / "answers")
    return compare(looker, asked, eyes, settings.prior, how)


def film_episode(folder: Path, settings: ProbeSettings, model: AnswerModel) -> dict[str, Path]:
    """Play an episode, film where the fused model trusts the prior, and record it for rerun."""
    wanted, scenes = settings.episode, settings.scenes
    order = asdict(wanted) | {name: getattr(scenes, name) for name in ("suite", "rendering", "camera")}
    order["frame_size"] = settings.frame_size
    path = Path(settings.cache_root) / f"episode-{cache_key(**order)}.npz"
    if not path.is_file():
        get_method(settings.played_episodes)(path, **order)
    episode = load_episode(path)
    gates = gates_of(model, episode)
    if gates is None:
        return {}
    frames = episode.scene.views.frames
    film = np.stack([pictures.gate_over(frame, gate) for frame, gate in zip(frames, gates, strict=True)])
    (folder / "gate.mp4").write_bytes(encode_video(film))
    write_recording(folder / "episode.rrd", episode, gates)
    return {"film": folder / "gate.mp4", "recording": folder / "episode.rrd"}


@torch.no_grad()
def gates_of(model: AnswerModel, episode: Episode) -> np.ndarray | None:
    """Gate of the fused model at each moment, [n gh gw]; None where the fusion has none."""
    eyes = model.eyes
    if eyes.prior is None:
        return None
    frames = torch.from_numpy(episode.scene.views.frames).permute(0, 3, 1, 2).float() / 255
    frames = resize(frames, eyes.config.frame_size, eyes.config.frame_size)[:, None]
    gates = []
    for part in frames.split(BATCH):
        seen = Features(eyes.backbone.encode(part), eyes.prior(part[:, :, None]).float())
        model.see(seen, [episode.instruction] * len(part))
        if eyes.gate is None:
            return None
        gates.append(eyes.gate.reshape(len(part), *eyes.backbone.grid))
    return torch.cat(gates).numpy()


def report(
    folder: Path,
    settings: ProbeSettings,
    found: Sweep,
    scenes: int,
    drawn: dict[str, list[Path]],
    reasoning: Reasoning | None,
    filmed: dict[str, Path],
    seconds: dict[str, float],
) -> Path:
    """Write the numbers as JSON and the page."""
    said = page.verdict(found, untrained(settings), scenes)
    summary = {"verdict": said, "scenes": scenes, "seconds": seconds, "readouts": _plain(found)}
    if reasoning is not None:
        summary["answers"] = _plain_answers(reasoning)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    sections = {
        "Does training help?": page.paragraph(said, "verdict"),
        f"Geometry in {scenes} scenes": page.main_table(found),
        "The prior against the others, scene by scene": page.gains_table(found),
        "Sweep over layers and noise levels": page.pictures(folder, drawn["heat"]) + page.best_table(found),
        "Features": page.pictures(folder, drawn["maps"], "First three principal components as colours."),
        "Correspondence": page.pictures(
            folder, drawn["lines"], "Centred tokens; green: within the radius of the point, red: elsewhere."
        ),
    }
    if reasoning is not None:
        sections["Spatial questions"] = page.answers_table(reasoning.answers)
        sections["Examples"] = page.examples(reasoning.questions)
    if filmed:
        words = (
            "Gate of the fused model that answers the questions, over a demonstrated episode: yellow where "
            "it takes the prior's token, blue where the semantic one. Recording: "
            f"rerun {filmed['recording'].name}"
        )
        sections["Where is the prior trusted?"] = page.film(folder, filmed["film"], words)
    values = {**asdict(settings), "seconds": seconds}
    sections["Settings"] = page.settings_table(values)
    return page.write_page(folder, f"{settings.prior.name} on {settings.scenes.name}", sections)


def _plain(found: Sweep) -> list[dict[str, Any]]:
    return [
        {**asdict(readout), **{name: _triple(number) for name, number in row.items()}}
        for readout, row in found.table().items()
    ]


def _plain_answers(reasoning: Reasoning) -> dict[str, Any]:
    answers = reasoning.answers
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in answers.questions)]
    rows = {
        name: {kind or "mean": _triple(answers.row(name, kind)) for kind in [None, *kinds]}
        for name in answers.scores
    }
    gain = {kind or "mean": _triple(answers.gain("fused", "semantic only", kind)) for kind in [None, *kinds]}
    return {"scores": rows, "fused minus semantic only": gain, "losses": answers.losses}


def _triple(number: Estimate) -> list[float | None]:
    return [None if np.isnan(x) else round(x, 5) for x in (number.value, number.low, number.high)]
