"""From episodes to numbers: summary.json and the table that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vega_policy.evaluation.episodes import EpisodeResult
from vega_policy.evaluation.policies import PolicyDescription
from vega_policy.evaluation.run_folder import Progress
from vega_policy.evaluation.statistics import (
    mcnemar_exact,
    mean_of_groups,
    mean_of_tasks,
    paired_interval,
    wilson_interval,
)


def summarize(
    results: Mapping[str, Sequence[EpisodeResult]],
    description: PolicyDescription,
    progress: Progress,
    settings: dict[str, Any],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of summary.json.

    The numbers at the top are those of the first control that was played, which is the policy as it is unless
    only a control was asked for; `control` names it. Rates lie in [0, 1], durations are in seconds or
    milliseconds as named.

    Args:
        results: Finished episodes of each control, in order of play.
        description: What the policy was trained on.
        progress: What the evaluation cost.
        settings: Everything that decided the results.
        groups: Group of each task, empty where the suite has none.
    """
    controls = {name: _summarize_control(episodes, groups) for name, episodes in results.items()}
    first = next(iter(controls))
    return {
        "control": first,
        "success_rate": controls[first]["success_rate"],
        "ci_low": controls[first]["ci_low"],
        "ci_high": controls[first]["ci_high"],
        "episodes": controls[first]["episodes"],
        "blind_success_rate": controls["blind"]["success_rate"] if "blind" in controls else None,
        "policy": description.name,
        "prior": description.prior,
        "action_steps": description.action_steps,
        "seconds_total": round(progress.seconds, 3),
        "latency": latency(progress, first, settings["slots"]),
        "controls": controls,
        "paired": [
            {"first": first, "second": other, **paired_difference(results[first], results[other])}
            for other in controls
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


def latency(progress: Progress, control: str, slots: int) -> dict[str, Any]:
    """Return median and 95th percentile of a policy call in milliseconds, batched and for one observation."""
    # The first call of a process also pays for warming up.
    batched = progress.call_seconds[control][1:] or progress.call_seconds[control]
    return {
        "batch_size": slots,
        "batched_calls": len(batched),
        **_percentiles("batched", batched),
        "single_calls": len(progress.single_call_seconds),
        **_percentiles("single", progress.single_call_seconds),
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text: a line for each task and control, with 95% Wilson intervals."""
    lines = [f"{'control':<10} {'task':<28} {'success':>12} {'rate':>7}   {'95% interval':<16} {'length':>7}"]
    for control, numbers in summary["controls"].items():
        rows = dict(numbers["tasks"]) if len(numbers["tasks"]) > 1 else {}
        rows[f"all ({len(numbers['tasks'])} tasks)" if rows else next(iter(numbers["tasks"]))] = numbers
        for task, row in rows.items():
            count = f"{row['successes']}/{row['episodes']}"
            interval = f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
            rate = f"{100 * row['success_rate']:.1f}%"
            lines.append(
                f"{control:<10} {task:<28} {count:>12} {rate:>7}   {interval:<16} {row['mean_length']:>7.1f}"
            )
        if numbers["mean_of_groups"] is not None:
            lines.append(
                f"{control:<10} mean of tasks {100 * numbers['mean_of_tasks']:.1f}%, "
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


def _summarize_control(results: Sequence[EpisodeResult], groups: Mapping[str, str]) -> dict[str, Any]:
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
