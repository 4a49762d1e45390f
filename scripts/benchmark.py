"""What each part costs on this machine: `python scripts/benchmark.py prior --frames 1 2 8 32`.

Parts: prior (the Wan prior plain and fast, any other plain), policy (a control step, stage by stage),
train (a training step, stage by stage), dataset (the trainer with videos, a warm cache, and no prior),
simulate (environment steps and rendering). Prints a table; `--output` also writes JSON.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

import torch

from vega_policy.benchmarks.policy import PARTS, add_options, rows_of
from vega_policy.benchmarks.timing import cost_of_prior, device_name, ratios, table, write


def main() -> None:
    """Run one part and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    add_options(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = torch.device(options.device)
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    rows = []
    print(f"{options.part} on {device_name(device)}", flush=True)
    try:
        for row in rows_of(options.part, options, device):
            rows.append(row)
            print("  ".join(f"{name}={value}" for name, value in row.items()), file=sys.stderr, flush=True)
            if options.output is not None:  # after each row: what was measured outlives a kill
                write(Path(options.output), options.part, rows, command, device)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    print(table(rows))
    if options.part == "train":
        print("\n".join(cost_of_prior(rows)))
    if options.part == "prior":
        for baseline in ("released", "all_blocks", "early_stop"):
            print("\n".join(ratios(rows, baseline, "fast")))


if __name__ == "__main__":
    main()
