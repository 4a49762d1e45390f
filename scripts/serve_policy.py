"""Serve a checkpoint: `python scripts/serve_policy.py checkpoint=outputs/demo/train/checkpoints/last`."""

from vega_policy.cli.commands import serve

if __name__ == "__main__":
    serve.main()
