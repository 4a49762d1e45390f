"""How often the demonstrators succeed, task by task: `scripts/demonstrator_table.py --processes 16`.

Without names of suites: 20 episodes a task of LIBERO's spatial, object, goal and 10 on fresh resets, 20
official states a task of LIBERO-PRO's swap suites, and 3 episodes a task of Meta-World MT50.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from envs.success import TaskSuccess, measure, success_table

BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def main() -> None:
    """Play, print each task as it ends, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", help="names of suites")
    parser.add_argument("--episodes", type=int, default=20, help="of each task (of MT50: at most 3)")
    parser.add_argument("--official", action="store_true", help="named suites start from official states")
    parser.add_argument("--tasks", type=int, nargs="*", help="indices of tasks; all if not given")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for all lengths")
    options = parser.parse_args()
    plan = [(options.suites, options.official, options.episodes)]
    if not options.suites:
        swapped = [f"{suite}_swap" for suite in BASES]
        plan = [(BASES, False, options.episodes), (swapped, True, options.episodes)]
        plan.append((["metaworld_mt50"], False, min(3, options.episodes)))
    started, results = time.perf_counter(), list[TaskSuccess]()
    try:
        for suites, official, episodes in plan:
            arguments = {"processes": options.processes, "only": options.tasks}
            for result in measure(suites, episodes=episodes, official=official, **arguments):
                results.append(result)
                counts = f"{result.successes}/{len(result.lengths)}"
                print(f"{result.task.suite} {result.task.index} {result.task.name}: {counts}", flush=True)
    except ValueError as error:
        sys.exit(str(error))
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(f"\n{success_table(results)}\n\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
