"""Compare evaluations of the same episodes: `python scripts/compare_runs.py FOLDER FOLDER`.

Two evaluations are compared task by task; two or more policies' folders, `<seed>/<suite>`, suite by suite.
"""

import argparse
from pathlib import Path

from vega_policy.evaluation.compare import (
    compare_policies,
    compare_runs,
    comparison_notes,
    comparison_table,
    evaluations_below,
    read_policies,
    results_table,
)
from vega_policy.evaluation.episodes import write_json


def main() -> None:
    """Print the paired differences in success, first minus second, with McNemar's exact test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="two or more; the last is the reference")
    parser.add_argument("--first-ablation", default="none", help="ablation of all folders but the last")
    parser.add_argument("--second-ablation", default="none", help="ablation of the last folder")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers")
    options = parser.parse_args()
    if len(options.folders) < 2:
        parser.error("give at least two folders; the same one twice, with --second-ablation, for an ablation")
    single = len(options.folders) == 2 and not any(evaluations_below(folder) for folder in options.folders)
    try:
        numbers, text = _evaluations(options) if single else _policies(options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        write_json(options.json, numbers)
    print(text)


def _evaluations(options: argparse.Namespace) -> tuple[dict, str]:
    ablations = {"first_ablation": options.first_ablation, "second_ablation": options.second_ablation}
    comparison = compare_runs(*options.folders, **ablations)
    notes = comparison_notes(*options.folders, **ablations)
    table = comparison_table(comparison, markdown=options.markdown)
    return {"tasks": comparison, "notes": notes}, "\n".join([*notes, "", table])


def _policies(options: argparse.Namespace) -> tuple[dict, str]:
    ablations = [options.first_ablation] * (len(options.folders) - 1) + [options.second_ablation]
    comparison = compare_policies(read_policies(options.folders, ablations))
    return comparison.numbers(), results_table(comparison, markdown=options.markdown)


if __name__ == "__main__":
    main()
