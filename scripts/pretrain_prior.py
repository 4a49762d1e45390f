"""Train a small Wan: `python scripts/pretrain_prior.py`."""

from vega_policy.cli.pretrain import main

if __name__ == "__main__":
    main()
