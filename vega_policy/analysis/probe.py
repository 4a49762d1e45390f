"""One probe run, behind the command `vega-probe`: scenes, sweep, figures, spatial questions, report."""

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

from vega_policy.analysis import report
from vega_policy.analysis.config import ProbeSettings
from vega_policy.analysis.correspondence import Estimate
from vega_policy.analysis.features import (
    BATCH,
    FeatureCache,
    FeatureExtractor,
    FeatureSpec,
    baseline_extractors,
    cache_key,
    frames_of,
    frames_to_float,
    prior_extractors,
)
from vega_policy.analysis.linear_probes import HEADLINE, METRICS, Measurement, SceneSet, Sweep, run_sweep
from vega_policy.analysis.scenes import TRANSFORMS, read_folder, token_geometry
from vega_policy.analysis.spatial_qa import make_question_set
from vega_policy.analysis.spatial_qa_model import (
    Features,
    QAComparison,
    QAScores,
    QATraining,
    SpatialQAModel,
    compare_models,
    qa_model_config,
)
from vega_policy.data.scenes import Scene, load_scene
from vega_policy.evaluation.videos import encode_video
from vega_policy.html_report import Block, Figure, Paragraph, Section, Table, render_report
from vega_policy.model.observation import resize
from vega_policy.priors import has_trained_weights, resolve
from vega_policy.run_dir import write_bytes, write_json, write_text

logger = logging.getLogger(__name__)

PAGE, SUMMARY = "report.html", "summary.json"
GATE_VIDEO, RECORDING = "gate.mp4", "episode.rrd"
QUESTION_SHOTS, QUESTION_VIEWS = "overview_and_pan", 4


def run(settings: ProbeSettings) -> Path:
    """Measure features, train the question-answering models, and write the report.

    Returns:
        The report's page.

    Raises:
        ValueError: If settings do not fit each other.
        FileNotFoundError: If weights or posed frames are missing.
    """
    folder, seconds = Path(settings.output_dir), {}
    with _timed("scenes", seconds):
        scenes = load_scenes(settings)
    with _timed("sweep", seconds):
        extractors = make_extractors(settings)
        default = default_spec(settings, extractors[0])
        measurement = Measurement(settings.grid, settings.voxel, settings.radius)
        sweep = run_sweep(scenes, extractors, default, measurement, Path(settings.cache_root) / "measures")
    with _timed("figures", seconds):
        figures = draw_figures(folder, settings, scenes, extractors, sweep)
    comparison, has_video = None, False
    if settings.questions.scenes and settings.scenes.suite:
        with _timed("questions", seconds):
            comparison = answer_questions(settings)
        if settings.episode.steps:
            with _timed("episode", seconds):
                has_video = record_gate(folder, settings, comparison.model)
    statement = report.verdict(sweep, not has_trained_weights(settings.prior), len(scenes.scenes))
    summary = {"verdict": statement, "scenes": len(scenes.scenes), "seconds": seconds}
    summary["features"] = [
        {**asdict(spec), **{name: _round(number) for name, number in row.items()}}
        for spec, row in sweep.table().items()
    ]
    if comparison is not None:
        summary["answers"] = _summarize_scores(comparison.scores)
    write_json(folder / SUMMARY, summary)
    sections = [Section("Does training help?", [Paragraph(statement, "verdict")])]
    sections += _sweep_sections(sweep, figures, len(scenes.scenes))
    sections += _question_sections(comparison, has_video)
    values = {**asdict(settings), "seconds": seconds}
    sections.append(Section("Settings", [Table(("setting", "value"), list(values.items()))]))
    title = f"{settings.prior.name} on {settings.scenes.name}"
    write_text(folder / PAGE, render_report(title, sections))
    return folder / PAGE


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("%s ...", stage)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)
    logger.info("%s: %.0f s", stage, seconds[stage])


