"""report.html: one page without scripts; the films lie beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vega_policy.evaluation.controls import CONTROLS
from vega_policy.evaluation.run_folder import write_atomically
from vega_policy.evaluation.videos import Film

REPORT_FILE = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d0d0d0; --bar: #2f6fab;
        --other: #a0a0a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --line: #444; --bar: #6aa9e0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.headline { font-size: 2.2rem; font-weight: 600; } .quiet { opacity: .7; }
.films { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 300px; }
figure video, figure img { width: 100%; display: block; } figcaption { font-size: .85rem; }
svg text { fill: var(--ink); font-size: 12px; }
"""


def write_report(folder: Path, summary: dict[str, Any], films: Sequence[Film]) -> Path:
    """Write the page of an evaluation.

    Args:
        folder: Folder of the evaluation.
        summary: Content of summary.json.
        films: Filmed episodes.

    Returns:
        The page.
    """
    parts = (
        _headline(summary),
        _section("Success by control and task", _success(summary)),
        _section("Paired differences", _paired_table(summary)) if summary["paired"] else "",
        _section("First successes", _films(folder, [f for f in films if f.result.success])),
        _section("First failures", _films(folder, [f for f in films if not f.result.success])),
        _section("Latency of a policy call", _latency(summary["latency"])),
        _section("Settings", _table(("setting", "value"), sorted(summary["settings"].items()))),
    )
    title = escape(f"{summary['settings']['suite']}: closed-loop evaluation")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
    write_atomically(folder / REPORT_FILE, page.encode())
    return folder / REPORT_FILE


def _headline(summary: dict[str, Any]) -> str:
    who = f"policy {summary['policy']}, prior {summary['prior']}"
    if summary["control"] != "none":
        who += f", under the control {summary['control']}"
    blind = summary["blind_success_rate"]
    compared = "" if blind is None or summary["control"] == "blind" else f"; blind {_percent(blind)}"
    return (
        f'<p class="headline">{_percent(summary["success_rate"])}</p>'
        f"<p>{summary['episodes']} episodes, 95% Wilson interval {_interval(summary)}{compared} "
        f'<br><span class="quiet">{escape(who)}; {summary["seconds_total"]:.0f} s in all</span></p>'
    )


def _success(summary: dict[str, Any]) -> str:
    return _meanings(summary) + _success_table(summary) + _bars(summary)


def _meanings(summary: dict[str, Any]) -> str:
    words = [f"{escape(name)}: {escape(CONTROLS[name].meaning)}" for name in summary["controls"]]
    return f'<p class="quiet">{"; ".join(words)}.</p>' if len(words) > 1 else ""


def _success_table(summary: dict[str, Any]) -> str:
    header = ("control", "task", "successes", "episodes", "rate", "95% Wilson interval", "mean length")
    rows = []
    for control, numbers in summary["controls"].items():
        tasks = numbers["tasks"]
        for task, row in {**tasks, **({"all tasks": numbers} if len(tasks) > 1 else {})}.items():
            counts = (control, task, row["successes"], row["episodes"])
            rows.append((*counts, _percent(row["success_rate"]), _interval(row), f"{row['mean_length']:.1f}"))
    return _table(header, rows) + _means_of_groups(summary)


def _means_of_groups(summary: dict[str, Any]) -> str:
    """Both averages that papers on Meta-World call "average"."""
    rows = [
        (control, _percent(numbers["mean_of_tasks"]), _percent(numbers["mean_of_groups"]))
        for control, numbers in summary["controls"].items()
        if numbers["mean_of_groups"] is not None
    ]
    return _table(("control", "mean of tasks", "mean of difficulty groups"), rows) if rows else ""


def _bars(summary: dict[str, Any]) -> str:
    """Draw a bar and its interval for each task and control."""
    rows = [
        (f"{task} ({control})", numbers, index == 0)
        for task in summary["controls"][summary["control"]]["tasks"]
        for index, (control, played) in enumerate(summary["controls"].items())
        for numbers in (played["tasks"][task],)
    ]
    label, width, step = 320, 500, 22
    shapes = []
    for index, (name, numbers, main) in enumerate(rows):
        top = index * step
        low, rate, high = (label + width * numbers[key] for key in ("ci_low", "success_rate", "ci_high"))
        colour = "var(--bar)" if main else "var(--other)"
        shapes.append(
            f'<text x="{label - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{label}" y="{top + 4}" width="{rate - label:.1f}" height="13" fill="{colour}"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{top + 10.5}" y2="{top + 10.5}" stroke="var(--ink)"/>'
            f'<text x="{label + width + 8}" y="{top + 14}">{_percent(numbers["success_rate"])}</text>'
        )
    height = len(rows) * step + 6
    return (
        f'<p><svg viewBox="0 0 {label + width + 70} {height}" width="100%" role="img" '
        f'aria-label="success rates with 95% intervals">{"".join(shapes)}</svg></p>'
    )


def _paired_table(summary: dict[str, Any]) -> str:
    header = ("pair", "difference", "95% interval", "only first", "only second", "McNemar p")
    rows = [
        (
            f"{pair['first']} - {pair['second']}",
            _percent(pair["difference"]),
            _interval(pair),
            pair["only_first"],
            pair["only_second"],
            f"{pair['mcnemar_p']:.2g}",
        )
        for pair in summary["paired"]
    ]
    return _table(header, rows)


def _films(folder: Path, films: Sequence[Film]) -> str:
    if not films:
        return '<p class="quiet">None.</p>'
    return f'<div class="films">{"".join(_figure(folder, film) for film in films)}</div>'


def _figure(folder: Path, film: Film) -> str:
    video, still = (escape(os.path.relpath(path, folder)) for path in (film.video, film.still))
    result = film.result
    caption = f"{result.task}, episode {result.index}, seed {result.seed}: {result.length} steps"
    return (
        f'<figure><video src="{video}" controls loop muted preload="metadata"></video>'
        f'<img src="{still}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _latency(latency: dict[str, Any]) -> str:
    header = ("observations in a call", "calls", "p50 (ms)", "p95 (ms)")
    rows = [
        (
            size,
            latency[f"{kind}_calls"],
            f"{latency[f'{kind}_p50_ms']:.1f}",
            f"{latency[f'{kind}_p95_ms']:.1f}",
        )
        for kind, size in (("batched", latency["batch_size"]), ("single", 1))
    ]
    return _table(header, rows)


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(numbers: dict[str, Any]) -> str:
    return f"[{100 * numbers['ci_low']:.1f}, {100 * numbers['ci_high']:.1f}]%"
