"""Compare logs of the simulated robot: `python scripts/rollout_table.py sync=FILE rtc=FILE --episodes 50`."""

import argparse
from pathlib import Path

from vega_policy.deployment.latency_benchmark import log_table as table
from vega_policy.deployment.latency_benchmark import read_runs


def main() -> None:
    """Print success with 95% Wilson intervals, and whether time was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", help="NAME=FILE")
    parser.add_argument("--episodes", type=int, help="only the first so many of each")
    options = parser.parse_args()
    try:
        runs = [
            read_runs(name, Path(path), options.episodes)
            for name, _, path in (log.partition("=") for log in options.logs)
        ]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(table(runs))


if __name__ == "__main__":
    main()
