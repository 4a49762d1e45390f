"""Measure the time of each part: `python scripts/benchmark.py prior`."""

from vega_policy.cli.benchmark import main

if __name__ == "__main__":
    main()
