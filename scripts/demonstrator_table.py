"""How often the demonstrators succeed, task by task: `scripts/demonstrator_table.py --processes 16`.

Without names of suites: 20 episodes a task of LIBERO's spatial, object, goal and 10 on fresh resets, 20
official states a task of LIBERO-PRO's swap suites, and 3 episodes a task of Meta-World MT50. With --output,
the results so far lie in that file, and the same command, or one that asks for more episodes, goes on, as
long as the code that plays has not changed. LIBERO needs neither LeRobot nor Hydra; Meta-World, whose
tasks LeRobot lists, needs LeRobot.
"""

import argparse
import sys
import time
from pathlib import Path

from envs.demos.success_rate import (
    TaskSuccess,
    code_version,
    load_results,
    measure,
    merged,
    save_results,
    success_table,
)

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
    parser.add_argument("--output", type=Path, help="JSON file of all lengths; grows as tasks end")
    parser.add_argument("--swap-episodes", type=int, default=20, help="official states a task, without names")
    options = parser.parse_args()
    plan = [(options.suites, options.official, options.episodes)]
    if not options.suites:
        swapped = [f"{suite}_swap" for suite in BASES]
        plan = [(BASES, False, options.episodes), (swapped, True, options.swap_episodes)]
        plan.append((["metaworld_mt50"], False, min(3, options.episodes)))
    started, results = time.perf_counter(), list[TaskSuccess]()
    try:
        known = [] if options.output is None else load_results(options.output)
        for suites, official, episodes in plan:
            arguments = {"processes": options.processes, "only": options.tasks, "known": known}
            for result in measure(suites, episodes=episodes, official=official, **arguments):
                results.append(result)
                known = merged(known, result)
                if options.output is not None:
                    save_results(options.output, known)
                counts = f"{result.successes}/{len(result.lengths)}"
                elapsed = f"{time.perf_counter() - started:.0f} s"
                print(
                    f"{elapsed}: {result.task.suite} {result.task.index} {result.task.name}: {counts}",
                    flush=True,
                )
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"\n{success_table(results)}\n\n{time.perf_counter() - started:.0f} s, code {code_version()}")


if __name__ == "__main__":
    main()
