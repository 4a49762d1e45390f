"""Measure how often the demonstrators succeed: `python scripts/demonstrator_table.py processes=16`.

Without `suites`: 20 episodes a task of LIBERO's spatial, object, goal and 10 on fresh resets, 20 official
states a task of LIBERO-PRO's swap suites, and 3 episodes a task of Meta-World MT50.
"""

import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vega_policy.cli.app import Command

logger = logging.getLogger(__name__)

BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
FIELDS: dict[str, Any] = {
    "suites": [],
    "episodes": 20,  # of each task
    "official": False,  # named suites start from official states
    "tasks": None,  # indices; null takes all
    "swap_episodes": 20,  # official states a task of the swap suites
    "processes": 2,
    "output": None,  # JSON file that grows as tasks end; the same command resumes while the code is the same
}


def run(config: DictConfig) -> str:
    """Roll out, log each task as it ends, and return the table."""
    from envs.demos.success_rate import (
        code_version,
        load_results,
        measure,
        merged,
        save_results,
        success_table,
    )

    suites, tasks = list(config.suites), config.tasks
    plan = [(suites, config.official, config.episodes)]
    if not suites:
        swapped = [f"{suite}_swap" for suite in BASES]
        plan = [(BASES, False, config.episodes), (swapped, True, config.swap_episodes)]
        plan.append((["metaworld_mt50"], False, min(3, config.episodes)))
    output = None if config.output is None else Path(config.output)
    start, results, known = time.perf_counter(), [], [] if output is None else load_results(output)
    for names, official, episodes in plan:
        options = {"processes": config.processes, "only": tasks, "known": known}
        for result in measure(names, episodes=episodes, official=official, **options):
            results.append(result)
            known = merged(known, result)
            if output is not None:
                save_results(output, known)
            task, counts = result.task, f"{result.successes}/{len(result.lengths)}"
            seconds = time.perf_counter() - start
            logger.info("%.0f s: %s %d %s: %s", seconds, task.suite, task.index, task.name, counts)
    return f"\n{success_table(results)}\n\n{time.perf_counter() - start:.0f} s, code {code_version()}"


main = Command(
    config="demonstrators",
    run=run,
    summary="Measure how often the scripted demonstrators succeed, task by task.",
    examples=["python scripts/demonstrator_table.py libero_goal episodes=5 processes=16"],
    node=FIELDS,
    positional=("suites...",),
).main

if __name__ == "__main__":
    main()
