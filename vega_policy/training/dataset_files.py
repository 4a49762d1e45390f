"""Whether the files of a local LeRobot dataset are whole, found out before anything is built."""

import json
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

BOX_HEADER = struct.Struct(">I4s")
"""Size and type of an MP4 box (ISO/IEC 14496-12); a size of 1 means that 64 bits of it follow."""


def damaged_files(root: Path) -> list[str]:
    """Files that are truncated or that nothing can read, and tables that hold fewer rows than announced.

    Only headers and footers are read: it takes milliseconds a file.

    Args:
        root: Folder of a LeRobotDataset v3.

    Returns:
        One phrase a finding, with the file's path below the root; empty if all is whole.
    """
    findings, rows = [], 0
    for path in sorted(root.glob("**/*.parquet")):
        name = path.relative_to(root)
        try:
            held = parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowInvalid, OSError):
            findings.append(f"{name} is no whole Parquet file ({path.stat().st_size} bytes)")
            continue
        rows += held if name.parts[0] == "data" else 0
    announced = json.loads((root / "meta" / "info.json").read_text())["total_frames"]
    if not findings and rows != announced:
        findings.append(f"data/ holds {rows} rows, meta/info.json announces {announced}")
    videos = sorted(root.glob("videos/**/*.mp4"))
    return findings + [f"{path.relative_to(root)} is truncated" for path in videos if not _whole(path)]


def _whole(video: Path) -> bool:
    """Whether an MP4 file is as long as its boxes say."""
    end, size = 0, video.stat().st_size
    with video.open("rb") as file:
        while end + BOX_HEADER.size <= size:
            file.seek(end)
            length, _ = BOX_HEADER.unpack(file.read(BOX_HEADER.size))
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length < BOX_HEADER.size:
                return False
            end += length
    return end == size > 0
