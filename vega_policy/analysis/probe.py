"""One probe run: scenes, sweep, figures, spatial questions, and the report.

The report has a verdict and tables, figures of features and metrics, a gate video and a rerun recording. With
measure=future it has tables of what was read out of demonstrations.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from hydra.utils import get_method
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis import ProbeSettings
from vega_policy.analysis.features import (
    BATCH,
    FeatureCache,
    FeatureExtractor,
    Features,
    FeatureSpec,
    baseline_extractors,
    cache_key,
    encode_moments,
    frames_of,
    frames_to_float,
    moment_encoders,
    prior_extractors,
    write_moments,
)
from vega_policy.analysis.geometry import (
    HEADLINE,
    METRICS,
    TRANSFORMS,
    Measurement,
    SceneSet,
    Sweep,
    TokenGeometry,
    match_tokens,
    read_folder,
    run_sweep,
    token_geometry,
    world_points,
)
from vega_policy.analysis.linear_probes import (
    Estimate,
    Metric,
    Sums,
    format_estimate,
    future_gains,
    future_metrics,
    future_of,
    probe_moments,
)
from vega_policy.analysis.spatial_qa import (
    QuestionSet,
    examples_table,
    held_out_table,
    make_question_set,
    qa_table,
    seed_gains_table,
)
from vega_policy.analysis.spatial_qa_model import (
    FUSED_PAIRS,
    QUESTION_PAIRS,
    QAComparison,
    QATraining,
    SpatialQAModel,
    compare_arms,
    compare_models,
    qa_model_config,
    question_arms,
)
from vega_policy.data.scenes import Demonstration, Scene, Views, load_scene
from vega_policy.evaluation.policies import choose_device
from vega_policy.evaluation.report import (
    Block,
    Figure,
    Paragraph,
    Section,
    Table,
    encode_video,
    render_report,
)
from vega_policy.model.config import ModelConfig
from vega_policy.model.observation import resize
from vega_policy.priors import has_trained_weights, resolve
from vega_policy.run_dir import atomic_file, write_bytes, write_json, write_text

logger = logging.getLogger(__name__)

PAGE, SUMMARY, ANSWERS = "report.html", "summary.json", "answers.parquet"
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
    if settings.measure != "space":
        return {"future": run_future, "questions": run_questions}[settings.measure](settings)
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
            cache, questions, config, training = prepare_questions(settings)
            comparison = compare_models(cache, questions, config, settings.prior, training)
        if settings.episode.steps:
            with _timed("episode", seconds):
                has_video = record_gate(folder, settings, comparison.model)
    statement = verdict(sweep, not has_trained_weights(settings.prior), len(scenes.scenes))
    summary = {"verdict": statement, "scenes": len(scenes.scenes), "seconds": seconds}
    summary["features"] = [
        {**asdict(spec), **{name: number.rounded() for name, number in row.items()}}
        for spec, row in sweep.table().items()
    ]
    if comparison is not None:
        summary["answers"] = comparison.scores.summarize(FUSED_PAIRS)
    write_json(folder / SUMMARY, summary)
    sections = [Section("Does training help?", [Paragraph(statement, "verdict")])]
    sections += _sweep_sections(sweep, figures, len(scenes.scenes))
    sections += _question_sections(comparison, has_video)
    values = {**asdict(settings), "seconds": seconds}
    sections.append(Section("Settings", [Table(("setting", "value"), list(values.items()))]))
    title = f"{settings.prior.name} on {settings.scenes.name}"
    write_text(folder / PAGE, render_report(title, sections))
    return folder / PAGE


def run_future(settings: ProbeSettings) -> Path:
    """Read out of demonstrations what happens next, and write the report; return its page.

    Raises:
        FileNotFoundError: If weights or demonstrations are missing.
        ValueError: If there are too few demonstrations.
    """
    folder, seconds, found = Path(settings.output_dir), {}, {}
    with _timed("demonstrations", seconds):
        key, files = write_moments(settings)
    for encoder in moment_encoders(settings):
        with _timed(encoder.name, seconds):
            cache = Path(settings.cache_root) / "moments"
            encoded = [encode_moments(encoder, file, key, settings.future.grid, cache) for file in files]
        with _timed(f"probes of {encoder.name}", seconds):
            episodes = [one for demonstrations, _ in encoded for one in demonstrations]
            features = [part for _, parts in encoded for part in parts]
            if not found:  # what needs no image, once
                found |= probe_moments(settings.future, None, episodes, "")
            found |= probe_moments(settings.future, features, episodes, encoder.name)
    write_json(folder / SUMMARY, summarize_future(settings, found, episodes, seconds))
    metrics, moments = future_metrics(settings.future.horizons), sum(len(one.steps) for one in episodes)
    sections = []
    for unit in ("episodes", "tasks"):
        rows = {row: sums for (split, row), sums in found.items() if split == unit}
        title = f"Held-out {unit}: {moments} moments of {len(episodes)} episodes"
        sections.append(Section(title, list(future_tables(rows, metrics))))
        for table in future_tables(rows, metrics):
            _log_table(title, table)
    values = {**asdict(settings), "seconds": seconds}
    sections.append(Section("Settings", [Table(("setting", "value"), list(values.items()))]))
    write_text(folder / PAGE, render_report(f"The future in {settings.prior.name}", sections))
    return folder / PAGE


def _log_table(title: str, table: Table) -> None:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    logger.info("%s\n%s", title, "\n".join(f"| {' | '.join(line)} |" for line in lines))


def future_tables(rows: Mapping[str, Sums], metrics: Mapping[str, Metric]) -> list[Table]:
    """Return a table of all rows, and one of the gains of each reading of a future."""
    values = {row: {key: metric.value(x) for key, metric in metrics.items()} for row, x in rows.items()}
    gains = future_gains(rows, metrics)
    tables = {"features": values} | {f"{first} better than": others for first, others in gains.items()}
    return [
        Table(
            (title, *(metric.title for metric in metrics.values())),
            [(row, *map(format_estimate, numbers.values())) for row, numbers in table.items()],
        )
        for title, table in tables.items()
    ]


def summarize_future(
    settings: ProbeSettings,
    found: Mapping[tuple[str, str], Sums],
    episodes: list[Demonstration],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Return the content of summary.json: metrics of all rows and gains, each with its interval."""
    horizons, moved = settings.future.horizons, settings.future.moved
    movers = Counter(kind for one in episodes for kind in future_of(one, horizons, moved).mover)
    names = ("prior", "backbone", "future", "frame_size", "seed")
    summary = {
        "settings": {name: asdict(settings)[name] for name in names},
        "episodes": [one.name for one in episodes],
        "moments": sum(len(one.steps) for one in episodes),
        "movers": dict(movers.most_common()),
        "seconds": seconds,
    }
    metrics = future_metrics(horizons)
    for unit in dict.fromkeys(split for split, _ in found):
        rows = {row: sums for (split, row), sums in found.items() if split == unit}
        values = {row: {key: m.value(x).rounded() for key, m in metrics.items()} for row, x in rows.items()}
        gains = {
            first: {other: {key: x.rounded() for key, x in part.items()} for other, part in others.items()}
            for first, others in future_gains(rows, metrics).items()
        }
        summary[f"held_out_{unit}"] = {"rows": values, "gains": gains}
    return summary


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
    spec = FeatureSpec(prior.name, resolved.layers[0], resolved.noise_level)
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
    draw_feature_maps(folder / "feature_maps.png", scene.views, maps, grid)
    geometry = token_geometry(scene.views, grid, max_depth=settings.max_depth)
    maps.pop("position", None)
    lines = folder / "correspondences.png"
    draw_correspondences(lines, scene.views, geometry, maps, grid, settings.radius)
    heat_maps, numbers = [], sweep.table()
    for name in HEADLINE:
        swept = {spec: row[name] for spec, row in numbers.items() if spec.layer is not None}
        others = {str(spec): row[name] for spec, row in numbers.items() if spec.layer is None}
        if any(np.isfinite(number.value) for number in swept.values()):
            image, title = f"sweep_{name}.png", METRICS[name].title
            draw_heat_maps(folder / image, title, swept, others)
            heat_maps.append(Figure(f"{title} by layer and noise level", image=image))
    captions = {
        "feature_maps.png": "First three principal components as colours.",
        lines.name: "Centred tokens; green: within the radius of the point, red: elsewhere.",
    }
    images: list[list[Block]] = [[Figure(caption, image=image)] for image, caption in captions.items()]
    return {"features": images[0], "correspondence": images[1], "sweep": heat_maps}


