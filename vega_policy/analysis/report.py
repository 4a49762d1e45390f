"""The report: one page without scripts that gathers tables, pictures, film and recording."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.correspondence import Estimate
from vega_policy.analysis.features import TokenGeometry
from vega_policy.analysis.linear_probes import HEADLINE, METRICS, Readout
from vega_policy.analysis.scenes import world_points
from vega_policy.analysis.spatial_qa import KINDS
from vega_policy.analysis.spatial_qa_model import WORDS, Answers, QuestionSet
from vega_policy.analysis.sweep import Sweep
from vega_policy.data.scenes import Scene, Views, load_scene

PAGE = "report.html"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1200px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .verdict { font-size: 1.15rem; font-weight: 600; } .quiet { opacity: .75; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
img, video { max-width: 100%; display: block; margin: .5rem 0; }
"""


def verdict(found: Sweep, untrained: bool, scenes: int) -> str:
    """What may be said about the trained prior and its untrained copy, by intervals.

    Args:
        found: All numbers.
        untrained: Whether the probed weights are those of a seed.
        scenes: Number of scenes.
    """
    name = found.default.reader
    if untrained:
        return (
            f"The weights of {name} are untrained (a seed's). Nothing is said about training here; give "
            "prior.path=FOLDER with trained weights to have them compared with an untrained copy."
        )
    twin = found.twin()
    if twin is None:
        return f"There is no untrained copy of {name}: copies are built of Wan priors."
    if scenes < 2:
        return "One scene gives no intervals; whether training helps cannot be said."
    gains = found.gains(twin)
    kinds = {
        "beats its untrained copy on": [n for n, g in gains.items() if g.low > 0],
        "loses to it on": [n for n, g in gains.items() if g.high < 0],
        "shows no difference on": [n for n, g in gains.items() if g.low <= 0 <= g.high],
    }
    told = [
        f"{words} {', '.join(METRICS[n].title for n in names)}" for words, names in kinds.items() if names
    ]
    return f"At {found.default} the trained prior {'; '.join(told)} (95% intervals over {scenes} scenes)."


def write_page(folder: Path, title: str, sections: Mapping[str, str]) -> Path:
    """Write the page.

    Args:
        folder: Folder of the report; pictures are named relative to it.
        title: Heading.
        sections: Heading -> HTML.
    """
    body = "".join(f"<h2>{escape(heading)}</h2>{content}" for heading, content in sections.items() if content)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    path = folder / PAGE
    path.write_text(page)
    return path


def main_table(found: Sweep) -> str:
    """All metrics of the prior at its default place, its copy, and what they are compared with."""
    numbers = found.table()
    rows = [(str(r), *(_cell(numbers[r][name]) for name in METRICS)) for r in found.compared()]
    return table(("reader", *(metric.title for metric in METRICS.values())), rows) + paragraph(
        "95% bootstrap intervals over scenes; probes are tested on held-out scenes. Correspondence is "
        "VEGA-3D's score, which a component common to all tokens raises: read it beside its chance level and "
        "centred."
    )


def gains_table(found: Sweep) -> str:
    """Paired differences of the prior to every other reader."""
    others = [readout for readout in found.compared() if readout != found.default]
    rows = [(str(other), *(_cell(g) for g in found.gains(other).values())) for other in others]
    header = (f"{found.default} minus", *(METRICS[name].title for name in HEADLINE))
    return table(header, rows)


def best_table(found: Sweep) -> str:
    """Where in the sweep each metric is best."""
    numbers, rows = found.table(), []
    swept = [readout for readout in numbers if readout.layer is not None]
    for name in HEADLINE:
        known = [readout for readout in swept if math.isfinite(numbers[readout][name].value)]
        if known:
            best = max(known, key=lambda readout, n=name: numbers[readout][n].value)
            rows.append((METRICS[name].title, str(best), _cell(numbers[best][name])))
    note = "The best of many is picked on the scenes it is told on, so its number flatters it."
    return table(("metric", "best readout", "value"), rows) + paragraph(note)


def answers_table(answers: Answers) -> str:
    """Scores of every model by type."""
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in answers.questions)]
    counts = [sum(question.kind == kind for question in answers.questions) for kind in kinds]
    header = ("model", "mean of types", *(kind.replace("_", " ") for kind in kinds))
    rows = [("test questions", str(sum(counts)), *map(str, counts))]
    rows += [
        (name, _cell(answers.row(name)), *(_cell(answers.row(name, kind)) for kind in kinds))
        for name in answers.scores
    ]
    others = ("semantic only", "fused, random prior", "fused, untrained copy", "fused, blind", WORDS)
    for other in (name for name in others if name in answers.scores):
        gains = [_cell(answers.gain("fused", other, kind)) for kind in kinds]
        rows.append((f"fused minus {other}", _cell(answers.gain("fused", other)), *gains))
    return table(header, rows) + paragraph(
        "Share right for choices, mean relative accuracy for distances and sizes (VSI-Bench), Acc@0.25 for "
        "grounding (ScanRefer); intervals over unseen scenes. Every answer to a text is right equally often, "
        "so that words alone should stay at chance."
    )


