"""One table for a sweep: each configuration over its seeds, and its paired difference to the first."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml

logger = logging.getLogger(__name__)

RESULT, TABLE = "sweep.json", "sweep.txt"
_EXACT = 16
"""Up to so many pairs all sign patterns are counted; beyond, 100 000 random ones."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        folder: Its folder.
        settings: Its config by dotted path; empty if it did not begin.
        measures: `loss` (the last one logged) and what was measured after the last step.
        episodes: Closed-loop success by task index and episode index, after the last step.
    """

    folder: Path
    settings: dict[str, Any]
    measures: dict[str, float]
    episodes: dict[tuple[int, int], bool]


def read_job(folder: Path) -> Job:
    """Reads one run's folder; what is not there stays empty."""
    from vega_policy.checkpoints import read_scores
    from vega_policy.run_dir import flatten
    from vega_policy.training.checkpoint import CONFIG, METRICS

    config, metrics = folder / CONFIG, folder / METRICS
    if not config.is_file():
        return Job(folder, {}, {}, {})
    settings = flatten(yaml.safe_load(config.read_text()))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = read_scores(folder)
    step = max(scores, default=0)
    measures = {"loss": losses[-1]} if losses else {}
    return Job(
        folder, settings, measures | scores.get(step, {}), _episodes(folder / "simulation" / f"{step:06d}")
    )


def _episodes(folder: Path) -> dict[tuple[int, int], bool]:
    from vega_policy.evaluation.episodes import EPISODES_FILE, read_episodes

    shares = sorted(path.parent for path in folder.glob(f"*/{EPISODES_FILE}"))
    return {result.key: result.success for share in shares for result in read_episodes(share)}


def labels(jobs: Sequence[Job]) -> list[str]:
    """What sets each job apart from the others, its seed and folder left out."""
    known = [job.settings for job in jobs if job.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    varied = [
        name
        for name in names
        if name not in ("seed", "output_dir", "resume") and len({repr(s.get(name)) for s in known}) > 1
    ]
    return [
        ", ".join(f"{_short(name)}={job.settings.get(name)}" for name in varied) or "all alike"
        if job.settings
        else f"job {job.folder.name}: did not begin"
        for job in jobs
    ]


def _short(name: str) -> str:
    """`policy.fusion.name` is what a user calls `fusion`."""
    return name.removeprefix("policy.").removesuffix(".name")


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired sign-flip test on a mean difference.

    Under the null hypothesis each pair's difference could as well have had the other sign (Fisher's
    randomisation test). With n pairs no p-value is below 2 / 2^n.

    Args:
        differences: One difference a pair, n >= 1.
    """
    values = np.abs(np.asarray(differences, dtype=float))
    if len(values) <= _EXACT:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(100_000, len(values)))
    observed = abs(float(np.sum(differences)))
    return float(np.mean(np.abs(signs @ values) >= observed * (1 - 1e-9)))


def summarize(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One row a configuration, in the order of the jobs; all but the first are paired with it.

    Returns:
        Rows with `label`, `seeds`, by measure `mean` and `spread` (sample standard deviation over seeds),
        `successes`, `episodes` and their 95% interval `low`, `high` where episodes were played, and `paired`:
        by measure the mean difference to the first row over common seeds and its sign-flip p-value; for
        success over common episodes with interval and exact p-value, those of a state kept together.
    """
    groups: dict[str, list[Job]] = {}
    for label, job in zip(labels(jobs), jobs, strict=True):
        groups.setdefault(label, []).append(job)
    first = next(iter(groups.values()), [])
    return [
        {**_row(label, members), "paired": {} if members is first else _paired(members, first)}
        for label, members in groups.items()
    ]