def prepare_questions(
    settings: ProbeSettings,
) -> tuple[FeatureCache, QuestionSet, ModelConfig, QATraining]:
    """Render random layouts, generate questions; return also how models are built and trained."""
    device = choose_device(settings.device if settings.measure == "questions" else "cpu")
    questions = settings.questions
    spec = {"count": questions.scenes, "frame_size": questions.frame_size, "seed": settings.seed + 1}
    spec |= {"shots": QUESTION_SHOTS, "views": QUESTION_VIEWS, "layout": "random"}
    key, scenes = render_scenes(settings, spec)
    limits = (questions.max_per_kind, questions.max_texts, settings.seed)
    question_set = make_question_set(scenes, *limits)
    backbone = replace(settings.backbone, depth=questions.depth, latents=questions.latents)
    config = qa_model_config(backbone, settings.fusion, questions.frame_size, QUESTION_VIEWS)
    training = QATraining(
        steps=questions.steps,
        scenes=questions.scenes_per_step,
        questions=questions.questions_per_scene,
        learning_rate=questions.learning_rate,
        dropout=questions.dropout,
        seed=settings.seed,
    )
    folder = Path(settings.cache_root) / "answers"
    cache = FeatureCache(scenes, key, questions.frame_size, folder, torch.device(device))
    return cache, question_set, config, training


