"""Write a policy to be published: `python scripts/export_policy.py outputs/RUN/checkpoints/last FOLDER`."""

from pathlib import Path

from omegaconf import DictConfig

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Write the folder and return its path and size."""
    from vega_policy.training.checkpoint import export_policy

    folder = export_policy(Path(config.checkpoint), Path(config.output))
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"policy: {folder} ({size / 1e6:.1f} MB)"


main = Command(
    config="export_policy",
    run=run,
    summary="Write the policy of a checkpoint, in bfloat16 and without training state, to a new folder.",
    examples=["python scripts/export_policy.py outputs/demo/train/checkpoints/last my_policy"],
    node={
        "checkpoint": "???",  # a checkpoint of a run
        "output": "???",  # new folder
    },
    positional=("checkpoint", "output"),
).main

if __name__ == "__main__":
    main()
