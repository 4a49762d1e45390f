"""Measure the time of each part: `python scripts/benchmark.py prior`."""

from vega_policy.cli.commands import benchmark

if __name__ == "__main__":
    benchmark.main()