def load_scenes(settings: ProbeSettings) -> SceneSet:
    """Render the scenes of the sweep, or read them from folders."""
    source = settings.scenes
    if source.suite is not None:
        spec = {"count": source.count, "views": source.views, "shots": "arc"}
        spec |= {"layout": source.layout, "frame_size": settings.frame_size, "seed": settings.seed}
        key, scenes = render_scenes(settings, spec)
        return SceneSet(key, scenes, settings.max_depth)
    folders = [Path(name) for name in source.folders]
    scenes = [read_folder(folder, settings.frame_size, source.views) for folder in folders]
    key = cache_key(
        listed=[(folder / TRANSFORMS).read_text() for folder in folders],
        frame_size=settings.frame_size,
        views=source.views,
    )
    return SceneSet(key, scenes, settings.max_depth)


def render_scenes(settings: ProbeSettings, spec: dict[str, Any]) -> tuple[str, list[Scene]]:
    """Render scenes of the suite, or load them from the cache; return the hash that identifies them, too."""
    spec |= {name: getattr(settings.scenes, name) for name in ("suite", "tasks", "camera", "rendering")}
    key = cache_key(**spec)
    write: Callable[..., list[Path]] = get_method(settings.scene_writer)
    paths = write(Path(settings.cache_root) / f"scenes-{key}", processes=settings.processes, **spec)
    return key, [load_scene(path) for path in paths]


def make_extractors(settings: ProbeSettings) -> list[FeatureExtractor]:
    """Return the extractors of the prior, of its untrained copy, and of the baselines."""
    sweep = settings.sweep
    extractors = prior_extractors(settings.prior, settings.grid, sweep.layers, sweep.noise_levels)
    return extractors + baseline_extractors(
        sweep.baselines, extractors[0], settings.backbone, settings.grid, settings.seed
    )


def default_spec(settings: ProbeSettings, prior: FeatureExtractor) -> FeatureSpec:
    """Return the features that a policy would use, or the first of the sweep if it leaves them out."""
    resolved = resolve(settings.prior)
    spec = FeatureSpec(prior.name, resolved.layer, resolved.noise_level)
    return spec if spec in prior.specs else prior.specs[0]


def draw_figures(
    folder: Path,
    settings: ProbeSettings,
    scenes: SceneSet,
    extractors: list[FeatureExtractor],
    sweep: Sweep,
) -> dict[str, list[Block]]:
    """Draw feature maps, correspondence lines and heat maps; return figures by section."""
    scene, grid = scenes.scenes[0], settings.grid
    frames, maps = frames_of([scene]), {}
    for extractor in extractors:
        chosen = [spec for spec in sweep.main_specs() if spec in extractor.specs]
        maps |= {str(spec): tokens for spec, tokens in extractor.extract(frames, chosen)}
    report.draw_feature_maps(folder / "feature_maps.png", scene.views, maps, grid)
    geometry = token_geometry(scene.views, grid, max_depth=settings.max_depth)
    maps.pop("position", None)
    lines = folder / "correspondences.png"
    report.draw_correspondences(lines, scene.views, geometry, maps, grid, settings.radius)
    heat_maps, numbers = [], sweep.table()
    for name in HEADLINE:
        swept = {spec: row[name] for spec, row in numbers.items() if spec.layer is not None}
        others = {str(spec): row[name] for spec, row in numbers.items() if spec.layer is None}
        if any(np.isfinite(number.value) for number in swept.values()):
            image, title = f"sweep_{name}.png", METRICS[name].title
            report.draw_heat_maps(folder / image, title, swept, others)
            heat_maps.append(Figure(f"{title} by layer and noise level", image=image))
    captions = {
        "feature_maps.png": "First three principal components as colours.",
        lines.name: "Centred tokens; green: within the radius of the point, red: elsewhere.",
    }
    images: list[list[Block]] = [[Figure(caption, image=image)] for image, caption in captions.items()]
    return {"features": images[0], "correspondence": images[1], "sweep": heat_maps}


