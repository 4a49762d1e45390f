"""Collect demonstrations: `python scripts/collect_demos.py env=lift_wide episodes_per_task=50`."""

from vega_policy.cli.commands import collect

if __name__ == "__main__":
    collect.main()
