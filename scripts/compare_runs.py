"""Compare evaluations: `python scripts/compare_runs.py assets/results/{wan_tiny,none}`."""

from vega_policy.cli.commands import compare

if __name__ == "__main__":
    compare.main()
