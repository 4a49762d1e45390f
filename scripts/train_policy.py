"""Train a policy: `python scripts/train_policy.py experiment=demo`."""

from vega_policy.cli.train import main

if __name__ == "__main__":
    main()
