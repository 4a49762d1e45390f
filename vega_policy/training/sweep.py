"""One table for a sweep: each configuration over its seeds, and its paired difference to the first."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from vega_policy.checkpoints import read_scores
from vega_policy.run_dir import flatten, read_yaml, write_json, write_text

logger = logging.getLogger(__name__)

RESULT, TABLE = "sweep.json", "sweep.txt"
_MEASURES = ("loss", "held_out_loss", "held_out_action_error")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    folder: Path
    settings: dict[str, Any]  # its config by dotted path; empty if it did not start
    measures: dict[str, float]  # `loss` (the last one logged) and the scores of the last step
    episodes: dict[tuple[int, int], bool]  # success by task index and episode index, after the last step


def write_table(folder: Path) -> str:
    """Read the jobs below a sweep's folder, write `sweep.json` and `sweep.txt`, and return the table."""
    jobs = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    rows = summarize([read_job(path) for path in sorted(jobs, key=lambda path: int(path.name))])
    write_json(folder / RESULT, rows)
    table = render(rows)
    write_text(folder / TABLE, table + "\n")
    return table


def read_job(folder: Path) -> Job:
    """Read one run's folder; what is missing stays empty."""
    from vega_policy.training.checkpoint import CONFIG, METRICS  # heavy imports, not needed for --help

    config, metrics = folder / CONFIG, folder / METRICS
    if not config.is_file():
        return Job(folder, {}, {}, {})
    settings = flatten(read_yaml(config))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = read_scores(folder)
    step = max(scores, default=0)
    measures = {"loss": losses[-1]} if losses else {}
    episodes = _read_episodes(folder / "simulation" / f"{step:06d}")
    return Job(folder, settings, measures | scores.get(step, {}), episodes)


def _read_episodes(folder: Path) -> dict[tuple[int, int], bool]:
    from vega_policy.evaluation.episodes import EPISODES_FILE, read_episodes

    shares = sorted(path.parent for path in folder.glob(f"*/{EPISODES_FILE}"))
    return {result.key: result.success for share in shares for result in read_episodes(share)}


def labels(jobs: Sequence[Job]) -> list[str]:
    """Return what distinguishes each job from the others, besides its seed and folder."""
    known = [job.settings for job in jobs if job.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    varied = [
        name
        for name in names
        if name not in ("seed", "output_dir", "resume") and len({repr(s.get(name)) for s in known}) > 1
    ]
    # as users type them
    short = {name: name.removeprefix("policy.").removesuffix(".name") for name in varied}
    return [
        ", ".join(f"{short[name]}={job.settings.get(name)}" for name in varied) or "all alike"
        if job.settings
        else f"job {job.folder.name}: did not start"
        for job in jobs
    ]


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired sign-flip test on a mean difference.

    Under the null hypothesis each pair's difference could as well have had the other sign. It is exact up
    to 16 pairs, then over 100 000 random patterns; with n pairs no p-value is below 2 / 2^n.
    """
    from scipy.stats import permutation_test

    if len(differences) == 1:
        return 1.0
    pairs = (np.asarray(differences, dtype=float), np.zeros(len(differences)))
    outcome = permutation_test(
        pairs,
        lambda a, b, axis: np.sum(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=100_000,
        rng=np.random.default_rng(0),
    )
    return float(outcome.pvalue)


def summarize(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return one row a configuration, in the order of the jobs; all but the first are paired with it.

    Rows have `label`, `seeds`, by measure `mean` and `spread` (sample standard deviation over seeds),
    `successes`, `episodes` and their 95% interval `low`, `high` where there are episodes, and `paired`: by
    measure the mean difference to the first row over common seeds and its sign-flip p-value; for success over
    common episodes with interval and exact p-value, those of an initial state kept together.
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

    measures = {}
    for name in _MEASURES:
        values = [job.measures[name] for job in members if name in job.measures]
        if values:
            spread = stdev(values) if len(values) > 1 else None
            measures[name] = {"mean": fmean(values), "spread": spread, "runs": len(values)}
    row = {"label": label, "seeds": [job.settings.get("seed") for job in members], "measures": measures}
    success = _common_success([job for job in members if job.episodes])
    if not success.size:
        return row
    interval = repeated_wilson_interval(success)
    counts = {"successes": int(success.sum()), "episodes": success.size}
    return row | counts | {"low": interval.low, "high": interval.high}


def _common_success(jobs: Sequence[Job]) -> np.ndarray:
    """Return the success [k n] of k jobs on the n initial states that all of them have.

    A state in several seeds is one observation: its episodes are kept together.
    """
    states = sorted(set.intersection(*(set(job.episodes) for job in jobs))) if jobs else []
    return np.array([[job.episodes[state] for state in states] for job in jobs], dtype=bool)


def _paired(members: Sequence[Job], first: Sequence[Job]) -> dict[str, Any]:
    from vega_policy.evaluation.stats import paired_interval, sign_flip_exact

    reference = {job.settings.get("seed"): job for job in first}
    pairs = [(job, reference[seed]) for job in members if (seed := job.settings.get("seed")) in reference]
    paired: dict[str, Any] = {}
    for name in _MEASURES:
        both = [(a.measures, b.measures) for a, b in pairs if name in a.measures and name in b.measures]
        differences = [a[name] - b[name] for a, b in both]
        if differences:
            paired[name] = {"difference": fmean(differences), "p": sign_flip(differences), "pairs": len(both)}
    # A run that failed has no episodes, and removes only its own pair.
    success = _common_success([job for pair in pairs if all(one.episodes for one in pair) for job in pair])
    if success.size:
        changes = success[::2].astype(int) - success[1::2]
        interval = paired_interval(changes.mean(axis=0))
        paired["success"] = {
            "difference": float(changes.mean()),
            "low": interval.low,
            "high": interval.high,
            "p": sign_flip_exact(changes.sum(axis=0)),
            "pairs": changes.size,
        }
    return paired


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    width = max([len(row["label"]) for row in rows] + [13])
    lines = [f"{'configuration':<{width}}  {'runs':>4}  results"]
    lines += [f"{row['label']:<{width}}  {len(row['seeds']):>4}  {_results(row)}" for row in rows]
    compared = [row for row in rows if row["paired"]]
    if compared:
        lines += ["", f"minus {rows[0]['label']}, paired by seed, success by initial state (sign-flip p):"]
        lines += [f"{row['label']:<{width}}        {_differences(row['paired'])}" for row in compared]
    return "\n".join(lines)


def _results(row: dict[str, Any]) -> str:
    parts = []
    if "episodes" in row:
        rate = 100 * row["successes"] / row["episodes"]
        parts.append(
            f"success {row['successes']}/{row['episodes']} = {rate:.1f}% "
            f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        )
    for name, value in row["measures"].items():
        spread = "" if value["spread"] is None else f" ± {value['spread']:.2g}"
        parts.append(f"{name} {value['mean']:.4g}{spread}")
    return "   ".join(parts) or "no result"


def _differences(paired: dict[str, Any]) -> str:
    parts = []
    for name, value in sorted(paired.items(), key=lambda item: item[0] != "success"):
        if name == "success":
            interval = f"[{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
            parts.append(f"success {100 * value['difference']:+.1f}% {interval} (p {value['p']:.3g})")
        else:
            parts.append(f"{name} {value['difference']:+.4g} (p {value['p']:.3g}, {value['pairs']} pairs)")
    return "   ".join(parts)