def examples(questions: QuestionSet) -> str:
    """One question of each type with its answer."""
    rows = []
    for kind in KINDS:
        asked = [question for question in questions.test if question.kind == kind]
        if asked:
            one = asked[0]
            right = one.choice or (f"{one.number:.1f}" if one.number else "")
            if one.box:
                right = "box at " + ", ".join(f"{number:.2f}" for number in one.box)
            rows.append((kind.replace("_", " "), f"scene {one.scene}: {one.text}", right))
    return table(("type", "question", "answer"), rows)


def pictures(folder: Path, paths: Iterable[Path], words: str = "") -> str:
    """Pictures below each other."""
    shown = [f'<img src="{escape(str(p.relative_to(folder)))}" alt="{escape(p.stem)}">' for p in paths]
    return (paragraph(words) if words else "") + "".join(shown)


def film(folder: Path, path: Path, words: str) -> str:
    """A film with its caption."""
    source = escape(str(path.relative_to(folder)))
    return f'{paragraph(words)}<video src="{source}" controls loop muted></video>'


def settings_table(values: Mapping[str, Any]) -> str:
    """Plain values."""
    return table(("setting", "value"), [(name, str(value)) for name, value in values.items()])


def paragraph(text: str, kind: str = "quiet") -> str:
    """A paragraph of one class."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(number: Estimate) -> str:
    if not math.isfinite(number.value):
        return "\u2013"
    if not math.isfinite(number.low):
        return f"{number.value:.3f}"
    return str(number)


LINES = 24  # correspondence lines in one picture
RIGHT, WRONG = "#2ca02c", "#d62728"


def principal_colours(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """First three principal components of all tokens as red, green and blue.

    Args:
        tokens: [n t d].
        grid: Token grid (gh, gw).

    Returns:
        [n gh gw 3] in [0, 1]; each component runs from its 2nd to its 98th percentile.
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
    """Frames in the first row, each reader's principal components below.

    Args:
        path: PNG file.
        views: Views of one scene.
        maps: Title -> tokens [n t d] of these views.
        grid: Token grid (gh, gw).
        columns: Views shown at most.
    """
    shown = min(columns, len(views))
    figure = Figure(figsize=(2.2 * shown, 2.3 * (len(maps) + 1)), layout="constrained")
    axes = figure.subplots(len(maps) + 1, shown, squeeze=False)
    rows = {"frame": views.frames} | {name: principal_colours(part, grid) for name, part in maps.items()}
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures[:shown], strict=True):
            axis.imshow(picture, interpolation="nearest")
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
    """Lines from tokens of one view to the most similar ones of the next: green within the radius, else red.

    Args:
        path: PNG file.
        views: Views of one scene; the middle two are shown.
        geometry: Their tokens' geometry.
        maps: Title -> tokens [n t d].
        grid: Token grid (gh, gw).
        radius: How far from the point the other token may lie (m).
    """
    left = max(0, len(views) // 2 - 1)
    figure = Figure(figsize=(7, 3.6 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    height, width = views.frames.shape[1:3]
    for axis, (title, tokens) in zip(axes, maps.items(), strict=True):
        first, second, right = match(tokens[left : left + 2], geometry, left, radius)
        axis.imshow(np.concatenate(list(views.frames[left : left + 2]), axis=1))
        axis.set_axis_off()
        asked = (
            np.linspace(0, len(first) - 1, min(LINES, len(first))).round().astype(int) if len(first) else []
        )
        for index in asked:
            start, end = (_pixel(int(side[index]), grid, (height, width)) for side in (first, second))
            colour = RIGHT if right[index] else WRONG
            axis.plot([start[0], end[0] + width], [start[1], end[1]], color=colour, linewidth=0.9, marker=".")
        share = float(right.double().mean()) if len(right) else float("nan")
        axis.set_title(f"{title}: {100 * share:.0f}% of {len(first)} points found", fontsize=9)
    _save(figure, path)


def match(tokens: Tensor, geometry: TokenGeometry, left: int, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a view that the next one shows too, the most similar ones there, and whether they are right.

    Args:
        tokens: Both views' tokens [2 t d].
        geometry: Geometry of all views.
        left: Index of the first view.
        radius: Distance within which a token is right (m).

    Returns:
        Indices [m], indices [m], bool [m].
    """
    mean = tokens.flatten(0, 1).mean(dim=0)
    centred = functional.normalize(tokens - mean, dim=-1)
    near = torch.cdist(geometry.points[left], geometry.points[left + 1]) <= radius
    near &= geometry.valid[left][:, None] & geometry.valid[left + 1][None]
    first = near.any(dim=1).nonzero()[:, 0]
    alike = (centred[0] @ centred[1].T).masked_fill(~geometry.valid[left + 1][None], -2.0)
    second = alike[first].argmax(dim=1)
    return first, second, near[first, second]


def _pixel(token: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    row, column = divmod(token, grid[1])
    return (column + 0.5) * size[1] / grid[1], (row + 0.5) * size[0] / grid[0]


def draw_heat_maps(
    path: Path, title: str, numbers: Mapping[Readout, Estimate], others: Mapping[str, Estimate]
) -> None:
    """One metric over layers and noise levels, a map for each prior; what has neither is told below.

    Args:
        path: PNG file.
        title: The metric.
        numbers: Readouts of the sweep -> values.
        others: Readers without layers -> values.
    """
    readers: Sequence[str] = list(dict.fromkeys(readout.reader for readout in numbers))
    figure = Figure(figsize=(1.5 + 4.2 * len(readers), 4.2), layout="constrained")
    axes = figure.subplots(1, len(readers), squeeze=False)[0]
    finite = [number.value for number in [*numbers.values(), *others.values()] if np.isfinite(number.value)]
    low, high = (max(-0.2, min(finite)), max(finite)) if finite else (0.0, 1.0)
    for axis, reader in zip(axes, readers, strict=True):
        layers = sorted({r.layer for r in numbers if r.reader == reader and r.layer is not None})
        levels = sorted({r.noise_level for r in numbers if r.reader == reader and r.noise_level is not None})
        table = np.array(
            [[numbers[Readout(reader, layer, level)].value for level in levels] for layer in layers]
        )
        picture = axis.imshow(table, vmin=low, vmax=high, cmap="viridis", aspect="auto", origin="lower")
        axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set(xlabel="noise level", ylabel="layer", title=reader)
        for (row, column), number in np.ndenumerate(table):
            dark = number < (low + high) / 2
            axis.text(
                column, row, f"{number:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
            )
        figure.colorbar(picture, ax=axis, shrink=0.8)
    beside = "   ".join(f"{name} {number.value:.2f}" for name, number in others.items())
    figure.suptitle(f"{title}\n{beside}", fontsize=9)
    _save(figure, path)


def gate_over(frame: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """A frame beside itself under its gate, [h w 3] uint8 and [gh gw] in [0, 1] -> [h 2w 3] uint8.

    Yellow is where the prior is trusted (gate near 0), blue where the semantic stream is.
    """
    height, width = frame.shape[:2]
    maps = torch.from_numpy(1 - gate)[None, None].float()
    smooth = functional.interpolate(maps, (height, width), mode="bilinear")[0, 0].numpy()
    colours = mpl.colormaps["cividis"](smooth.clip(0, 1))[..., :3] * 255
    over = (0.45 * frame + 0.55 * colours).round().astype(np.uint8)
    return np.concatenate([frame, over], axis=1)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


APPLICATION = "vega_policy"
EVERY_PIXEL = 2  # of so many rows and columns one goes into the point cloud
NEAR = 2.5  # m; farther points are left out of the cloud


@dataclass(frozen=True)
class Episode:
    """Moments of an episode.

    Attributes:
        scene: Its views are the moments.
        actions: Actions [t a] of all steps.
        moments: Step of each view, [n].
        instruction: What the robot was told.
    """

    scene: Scene
    actions: np.ndarray
    moments: np.ndarray
    instruction: str


def load_episode(path: Path) -> Episode:
    """Read what `envs.posed_views.write_episode` wrote."""
    with np.load(path.with_suffix(".actions.npz")) as stored:
        instruction = str(stored["instruction"])
        return Episode(load_scene(path), stored["actions"], stored["moments"], instruction)


def write_recording(path: Path, episode: Episode, gates: np.ndarray) -> None:
    """Write an episode for `rerun PATH`.

    Args:
        path: File, `.rrd`.
        episode: What happened.
        gates: Gate of each moment's view, [n gh gw] in [0, 1].

    Raises:
        ValueError: If there is not one gate a moment.
        ImportError: If rerun is missing.
    """
    rerun = _load_rerun()
    views = episode.scene.views
    if len(gates) != len(views):
        raise ValueError(f"expected the gate of each of {len(views)} moments, got {len(gates)}")
    recording = rerun.RecordingStream(APPLICATION)
    recording.save(path)
    recording.log("instruction", rerun.TextDocument(episode.instruction), static=True)
    points = world_points(
        *(torch.from_numpy(part).double() for part in (views.depth, views.intrinsics, views.poses))
    ).numpy()
    for index, step in enumerate(episode.moments.tolist()):
        recording.set_time("step", sequence=step)
        near = (views.depth[index] > 0) & (views.depth[index] < NEAR)
        near[np.arange(len(near)) % EVERY_PIXEL > 0] = False
        near[:, np.arange(near.shape[1]) % EVERY_PIXEL > 0] = False
        recording.log(
            "world/points",
            rerun.Points3D(points[index][near], colors=views.frames[index][near], radii=0.004),
        )
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
            "recordings need rerun-sdk: pip install 'lerobot[viz]', or film nothing with episode.steps=0"
        ) from error
    return rerun
