"""Train a small Wan: `python scripts/pretrain_prior.py`."""

from vega_policy.cli.commands import pretrain

if __name__ == "__main__":
    pretrain.main()
