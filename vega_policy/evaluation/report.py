"""report.html: one page without scripts; the films lie beside it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from vega_policy.evaluation.ablations import ABLATIONS
from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.episodes import Episode, EpisodeResult, Progress, Trajectories, write_atomically
from vega_policy.evaluation.policies import PolicyDescription
from vega_policy.evaluation.stats import (
    mcnemar_exact,
    mean_of_groups,
    mean_of_tasks,
    paired_interval,
    wilson_interval,
)

FOLDER = "videos"
FRAMES_PER_SECOND = 20
_STILLS = 6


@dataclass(frozen=True)
class Film:
    """A filmed episode.

    Attributes:
        result: The episode.
        video: h264 file.
        still: PNG file with six moments of the episode side by side.
    """

    result: EpisodeResult
    video: Path
    still: Path


def choose(results: Sequence[EpisodeResult], count: int) -> list[EpisodeResult]:
    """Return the first `count` successes and the first `count` failures, by episode index, then by task."""
    ordered = sorted(results, key=lambda result: (result.index, result.task_index))
    chosen = [[r for r in ordered if r.success is success][:count] for success in (True, False)]
    return chosen[0] + chosen[1]


def film(
    results: Sequence[EpisodeResult],
    episodes: Sequence[Episode],
    trajectories: Trajectories,
    pool: WorkerPool,
    folder: Path,
    *,
    frame_size: int,
) -> list[Film]:
    """Render episodes from their stored states; episodes filmed before are not rendered again.

    Args:
        results: The episodes to film.
        episodes: All planned episodes.
        trajectories: Their simulator states.
        pool: Workers that can build the environments.
        folder: Folder of the evaluation; films lie in its folder `videos`.
        frame_size: Height and width of the pictures in pixels.
    """
    films = [_named(result, folder / FOLDER) for result in results]
    orders = {episode.key: episode.order() for episode in episodes}
    states = {f.result.key: trajectories.load(f.result) for f in films if not _finished(f)}
    waiting = [f for f in films if states.get(f.result.key) is not None]
    jobs = [(orders[f.result.key], stored) for f in waiting if (stored := states[f.result.key]) is not None]
    for made, frames in zip(waiting, pool.film(jobs, frame_size=frame_size), strict=True):
        # The still comes last: where it exists, the film is complete.
        write_atomically(made.video, encode(frames))
        write_atomically(made.still, imageio.imwrite("<bytes>", film_strip(frames), extension=".png"))
    return [f for f in films if _finished(f)]


def encode(frames: np.ndarray) -> bytes:
    """Return frames uint8 [t h w 3] as an h264 mp4; odd sizes lose their last row or column (yuv420p)."""
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    buffer = io.BytesIO()
    with imageio.imopen(buffer, "w", extension=".mp4", plugin="pyav") as file:
        file.write(frames[:, :height, :width], codec="libx264", fps=FRAMES_PER_SECOND)
    return buffer.getvalue()


def film_strip(frames: np.ndarray) -> np.ndarray:
    """Return six moments of frames [t h w 3], first and last included, side by side: [h 6w 3]."""
    moments = np.linspace(0, len(frames) - 1, _STILLS).round().astype(int)
    return np.concatenate(list(frames[moments]), axis=1)


def _named(result: EpisodeResult, folder: Path) -> Film:
    outcome = "success" if result.success else "failure"
    stem = f"{outcome}_{result.task}_{result.index:03d}"
    return Film(result, folder / f"{stem}.mp4", folder / f"{stem}.png")


def _finished(made: Film) -> bool:
    return made.still.is_file()


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
        _section("Success by ablation and task", _success(summary)),
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
    if summary["ablation"] != "none":
        who += f", under the ablation {summary['ablation']}"
    blind = summary["blind_success_rate"]
    compared = "" if blind is None or summary["ablation"] == "blind" else f"; blind {_percent(blind)}"
    return (
        f'<p class="headline">{_percent(summary["success_rate"])}</p>'
        f"<p>{summary['episodes']} episodes, 95% Wilson interval {_interval(summary)}{compared} "
        f'<br><span class="quiet">{escape(who)}; {summary["seconds_total"]:.0f} s in all</span></p>'
    )


def _success(summary: dict[str, Any]) -> str:
    return _meanings(summary) + _success_table(summary) + _bars(summary)


def _meanings(summary: dict[str, Any]) -> str:
    words = [f"{escape(name)}: {escape(ABLATIONS[name].meaning)}" for name in summary["ablations"]]
    return f'<p class="quiet">{"; ".join(words)}.</p>' if len(words) > 1 else ""


def _success_table(summary: dict[str, Any]) -> str:
    header = ("ablation", "task", "successes", "episodes", "rate", "95% Wilson interval", "mean length")
    rows = []
    for ablation, numbers in summary["ablations"].items():
        tasks = numbers["tasks"]
        for task, row in {**tasks, **({"all tasks": numbers} if len(tasks) > 1 else {})}.items():
            counts = (ablation, task, row["successes"], row["episodes"])
            rows.append((*counts, _percent(row["success_rate"]), _interval(row), f"{row['mean_length']:.1f}"))
    return _table(header, rows) + _means_of_groups(summary)


def _means_of_groups(summary: dict[str, Any]) -> str:
    """Both averages that papers on Meta-World call "average"."""
    rows = [
        (ablation, _percent(numbers["mean_of_tasks"]), _percent(numbers["mean_of_groups"]))
        for ablation, numbers in summary["ablations"].items()
        if numbers["mean_of_groups"] is not None
    ]
    return _table(("ablation", "mean of tasks", "mean of difficulty groups"), rows) if rows else ""


def _bars(summary: dict[str, Any]) -> str:
    """Draw a bar and its interval for each task and ablation."""
    rows = [
        (f"{task} ({ablation})", numbers, index == 0)
        for task in summary["ablations"][summary["ablation"]]["tasks"]
        for index, (ablation, played) in enumerate(summary["ablations"].items())
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


def summarize(
    results: Mapping[str, Sequence[EpisodeResult]],
    description: PolicyDescription,
    progress: Progress,
    settings: dict[str, Any],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of summary.json.

    The numbers at the top are those of the first ablation of the settings; `ablation` names it. Rates lie in
    [0, 1], durations are in seconds or milliseconds as named.

    Args:
        results: Finished episodes of each ablation, in order of play.
        description: What the policy was trained on.
        progress: What the evaluation cost.
        settings: Everything that decided the results.
        groups: Group of each task, empty where the suite has none.
    """
    ablations = {name: _summarize_ablation(episodes, groups) for name, episodes in results.items()}
    first = next(iter(ablations))
    return {
        "ablation": first,
        "success_rate": ablations[first]["success_rate"],
        "ci_low": ablations[first]["ci_low"],
        "ci_high": ablations[first]["ci_high"],
        "episodes": ablations[first]["episodes"],
        "blind_success_rate": ablations["blind"]["success_rate"] if "blind" in ablations else None,
        "policy": description.name,
        "prior": description.prior,
        "action_steps": description.action_steps,
        "seconds_total": round(progress.seconds, 3),
        "latency": latency(progress, first, settings["num_envs"]),
        "ablations": ablations,
        "paired": [
            {"first": first, "second": other, **paired_difference(results[first], results[other])}
            for other in ablations
            if other != first
        ],
        "settings": settings,
    }


