"""Export features of any model over a LeRobot dataset, for `prior=precomputed prior.path=FOLDER`.

Run it where the model's own repository is installed (VGGT, SEVA, Vmem, ...). ENCODER names a function of
yours as `module:function`; it is called as `function(device)` and gives back a callable

    frames float32 [n v 3 h h] in [0, 1], on the device  ->  features [n v d gh gw]

which normalises frames as its model wants, sees all views of an instant together, keeps the whole frame (no
crop, no letterbox) and returns the patch tokens of the layer you chose at their places, at least as many as
the backbone has (14x14 for the compact one at 224 pixels). Frames come in the dataset's order of cameras.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vega_policy.data.video import frames_in_order
from vega_policy.model.observation import stack_views
from vega_policy.priors.precomputed import FeatureWriter


def main() -> None:
    """Read every frame once, and write one shard a batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", help="module:function, looked for in the working folder too")
    parser.add_argument("--repo-id", required=True, help="the dataset's name")
    parser.add_argument("--root", type=Path, help="its local folder")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the features")
    parser.add_argument("--frame-size", type=int, default=224, help="the policy's frame_size")
    parser.add_argument("--batch-size", type=int, default=32, help="instants encoded at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    sys.path.insert(0, str(Path.cwd()))
    module, name = options.encoder.split(":")
    encode = getattr(import_module(module), name)(options.device)
    writer = FeatureWriter(options.output, options.encoder)
    dataset = LeRobotDataset(options.repo_id, root=options.root, video_backend="pyav")
    for stretch in frames_in_order(dataset, list(dataset.meta.camera_keys), "pyav"):
        length = len(next(iter(stretch.values())))
        for start in range(0, length, options.batch_size):
            clips = {camera: clip[start : start + options.batch_size] for camera, clip in stretch.items()}
            views = {camera: clip.to(options.device).float() / 255 for camera, clip in clips.items()}
            frames = stack_views(views, options.frame_size)[:, :, 0]
            with torch.no_grad():
                writer.add(frames, encode(frames))
    writer.close()
    print(f"features: {options.output}")


if __name__ == "__main__":
    main()
