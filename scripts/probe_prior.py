"""Probe a prior: `python scripts/probe_prior.py prior=wan_tiny scenes=libero_spatial`."""

from vega_policy.cli.commands import probe

if __name__ == "__main__":
    probe.main()
