"""Compare evaluations: `python scripts/compare_runs.py assets/results/{wan_tiny,none}`."""

from vega_policy.cli.compare import main

if __name__ == "__main__":
    main()
