"""Evaluate a checkpoint: `python scripts/eval_policy.py checkpoint=outputs/demo/train/checkpoints/last`."""

from vega_policy.cli.eval import main

if __name__ == "__main__":
    main()