def run_questions(settings: ProbeSettings) -> Path:
    """Train models with and without the prior to answer spatial questions; write the report, return its page.

    Every answer to a test question goes to answers.parquet.

    Raises:
        ValueError: If `questions.arms` names an arm that there is not.
    """
    folder, seconds, future = Path(settings.output_dir), {}, None
    if settings.questions.future_path is not None:
        path, layers = settings.questions.future_path, tuple(settings.questions.future_layers)
        future = replace(settings.prior, path=path, clip="future", layer=layers, noise_level=None)
    arms = question_arms(settings.prior, future, settings.questions.arms)
    with _timed("scenes", seconds):
        cache, questions, config, training = prepare_questions(settings)
    with _timed("models", seconds):
        scores = compare_arms(cache, questions, config, arms, training, settings.questions.seeds)
    table, note = qa_table(scores, QUESTION_PAIRS)
    by_seed = {
        "Gain of each training seed": seed_gains_table(scores, QUESTION_PAIRS),
        "Held-out loss of each training seed": held_out_table(scores),
    }
    for title, part in {"Spatial questions": table, **by_seed}.items():
        _log_table(title, part)
    write_bytes(folder / ANSWERS, scores.to_parquet())
    count = {"scenes": len(cache.scenes), "training": len(questions.train), "test": len(questions.test)}
    values = {"settings": asdict(settings.questions), "questions": count, "seconds": seconds}
    values["device"] = cache.device.type
    write_json(folder / SUMMARY, values | scores.summarize(QUESTION_PAIRS))
    sections = [
        Section("Spatial questions", [table, note]),
        *(Section(title, [part]) for title, part in by_seed.items()),
        Section("Examples", [examples_table(questions)]),
        Section("Settings", [Table(("setting", "value"), list({**asdict(settings), **values}.items()))]),
    ]
    write_text(folder / PAGE, render_report(f"Spatial questions, {settings.prior.name}", sections))
    return folder / PAGE


def record_gate(folder: Path, settings: ProbeSettings, model: SpatialQAModel) -> bool:
    """Record an episode with the fused model's gate, as video and for rerun; return False without a gate."""
    scenes = settings.scenes
    spec = asdict(settings.episode) | {"frame_size": settings.frame_size}
    spec |= {"suite": scenes.suite, "rendering": scenes.rendering, "camera": scenes.camera}
    path = Path(settings.cache_root) / f"episode-{cache_key(**spec)}.npz"
    if not path.is_file():
        get_method(settings.episode_writer)(path, **spec)
    episode = load_episode(path)
    gates = compute_gates(model, episode)
    if gates is None:
        return False
    frames = episode.scene.views.frames
    video = np.stack([overlay_gate(frame, gate) for frame, gate in zip(frames, gates, strict=True)])
    write_bytes(folder / GATE_VIDEO, encode_video(video))
    write_recording(folder / RECORDING, episode, gates)
    return True


