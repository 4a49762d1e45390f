"""Evaluate a checkpoint: `python scripts/eval_policy.py checkpoint=outputs/demo/train/checkpoints/last`."""

from vega_policy.cli.commands import evaluate

if __name__ == "__main__":
    evaluate.main()
