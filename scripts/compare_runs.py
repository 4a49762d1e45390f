"""Compare two evaluations of the same episodes: `python scripts/compare_runs.py FOLDER_A FOLDER_B`."""

import argparse
from pathlib import Path

from vega_policy.evaluation.comparison import UnpairedRunsError, compare_runs, comparison_table


def main() -> None:
    """Print the paired difference in success, first minus second, with McNemar's exact test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path, help="folder of the first evaluation")
    parser.add_argument("second", type=Path, help="folder of the second; the first one again for a control")
    parser.add_argument("--first-control", default="none")
    parser.add_argument("--second-control", default="none")
    options = parser.parse_args()
    try:
        comparison = compare_runs(
            options.first,
            options.second,
            first_control=options.first_control,
            second_control=options.second_control,
        )
    except (FileNotFoundError, UnpairedRunsError) as error:
        parser.error(str(error))
    print(comparison_table(comparison))


if __name__ == "__main__":
    main()