@torch.no_grad()
def compute_gates(model: SpatialQAModel, episode: Episode) -> np.ndarray | None:
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
        Section(f"Geometry in {scenes} scenes", metrics_table(sweep)),
        Section("The prior against the others, scene by scene", [gains_table(sweep)]),
        Section(
            "Sweep over layers and noise levels",
            [*figures["sweep"], *best_table(sweep)],
        ),
        Section("Features", figures["features"]),
        Section("Correspondence", figures["correspondence"]),
    ]


def _question_sections(comparison: QAComparison | None, has_video: bool) -> list[Section]:
    if comparison is None:
        return []
    sections = [
        Section("Spatial questions", qa_table(comparison.scores, FUSED_PAIRS)),
        Section("Examples", [examples_table(comparison.questions)]),
    ]
    if has_video:
        caption = (
            "Gate of the fused model that answers the questions, over a demonstrated episode: yellow where "
            f"it takes the prior's token, blue where the semantic one. Recording: rerun {RECORDING}"
        )
        sections.append(Section("Where does the fusion use the prior?", [Figure(caption, video=GATE_VIDEO)]))
    return sections


def verdict(sweep: Sweep, is_untrained: bool, scenes: int) -> str:
    """State, from the intervals, on which metrics the trained prior differs from its untrained copy."""
    name = sweep.default.encoder
    if is_untrained:
        return (
            f"The weights of {name} are untrained (drawn from a seed), so nothing follows about training; "
            "set prior.path=FOLDER to compare trained weights with an untrained copy."
        )
    copy = sweep.untrained_copy()
    if copy is None:
        return f"There is no untrained copy of {name}: copies are built of Wan priors."
    if scenes < 2:
        return "One scene gives no intervals, so nothing follows about training."
    gains = sweep.gains(copy)
    groups = {
        "is better than its untrained copy on": [n for n, g in gains.items() if g.low > 0],
        "is worse than it on": [n for n, g in gains.items() if g.high < 0],
        "shows no difference on": [n for n, g in gains.items() if g.low <= 0 <= g.high],
    }
    parts = [
        f"{words} {', '.join(METRICS[n].title for n in names)}" for words, names in groups.items() if names
    ]
    return f"At {sweep.default} the trained prior {'; '.join(parts)} (95% intervals over {scenes} scenes)."


def metrics_table(sweep: Sweep) -> list[Block]:
    """Return all metrics of the prior's default features, its copy's and the baselines'."""
    numbers = sweep.table()
    rows = [(str(s), *(format_estimate(numbers[s][name]) for name in METRICS)) for s in sweep.main_specs()]
    note = (
        "95% bootstrap intervals over scenes; probes are tested on held-out scenes. Correspondence is "
        "VEGA-3D's score, which rises with any component common to all tokens: compare it with its chance "
        "level and with the centred score."
    )
    header = ("features", *(metric.title for metric in METRICS.values()))
    return [Table(header, rows), Paragraph(note, "quiet")]


def gains_table(sweep: Sweep) -> Table:
    """Return paired differences of the prior to all other features."""
    others = [spec for spec in sweep.main_specs() if spec != sweep.default]
    rows = [(str(other), *map(format_estimate, sweep.gains(other).values())) for other in others]
    return Table((f"{sweep.default} minus", *(METRICS[name].title for name in HEADLINE)), rows)


def best_table(sweep: Sweep) -> list[Block]:
    """Return the layer and noise level at which each headline metric is best."""
    numbers, rows = sweep.table(), []
    for name in HEADLINE:
        values = {spec: row[name] for spec, row in numbers.items() if spec.layer is not None}
        known = [spec for spec, number in values.items() if math.isfinite(number.value)]
        if known:
            best = max(known, key=lambda spec, v=values: v[spec].value)
            rows.append((METRICS[name].title, str(best), format_estimate(values[best])))
    note = "The best is selected on the scenes it is evaluated on, so its value is biased upwards."
    return [Table(("metric", "best features", "value"), rows), Paragraph(note, "quiet")]


