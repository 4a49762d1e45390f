"""Pictures people look at: feature maps, correspondence lines, heat maps of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from vega_policy.analysis.bootstrap import Estimate
from vega_policy.analysis.readouts import Readout
from vega_policy.analysis.scenes import Views
from vega_policy.analysis.tokens import TokenGeometry

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