def answer_questions(settings: ProbeSettings) -> QAComparison:
    """Generate questions about random layouts, train the models, score them on unseen scenes."""
    questions = settings.questions
    spec = {"count": questions.scenes, "frame_size": questions.frame_size, "seed": settings.seed + 1}
    spec |= {"shots": QUESTION_SHOTS, "views": QUESTION_VIEWS, "layout": "random"}
    key, scenes = render_scenes(settings, spec)
    question_set = make_question_set(scenes, questions.max_per_kind, questions.max_texts, settings.seed)
    backbone = replace(settings.backbone, depth=questions.depth, latents=questions.latents)
    config = qa_model_config(backbone, settings.fusion, questions.frame_size, QUESTION_VIEWS)
    training = QATraining(
        steps=questions.steps,
        scenes=questions.scenes_per_step,
        questions=questions.questions_per_scene,
        learning_rate=questions.learning_rate,
        seed=settings.seed,
    )
    cache = FeatureCache(scenes, key, questions.frame_size, Path(settings.cache_root) / "answers")
    return compare_models(cache, question_set, config, settings.prior, training)


def record_gate(folder: Path, settings: ProbeSettings, model: SpatialQAModel) -> bool:
    """Record an episode with the fused model's gate, as video and for rerun; return False without a gate."""
    scenes = settings.scenes
    spec = asdict(settings.episode) | {"frame_size": settings.frame_size}
    spec |= {"suite": scenes.suite, "rendering": scenes.rendering, "camera": scenes.camera}
    path = Path(settings.cache_root) / f"episode-{cache_key(**spec)}.npz"
    if not path.is_file():
        get_method(settings.episode_writer)(path, **spec)
    episode = report.load_episode(path)
    gates = compute_gates(model, episode)
    if gates is None:
        return False
    frames = episode.scene.views.frames
    video = np.stack([report.overlay_gate(frame, gate) for frame, gate in zip(frames, gates, strict=True)])
    write_bytes(folder / GATE_VIDEO, encode_video(video))
    report.write_recording(folder / RECORDING, episode, gates)
    return True


@torch.no_grad()
def compute_gates(model: SpatialQAModel, episode: report.Episode) -> np.ndarray | None:
    """Return the fused model's gate for each view of an episode, [n gh gw]; None if the fusion has none."""
    encoder = model.encoder
    if encoder.prior is None:
        return None
    size = encoder.config.frame_size
    frames = resize(frames_to_float(episode.scene.views.frames), size, size)[:, None]
    gates = []
    for part in frames.split(BATCH):
        features = Features(encoder.backbone.encode(part), encoder.prior(part[:, :, None]).float())
        model.fuse(features, [episode.instruction] * len(part))
        if encoder.gate is None:
            return None
        gates.append(encoder.gate.reshape(len(part), *encoder.backbone.grid))
    return torch.cat(gates).numpy()


def _sweep_sections(sweep: Sweep, figures: dict[str, list[Block]], scenes: int) -> list[Section]:
    return [
        Section(f"Geometry in {scenes} scenes", report.metrics_table(sweep)),
        Section("The prior against the others, scene by scene", [report.gains_table(sweep)]),
        Section(
            "Sweep over layers and noise levels",
            [*figures["sweep"], *report.best_table(sweep)],
        ),
        Section("Features", figures["features"]),
        Section("Correspondence", figures["correspondence"]),
    ]


def _question_sections(comparison: QAComparison | None, has_video: bool) -> list[Section]:
    if comparison is None:
        return []
    sections = [
        Section("Spatial questions", report.qa_table(comparison.scores)),
        Section("Examples", [report.examples_table(comparison.questions)]),
    ]
    if has_video:
        caption = (
            "Gate of the fused model that answers the questions, over a demonstrated episode: yellow where "
            f"it takes the prior's token, blue where the semantic one. Recording: rerun {RECORDING}"
        )
        sections.append(Section("Where does the fusion use the prior?", [Figure(caption, video=GATE_VIDEO)]))
    return sections


def _summarize_scores(scores: QAScores) -> dict[str, Any]:
    kinds = {"mean": None} | {kind: kind for kind in scores.kinds}
    means = {
        name: {label: _round(scores.mean(name, kind)) for label, kind in kinds.items()}
        for name in scores.scores
    }
    gain = {label: _round(scores.gain("fused", "semantic only", kind)) for label, kind in kinds.items()}
    return {"scores": means, "fused minus semantic only": gain, "losses": scores.losses}


def _round(number: Estimate) -> list[float | None]:
    return [None if np.isnan(x) else round(x, 5) for x in (number.value, number.low, number.high)]