MAX_LINES = 24  # correspondence lines in one image
CORRECT, WRONG = "#2ca02c", "#d62728"


def principal_colours(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Map the first three principal components to red, green and blue, [n t d] -> [n gh gw 3] in [0, 1].

    Each component runs from its 2nd to its 98th percentile.
    """
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(dim=0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    parts = flat @ axes[:3].T
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    scaled = ((parts - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    colours = torch.zeros(len(flat), 3, dtype=scaled.dtype)
    colours[:, : scaled.shape[1]] = scaled
    return colours.reshape(len(tokens), *grid, 3).numpy()


def draw_feature_maps(
    path: Path, views: Views, maps: Mapping[str, Tensor], grid: tuple[int, int], columns: int = 4
) -> None:
    """Draw frames of one scene in the first row and each encoder's principal components below, as PNG.

    `maps` holds tokens [n t d] by title; at most `columns` views are drawn.
    """
    columns = min(columns, len(views))
    figure = matplotlib.figure.Figure(figsize=(2.2 * columns, 2.3 * (len(maps) + 1)), layout="constrained")
    axes = figure.subplots(len(maps) + 1, columns, squeeze=False)
    rows = {"frame": views.frames} | {name: principal_colours(part, grid) for name, part in maps.items()}
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=8)
    _save(figure, path)


def draw_correspondences(
    path: Path,
    views: Views,
    geometry: TokenGeometry,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    radius: float,
) -> None:
    """Draw lines from tokens of one view to the most similar ones of the next, as PNG.

    A match within `radius` (m) is green, another one red. The middle two views are drawn; `maps` holds tokens
    [n t d] by title.
    """
    left = max(0, len(views) // 2 - 1)
    figure = matplotlib.figure.Figure(figsize=(7, 3.6 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    height, width = views.frames.shape[1:3]
    cell = np.array([width / grid[1], height / grid[0]])
    for axis, (title, tokens) in zip(axes, maps.items(), strict=True):
        first, second, is_correct = match_tokens(tokens[left : left + 2], geometry, left, radius)
        axis.imshow(np.concatenate(list(views.frames[left : left + 2]), axis=1))
        axis.set_axis_off()
        count = min(MAX_LINES, len(first))
        for index in np.linspace(0, max(0, len(first) - 1), count).round().astype(int):
            start, end = (
                (np.array([int(side[index]) % grid[1], int(side[index]) // grid[1]]) + 0.5) * cell
                for side in (first, second)
            )
            colour = CORRECT if is_correct[index] else WRONG
            axis.plot([start[0], end[0] + width], [start[1], end[1]], color=colour, linewidth=0.9, marker=".")
        fraction = float(is_correct.double().mean()) if len(is_correct) else float("nan")
        axis.set_title(f"{title}: {100 * fraction:.0f}% of {len(first)} points found", fontsize=9)
    _save(figure, path)


def draw_heat_maps(
    path: Path, title: str, numbers: Mapping[FeatureSpec, Estimate], others: Mapping[str, Estimate]
) -> None:
    """Draw one metric over layers and noise levels as PNG, a map for each prior, baselines in the title."""
    encoders = list(dict.fromkeys(spec.encoder for spec in numbers))
    figure = matplotlib.figure.Figure(figsize=(1.5 + 4.2 * len(encoders), 4.2), layout="constrained")
    axes = figure.subplots(1, len(encoders), squeeze=False)[0]
    finite = [number.value for number in [*numbers.values(), *others.values()] if np.isfinite(number.value)]
    low, high = (max(-0.2, min(finite)), max(finite)) if finite else (0.0, 1.0)
    for axis, encoder in zip(axes, encoders, strict=True):
        layers = sorted({s.layer for s in numbers if s.encoder == encoder and s.layer is not None})
        levels = sorted(
            {s.noise_level for s in numbers if s.encoder == encoder and s.noise_level is not None}
        )
        table = np.array(
            [[numbers[FeatureSpec(encoder, layer, level)].value for level in levels] for layer in layers]
        )
        image = axis.imshow(table, vmin=low, vmax=high, cmap="viridis", aspect="auto", origin="lower")
        axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set(xlabel="noise level", ylabel="layer", title=encoder)
        for (row, column), number in np.ndenumerate(table):
            colour = "w" if number < (low + high) / 2 else "k"
            axis.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=axis, shrink=0.8)
    baselines = "   ".join(f"{name} {number.value:.2f}" for name, number in others.items())
    figure.suptitle(f"{title}\n{baselines}", fontsize=9)
    _save(figure, path)


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    with atomic_file(path) as draft:
        figure.savefig(draft, format="png", dpi=110)


def overlay_gate(frame: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """Return a frame beside itself under its gate, [h w 3] uint8 and [gh gw] in [0, 1] -> [h 2w 3] uint8.

    Yellow is where the fusion takes the prior's token (gate near 0), blue where it takes the semantic one.
    """
    height, width = frame.shape[:2]
    maps = torch.from_numpy(1 - gate)[None, None].float()
    smooth = functional.interpolate(maps, (height, width), mode="bilinear")[0, 0].numpy()
    colours = matplotlib.colormaps["cividis"](smooth.clip(0, 1))[..., :3] * 255
    overlay = (0.45 * frame + 0.55 * colours).round().astype(np.uint8)
    return np.concatenate([frame, overlay], axis=1)


APPLICATION = "vega_policy"
PIXEL_STRIDE = 2  # every second row and column goes into the point cloud
MAX_DISTANCE = 2.5  # m; farther points are left out of the cloud


@dataclass(frozen=True)
class Episode:
    """Frames, actions and instruction of an episode."""

    scene: Scene  # its views are frames of the episode in time
    actions: np.ndarray  # of all steps, [t a]
    steps: np.ndarray  # step of each view, [n]
    instruction: str


def load_episode(path: Path) -> Episode:
    """Read what `envs.posed_views.write_episode` wrote."""
    with np.load(path.with_suffix(".actions.npz")) as stored:
        instruction = str(stored["instruction"])
        return Episode(load_scene(path), stored["actions"], stored["moments"], instruction)


def write_recording(path: Path, episode: Episode, gates: np.ndarray) -> None:
    """Write an episode with its gates [n gh gw] in [0, 1] as an `.rrd` file, to be opened by `rerun PATH`.

    Raises:
        ValueError: If there is not one gate per view.
        ImportError: If rerun is missing.
    """
    rerun = _load_rerun()
    views = episode.scene.views
    if len(gates) != len(views):
        raise ValueError(f"expected the gate of each of {len(views)} views, got {len(gates)}")
    recording = rerun.RecordingStream(APPLICATION)
    recording.save(path)
    recording.log("instruction", rerun.TextDocument(episode.instruction), static=True)
    points = world_points(
        *(torch.from_numpy(part).double() for part in (views.depth, views.intrinsics, views.poses))
    ).numpy()
    for index, step in enumerate(episode.steps.tolist()):
        recording.set_time("step", sequence=step)
        near = (views.depth[index] > 0) & (views.depth[index] < MAX_DISTANCE)
        near[np.arange(len(near)) % PIXEL_STRIDE > 0] = False
        near[:, np.arange(near.shape[1]) % PIXEL_STRIDE > 0] = False
        cloud = rerun.Points3D(points[index][near], colors=views.frames[index][near], radii=0.004)
        recording.log("world/points", cloud)
        recording.log("frame", rerun.Image(views.frames[index]))
        recording.log("gate/map", rerun.Image((255 * gates[index]).round().astype(np.uint8)))
        recording.log("gate/mean", rerun.Scalars(float(gates[index].mean())))
    for step, action in enumerate(episode.actions):
        recording.set_time("step", sequence=step)
        for axis, number in enumerate(action):
            recording.log(f"action/{axis}", rerun.Scalars(float(number)))
    recording.flush()


def _load_rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise ImportError(
            "recordings need rerun-sdk: pip install 'lerobot[viz]', or record none with episode.steps=0"
        ) from error
    return rerun
