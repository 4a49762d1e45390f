"""Collect demonstrations: `python scripts/collect_demos.py env=lift_wide episodes_per_task=50`."""

from vega_policy.cli.collect import main

if __name__ == "__main__":
    main()
