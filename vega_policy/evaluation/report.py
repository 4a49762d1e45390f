"""Reports: HTML pages of typed blocks; of an evaluation its videos, its numbers as text, and its page."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import imageio.v3 as imageio
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from vega_policy.evaluation.ablations import ABLATIONS
from vega_policy.evaluation.env_pool import WorkerPool
from vega_policy.evaluation.episodes import EPISODES_FILE, Episode, EpisodeResult, Progress, Trajectories
from vega_policy.evaluation.policies import PolicyDescription
from vega_policy.evaluation.stats import mean_of_groups, mean_of_tasks, paired_difference, wilson_interval
from vega_policy.run_dir import write_bytes, write_text

REPORT_FILE = "report.html"


def summarize(
    results: Mapping[str, Sequence[EpisodeResult]],
    description: PolicyDescription,
    progress: Progress,
    settings: dict[str, Any],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of summary.json.

    The numbers at the top are those of the first ablation of the settings; `ablation` names it. Rates lie in
    [0, 1], durations are in seconds or milliseconds as named. `results` are finished episodes by ablation,
    `description` is what the policy was trained on, `groups` are by task, empty where the suite has none.
    """
    ablations = {name: _summarize_ablation(episodes, groups) for name, episodes in results.items()}
    first = next(iter(ablations))
    successes = {name: [result.success for result in episodes] for name, episodes in results.items()}
    headline = {name: ablations[first][name] for name in ("success_rate", "ci_low", "ci_high", "episodes")}
    return {
        "ablation": first,
        **headline,
        "blind_success_rate": ablations["blind"]["success_rate"] if "blind" in ablations else None,
        "policy": description.name,
        "prior": description.prior,
        "action_steps": description.action_steps,
        "seconds_total": round(progress.seconds, 3),
        "latency": _summarize_latency(progress, first, settings["batch_size"]),
        "ablations": ablations,
        "paired": [
            {"first": first, "second": other, **paired_difference(successes[first], successes[other])}
            for other in ablations
            if other != first
        ],
        "settings": settings,
    }


