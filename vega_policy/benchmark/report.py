"""What a benchmark leaves behind: a table on the screen and the same rows as JSON."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vega_policy.benchmark.timing import device_name

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns; a field that a row lacks stays empty, one that holds fields is left out.

    Args:
        rows: Plain values by column.
    """
    fields = (column for row in rows for column, value in row.items() if not isinstance(value, dict))
    columns = list(dict.fromkeys(fields))
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ratios(rows: Sequence[Row], baseline: str, subject: str) -> list[str]:
    """How much faster `subject` is than `baseline`, one sentence for each size and number of frames.

    Args:
        rows: Rows of the part `prior`.
        baseline: A path.
        subject: A path; its variants (`fast/encode=8`) count too.
    """
    times = {(row["size"], row["frames"], row["path"]): row["p50_ms"] for row in rows}
    return [
        f"{size}, {frames} frames: {path} is {times[size, frames, baseline] / time:.1f} times as fast as "
        f"{baseline}"
        for (size, frames, path), time in times.items()
        if path.split("/")[0] == subject and (size, frames, baseline) in times
    ]


def cost_of_prior(rows: Sequence[Row]) -> list[str]:
    """Share of the steps a second without a prior that is left with one, one sentence for each row of it.

    Args:
        rows: Rows of the part `train`.
    """
    none = {row["variant"]: row["step_ms"] for row in rows if row["prior"] == "none"}
    return [
        f"prior {row['prior']}, {row['variant']}: {none[row['variant']] / row['step_ms']:.2f} of the steps a "
        "second without a prior"
        for row in rows
        if row["prior"] != "none" and row["variant"] in none
    ]


def write(path: Path, part: str, rows: Sequence[Row], command: str, device: torch.device) -> None:
    """Write rows with all that one needs to know about where they come from.

    Args:
        path: JSON file; its folder is made.
        part: Name of the part.
        rows: The part's rows.
        command: Command line that made them.
        device: Where it ran.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "part": part,
        "command": command,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
