"""Export features of any model over a LeRobot dataset, for `prior=precomputed prior.path=FOLDER`.

Run it where the model's own repository is installed (VGGT, SEVA, Vmem, ...). `encoder` names a function of
yours as module:function, called as `function(device)`. It returns a callable

    frames float32 [n v 3 h h] in [0, 1], on the device  ->  features [n v d gh gw]

that normalizes frames as its model requires, reads all views of an instant together, keeps the whole frame
(no crop, no letterbox) and returns the patch tokens of one layer at their places, at least as many as the
backbone has (14x14 for the compact one at 224 pixels). Views come in the dataset's order of cameras.
"""

import sys
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Read every frame once, write one shard a batch, and return the folder."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vega_policy.data.video import frames_in_order
    from vega_policy.model.observation import stack_views
    from vega_policy.priors.precomputed import FeatureWriter

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sys.path.insert(0, str(Path.cwd()))  # the encoder's module may be in the working folder
    module, name = config.encoder.split(":")
    encode = getattr(import_module(module), name)(device)
    writer = FeatureWriter(Path(config.output), config.encoder)
    dataset = LeRobotDataset(config.repo_id, root=config.root, video_backend="pyav")
    for stretch in frames_in_order(dataset, list(dataset.meta.camera_keys), "pyav"):
        length = len(next(iter(stretch.values())))
        for start in range(0, length, config.batch_size):
            clips = {camera: clip[start : start + config.batch_size] for camera, clip in stretch.items()}
            views = {camera: clip.to(device).float() / 255 for camera, clip in clips.items()}
            frames = stack_views(views, config.frame_size)[:, :, 0]
            with torch.no_grad():
                writer.add(frames, encode(frames))
    writer.close()
    return f"features: {config.output}"


main = Command(
    config="export",
    run=run,
    summary="Export features of any model over a LeRobot dataset, for prior=precomputed.",
    examples=["python scripts/export_features.py my_model:encoder repo_id=ORG/NAME output=features"],
    node={
        "encoder": "???",  # module:function, see the head of this file
        "repo_id": "???",  # dataset
        "root": None,  # its local folder
        "output": "???",  # new folder for the features
        "frame_size": 224,  # the policy's frame_size
        "batch_size": 32,  # instants encoded at once
        "device": None,  # null: cuda where there is one
    },
    positional=("encoder",),
).main

if __name__ == "__main__":
    main()