def _summarize_ablation(results: Sequence[EpisodeResult], groups: Mapping[str, str]) -> dict[str, Any]:
    tasks: dict[str, list[EpisodeResult]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    by_task = {task: _count_successes(episodes) for task, episodes in tasks.items()}
    rates = {task: counts["success_rate"] for task, counts in by_task.items()}
    return {
        **_count_successes(results),
        "mean_of_tasks": mean_of_tasks(rates),
        "mean_of_groups": mean_of_groups(rates, groups) if any(groups[task] for task in rates) else None,
        "tasks": by_task,
    }


def _count_successes(results: Sequence[EpisodeResult]) -> dict[str, Any]:
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


def _summarize_latency(progress: Progress, ablation: str, batch_size: int) -> dict[str, Any]:
    """Return median and 95th percentile of a policy call, batched and for one observation."""
    # The first call of a process also pays for warming up.
    batched = progress.call_seconds[ablation][1:] or progress.call_seconds[ablation]
    summary: dict[str, Any] = {"batch_size": batch_size}
    for kind, seconds in (("batched", batched), ("single", progress.single_call_seconds)):
        summary[f"{kind}_calls"] = len(seconds)
        for rank in (50, 95):
            summary[f"{kind}_p{rank}_ms"] = float(np.percentile(1000 * np.asarray(seconds), rank))
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """Return the summary as text: a line for each ablation and task, with 95% Wilson intervals."""
    lines = [
        f"{'ablation':<10} {'task':<28} {'success':>12} {'rate':>7}   {'95% interval':<16} {'length':>7}"
    ]
    for ablation, numbers in summary["ablations"].items():
        rows = dict(numbers["tasks"]) if len(numbers["tasks"]) > 1 else {}
        rows[f"all ({len(numbers['tasks'])} tasks)" if rows else next(iter(numbers["tasks"]))] = numbers
        for task, row in rows.items():
            count = f"{row['successes']}/{row['episodes']}"
            interval = f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
            rate = _percent(row["success_rate"])
            lines.append(
                f"{ablation:<10} {task:<28} {count:>12} {rate:>7}   {interval:<16} {row['mean_length']:>7.1f}"
            )
        if numbers["mean_of_groups"] is not None:
            lines.append(
                f"{ablation:<10} mean of tasks {_percent(numbers['mean_of_tasks'])}, "
                f"mean of difficulty groups {_percent(numbers['mean_of_groups'])}"
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


def list_files(folder: Path) -> str:
    """Return a line for each of report, videos and table of episodes that the folder of results has."""
    files = {"report": REPORT_FILE, "videos": FOLDER, "episodes": EPISODES_FILE}
    return "\n".join(f"{kind}: {folder / name}" for kind, name in files.items() if (folder / name).exists())


def write_report(folder: Path, summary: dict[str, Any], videos: Sequence[Video]) -> None:
    """Write report.html of an evaluation, which links the videos beside it."""
    sections = [
        Section("", _headline(summary)),
        Section("Success by ablation and task", list(_success(summary))),
        Section("Paired differences", _paired(summary)),
        Section("First successes", _gallery(folder, [video for video in videos if video.result.success])),
        Section("First failures", _gallery(folder, [video for video in videos if not video.result.success])),
        Section("Latency of a policy call", [_latency_table(summary["latency"])]),
        Section("Settings", [Table(("setting", "value"), sorted(summary["settings"].items()))]),
    ]
    title = f"{summary['settings']['suite']}: closed-loop evaluation"
    write_text(folder / REPORT_FILE, render_report(title, sections))


def _by_perturbation(summaries: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a table: a line for each perturbation, success in each suite and the difference to none."""
    numbers = {
        (s["settings"].get("perturbation", "none"), s["settings"]["suite"]): s for s in summaries.values()
    }
    axes, suites = (list(dict.fromkeys(key[part] for key in numbers)) for part in (0, 1))
    rows = []
    for axis in axes:
        of = [numbers[axis, suite] for suite in suites]
        cells = [f"{_percent(one['success_rate'])}{_difference(one)}" for one in of]
        mean = _percent(float(np.mean([one["success_rate"] for one in of])))
        rows.append([axis, *cells, *([mean] if len(suites) > 1 else [])])
    return ["perturbation", *suites, *(["mean"] if len(suites) > 1 else [])], rows


def _difference(summary: dict[str, Any]) -> str:
    pair = summary.get("against_none")
    return "" if pair is None else f" ({100 * pair['difference']:+.1f} {_interval(pair)})"


def format_perturbations(summaries: Mapping[str, dict[str, Any]]) -> str:
    """Return one table of all perturbations and suites; differences are paired with none by initial state."""
    header, rows = _by_perturbation(summaries)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_perturbation_report(
    folder: Path, summaries: Mapping[str, dict[str, Any]], starts: Mapping[str, np.ndarray]
) -> None:
    """Write report.html over several perturbations, with a frame [h w 3] of the start under each."""
    figures = []
    for name, frame in starts.items():
        path = folder / "starts" / f"{name.replace('/', '_')}.png"
        write_bytes(path, imageio.imwrite("<bytes>", frame, extension=".png"))
        figures.append(Figure(name, image=os.path.relpath(path, folder)))
    first = next(iter(summaries.values()))["settings"]
    text = (
        f"Success and, in brackets, the difference to none with its 95% interval, paired by initial state; "
        f"strength {max(s['settings'].get('perturbation_strength', 0) for s in summaries.values())}."
    )
    sections = [
        Section("", [Table(*_by_perturbation(summaries)), Paragraph(text, "quiet")]),
        Section("The first episode's start", [Gallery(figures)]),
    ]
    write_text(folder / REPORT_FILE, render_report(f"{first['checkpoint']}: perturbations", sections))


def _headline(summary: dict[str, Any]) -> list[Block]:
    policy = f"policy {summary['policy']}, prior {summary['prior']}"
    if summary["ablation"] != "none":
        policy += f", under the ablation {summary['ablation']}"
    blind = summary["blind_success_rate"]
    compared = "" if blind is None or summary["ablation"] == "blind" else f"; blind {_percent(blind)}"
    return [
        Paragraph(_percent(summary["success_rate"]), "headline"),
        Paragraph(f"{summary['episodes']} episodes, 95% Wilson interval {_interval(summary)}{compared}"),
        Paragraph(f"{policy}; {summary['seconds_total']:.0f} s in all", "quiet"),
    ]


def _success(summary: dict[str, Any]) -> Iterator[Block]:
    ablations = summary["ablations"]
    if len(ablations) > 1:
        meanings = [f"{name}: {ABLATIONS[name].meaning}" for name in ablations]
        yield Paragraph(f"{'; '.join(meanings)}.", "quiet")
    rows = []
    for ablation, numbers in ablations.items():
        tasks = numbers["tasks"]
        for task, row in {**tasks, **({"all tasks": numbers} if len(tasks) > 1 else {})}.items():
            counts = (ablation, task, row["successes"], row["episodes"])
            rows.append((*counts, _percent(row["success_rate"]), _interval(row), f"{row['mean_length']:.1f}"))
    head = ("ablation", "task", "successes", "episodes", "rate", "95% Wilson interval", "mean length")
    yield Table(head, rows)
    # Papers on Meta-World call both of these averages "average".
    means = [
        (ablation, _percent(numbers["mean_of_tasks"]), _percent(numbers["mean_of_groups"]))
        for ablation, numbers in ablations.items()
        if numbers["mean_of_groups"] is not None
    ]
    if means:
        yield Table(("ablation", "mean of tasks", "mean of difficulty groups"), means)
    bars = []
    for task in ablations[summary["ablation"]]["tasks"]:
        for ablation, numbers in ablations.items():
            row, is_main = numbers["tasks"][task], ablation == summary["ablation"]
            rate, low, high = row["success_rate"], row["ci_low"], row["ci_high"]
            bars.append(Bar(f"{task} ({ablation})", rate, low, high, is_main))
    yield BarChart("success rates with 95% intervals", bars)


def _paired(summary: dict[str, Any]) -> list[Block]:
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
    head = ("pair", "difference", "95% interval", "only first", "only second", "McNemar p")
    return [Table(head, rows)] if rows else []


def _gallery(folder: Path, videos: Sequence[Video]) -> list[Block]:
    if not videos:
        return [Paragraph("None.", "quiet")]
    figures = []
    for video in videos:
        result = video.result
        caption = f"{result.task}, episode {result.index}, seed {result.seed}: {result.length} steps"
        still, mp4 = (os.path.relpath(path, folder) for path in (video.still, video.video))
        figures.append(Figure(caption, image=still, video=mp4))
    return [Gallery(figures)]


def _latency_table(latency: dict[str, Any]) -> Table:
    rows = [
        (
            size,
            latency[f"{kind}_calls"],
            f"{latency[f'{kind}_p50_ms']:.1f}",
            f"{latency[f'{kind}_p95_ms']:.1f}",
        )
        for kind, size in (("batched", latency["batch_size"]), ("single", 1))
    ]
    return Table(("observations in a call", "calls", "p50 (ms)", "p95 (ms)"), rows)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _interval(numbers: dict[str, Any]) -> str:
    return f"[{100 * numbers['ci_low']:.1f}, {100 * numbers['ci_high']:.1f}]%"


FOLDER = "videos"
FRAMES_PER_SECOND = 20
_STILLS = 6


@dataclass(frozen=True)
class Video:
    """Files of a rendered episode."""

    result: EpisodeResult
    video: Path  # h264, mp4
    still: Path  # PNG, six moments of the episode side by side


def choose_episodes(results: Sequence[EpisodeResult], count: int) -> list[EpisodeResult]:
    """Return the first `count` successes and the first `count` failures, by episode index, then by task."""
    ordered = sorted(results, key=lambda result: (result.index, result.task_index))
    successes, failures = ([r for r in ordered if r.success is kind][:count] for kind in (True, False))
    return successes + failures


def render_videos(
    results: Sequence[EpisodeResult],
    episodes: Sequence[Episode],
    trajectories: Trajectories,
    pool: WorkerPool,
    folder: Path,
    *,
    frame_size: int,
) -> list[Video]:
    """Render the chosen results into `folder/videos`, unless they are there, and return their files.

    Episodes without simulator states in `trajectories` are left out.
    """
    specs = {episode.key: episode.spec() for episode in episodes}
    videos = [_video(result, folder / FOLDER) for result in results]
    states = [None if video.still.is_file() else trajectories.load(video.result) for video in videos]
    missing = [(video, kept) for video, kept in zip(videos, states, strict=True) if kept is not None]
    jobs = [(specs[video.result.key], kept) for video, kept in missing]
    for (video, _), frames in zip(missing, pool.render(jobs, frame_size=frame_size), strict=True):
        # The still comes last: where it exists, the video is complete.
        write_bytes(video.video, encode_video(frames))
        write_bytes(video.still, imageio.imwrite("<bytes>", film_strip(frames), extension=".png"))
    return [video for video in videos if video.still.is_file()]


def encode_video(frames: np.ndarray) -> bytes:
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


def _video(result: EpisodeResult, folder: Path) -> Video:
    outcome = "success" if result.success else "failure"
    stem = f"{outcome}_{result.task}_{result.index:03d}"
    return Video(result, folder / f"{stem}.mp4", folder / f"{stem}.png")


@dataclass(frozen=True)
class Paragraph:
    """Text in one style: `quiet`, `headline`, `verdict` or plain."""

    text: str
    style: str = ""
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Table:
    """A table whose cells are written with `str`."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A video, an image or both, one above the other; paths are relative to the report's folder."""

    caption: str
    image: str | None = None
    video: str | None = None
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Gallery:
    """Small figures side by side."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Bar:
    """A rate with its interval, all in [0, 1]; the main bars have the accent colour."""

    label: str
    value: float
    low: float
    high: float
    is_main: bool = True


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars with intervals; the caption is the text for screen readers."""

    caption: str
    bars: Sequence[Bar]
    kind: ClassVar[str] = "bars"


Block = Paragraph | Table | Figure | Gallery | BarChart


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; a section without blocks is left out, an empty heading is not written."""

    heading: str
    blocks: Sequence[Block]


def render_report(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML; every text is escaped."""
    environment = Environment(
        loader=PackageLoader("vega_policy", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(title=title, sections=sections)