def paired_difference(first: Sequence[EpisodeResult], second: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Compare two policies on the same episodes.

    Args:
        first: Episodes of the first policy.
        second: The same episodes, in the same order, of the second policy.

    Returns:
        Success rates, their `difference` (first minus second) with its paired 95% interval, the
        counts of episodes that only one of them solved, and the p-value of McNemar's exact test.
    """
    one, two = [result.success for result in first], [result.success for result in second]
    only_first = sum(a and not b for a, b in zip(one, two, strict=True))
    only_second = sum(b and not a for a, b in zip(one, two, strict=True))
    interval = paired_interval(np.subtract(one, two, dtype=float))
    return {
        "episodes": len(one),
        "first_success_rate": sum(one) / len(one),
        "second_success_rate": sum(two) / len(two),
        "difference": (only_first - only_second) / len(one),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar_exact(only_first, only_second),
    }


def latency(progress: Progress, ablation: str, num_envs: int) -> dict[str, Any]:
    """Return median and 95th percentile of a policy call in milliseconds, batched and for one observation."""
    # The first call of a process also pays for warming up.
    batched = progress.call_seconds[ablation][1:] or progress.call_seconds[ablation]
    return {
        "batch_size": num_envs,
        "batched_calls": len(batched),
        **_percentiles("batched", batched),
        "single_calls": len(progress.single_call_seconds),
        **_percentiles("single", progress.single_call_seconds),
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text: a line for each task and ablation, with 95% Wilson intervals."""
    lines = [
        f"{'ablation':<10} {'task':<28} {'success':>12} {'rate':>7}   {'95% interval':<16} {'length':>7}"
    ]
    for ablation, numbers in summary["ablations"].items():
        rows = dict(numbers["tasks"]) if len(numbers["tasks"]) > 1 else {}
        rows[f"all ({len(numbers['tasks'])} tasks)" if rows else next(iter(numbers["tasks"]))] = numbers
        for task, row in rows.items():
            count = f"{row['successes']}/{row['episodes']}"
            interval = f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
            rate = f"{100 * row['success_rate']:.1f}%"
            lines.append(
                f"{ablation:<10} {task:<28} {count:>12} {rate:>7}   {interval:<16} {row['mean_length']:>7.1f}"
            )
        if numbers["mean_of_groups"] is not None:
            lines.append(
                f"{ablation:<10} mean of tasks {100 * numbers['mean_of_tasks']:.1f}%, "
                f"mean of difficulty groups {100 * numbers['mean_of_groups']:.1f}%"
            )
    timing = summary["latency"]
    lines.append(
        f"policy {summary['policy']}, prior {summary['prior']}, {summary['seconds_total']:.1f} s in all"
    )
    lines.append(
        f"policy call: {timing['batched_p50_ms']:.1f} ms (p95 {timing['batched_p95_ms']:.1f}) for "
        f"{timing['batch_size']} observations, {timing['single_p50_ms']:.1f} ms "
        f"(p95 {timing['single_p95_ms']:.1f}) for one"
    )
    return "\n".join(lines)


def _summarize_ablation(results: Sequence[EpisodeResult], groups: Mapping[str, str]) -> dict[str, Any]:
    tasks: dict[str, list[EpisodeResult]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    by_task = {task: _counts(episodes) for task, episodes in tasks.items()}
    rates = {task: counts["success_rate"] for task, counts in by_task.items()}
    return {
        **_counts(results),
        "mean_of_tasks": mean_of_tasks(rates),
        "mean_of_groups": mean_of_groups(rates, groups) if any(groups[task] for task in rates) else None,
        "tasks": by_task,
    }


def _counts(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    successes, episodes = sum(result.success for result in results), len(results)
    interval = wilson_interval(successes, episodes)
    return {
        "successes": successes,
        "episodes": episodes,
        "success_rate": successes / episodes,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "mean_length": float(np.mean([result.length for result in results])),
        "mean_policy_calls": float(np.mean([result.policy_calls for result in results])),
    }


def _percentiles(kind: str, seconds: Sequence[float]) -> dict[str, float]:
    milliseconds = 1000 * np.asarray(seconds)
    return {f"{kind}_p{share}_ms": float(np.percentile(milliseconds, share)) for share in (50, 95)}
