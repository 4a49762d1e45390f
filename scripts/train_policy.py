"""Train a policy: `python scripts/train_policy.py experiment=demo`."""

from vega_policy.cli.commands import train

if __name__ == "__main__":
    train.main()