def _row(label: str, members: Sequence[Job]) -> dict[str, Any]:
    from vega_policy.evaluation.stats import repeated_wilson_interval

    names = ("loss", "held_out_loss", "held_out_action_error")
    measures = {}
    for name in names:
        values = [job.measures[name] for job in members if name in job.measures]
        if values:
            spread = stdev(values) if len(values) > 1 else None
            measures[name] = {"mean": fmean(values), "spread": spread, "runs": len(values)}
    row = {"label": label, "seeds": [job.settings.get("seed") for job in members], "measures": measures}
    solved = _solved([job for job in members if job.episodes])
    if not solved.size:
        return row
    interval = repeated_wilson_interval(solved)
    played = {"successes": int(solved.sum()), "episodes": solved.size}
    return row | played | {"low": interval.low, "high": interval.high}


def _solved(jobs: Sequence[Job]) -> np.ndarray:
    """Success [k n] of k jobs on the n initial states that all of them played.

    A state that several seeds played is one observation: its episodes are kept together.
    """
    states = sorted(set.intersection(*(set(job.episodes) for job in jobs))) if jobs else []
    return np.array([[job.episodes[state] for state in states] for job in jobs], dtype=bool)


def _paired(members: Sequence[Job], first: Sequence[Job]) -> dict[str, Any]:
    from vega_policy.evaluation.stats import paired_interval, sign_flip_exact

    reference = {job.settings.get("seed"): job for job in first}
    pairs = [(job, reference[seed]) for job in members if (seed := job.settings.get("seed")) in reference]
    paired: dict[str, Any] = {}
    for name in ("loss", "held_out_loss", "held_out_action_error"):
        both = [(a.measures, b.measures) for a, b in pairs if name in a.measures and name in b.measures]
        differences = [a[name] - b[name] for a, b in both]
        if differences:
            paired[name] = {"difference": fmean(differences), "p": sign_flip(differences), "pairs": len(both)}
    # A run that failed has no episodes, and takes only its own pair away.
    solved = _solved([job for pair in pairs if all(one.episodes for one in pair) for job in pair])
    if solved.size:
        changes = solved[::2].astype(int) - solved[1::2]
        interval = paired_interval(changes.mean(axis=0))
        paired["success"] = {
            "difference": float(changes.mean()),
            "low": interval.low,
            "high": interval.high,
            "p": sign_flip_exact(changes.sum(axis=0)),
            "pairs": changes.size,
        }
    return paired


def write_table(folder: Path) -> str:
    """Reads the jobs below a sweep's folder, writes `sweep.json` and `sweep.txt`, returns the table."""
    jobs = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    rows = summarize([read_job(path) for path in sorted(jobs, key=lambda path: int(path.name))])
    (folder / RESULT).write_text(json.dumps(rows, indent=1) + "\n")
    table = render(rows)
    (folder / TABLE).write_text(table + "\n")
    return table


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    width = max([len(row["label"]) for row in rows] + [13])
    lines = [f"{'configuration':<{width}}  {'runs':>4}  results"]
    lines += [f"{row['label']:<{width}}  {len(row['seeds']):>4}  {_results(row)}" for row in rows]
    compared = [row for row in rows if row["paired"]]
    if compared:
        lines += ["", f"minus {rows[0]['label']}, paired by seed, success by initial state (sign-flip p):"]
        lines += [f"{row['label']:<{width}}        {_differences(row['paired'])}" for row in compared]
    return "\n".join(lines)


def _results(row: dict[str, Any]) -> str:
    told = []
    if "episodes" in row:
        rate = 100 * row["successes"] / row["episodes"]
        told.append(
            f"success {row['successes']}/{row['episodes']} = {rate:.1f}% "
            f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        )
    for name, value in row["measures"].items():
        spread = "" if value["spread"] is None else f" ± {value['spread']:.2g}"
        told.append(f"{name} {value['mean']:.4g}{spread}")
    return "   ".join(told) or "no result"


def _differences(paired: dict[str, Any]) -> str:
    told = []
    for name, value in sorted(paired.items(), key=lambda item: item[0] != "success"):
        if name == "success":
            interval = f"[{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
            told.append(f"success {100 * value['difference']:+.1f}% {interval} (p {value['p']:.3g})")
        else:
            told.append(f"{name} {value['difference']:+.4g} (p {value['p']:.3g}, {value['pairs']} pairs)")
    return "   ".join(told)
