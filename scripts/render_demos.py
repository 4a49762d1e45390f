"""Render demonstrations again: `python scripts/render_demos.py SOURCE NEW --frame-size 256 --rendering full`.

Simulator states lie beside every dataset that scripts/collect_demos.py wrote, so pictures of another size or
rendering profile cost no new simulation.
"""

import argparse
import sys
from pathlib import Path

from envs.demos.render import render_again
from envs.demos.shards import CODECS
from envs.rendering import PROFILES


def main() -> None:
    """Render, then print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a dataset that scripts/collect_demos.py wrote")
    parser.add_argument("root", type=Path, help="where the new dataset will lie")
    parser.add_argument("--frame-size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--rendering", choices=PROFILES, default="full")
    parser.add_argument(
        "--video", choices=CODECS, help="how frames are stored; the source's way if not given"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    try:
        metadata = render_again(
            options.source,
            options.root,
            frame_size=options.frame_size,
            rendering=options.rendering,
            video=options.video,
            processes=options.processes,
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the finished shards")
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"{len(metadata['episodes'])} demonstrations of {options.frame_size} pixels: {options.root}")


if __name__ == "__main__":
    main()
