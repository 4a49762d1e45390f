"""Serve a checkpoint: `python scripts/serve_policy.py checkpoint=outputs/demo/train/checkpoints/last`."""

from vega_policy.cli.serve import main

if __name__ == "__main__":
    main()
