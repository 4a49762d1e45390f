"""`vega-compare`: compare evaluations of the same episodes."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vega_policy.cli.app import Command

FIELDS = {
    "folders": "???",  # two or more evaluations or policies (<seed>/<suite> below); the last is the reference
    "first_ablation": "none",  # ablation of all folders but the last
    "second_ablation": "none",  # ablation of the last folder
    "markdown": False,  # print Markdown
    "json": None,  # file that also receives all numbers
}


def run(config: DictConfig) -> str:
    """Return paired differences in success, first minus second, with McNemar's exact test."""
    from vega_policy.evaluation.compare import evaluations_below
    from vega_policy.run_dir import write_json

    folders = [Path(folder) for folder in config.folders]
    if len(folders) < 2:
        raise ValueError(
            f"folders: expected at least two, got {len(folders)}. For an ablation of one evaluation give its "
            "folder twice and second_ablation=blind."
        )
    single = len(folders) == 2 and not any(evaluations_below(folder) for folder in folders)
    numbers, text = (_evaluations if single else _policies)(folders, config)
    if config.json:
        write_json(Path(config.json), numbers)
    return text


def _evaluations(folders: list[Path], config: DictConfig) -> tuple[dict[str, Any], str]:
    from vega_policy.evaluation.compare import compare_runs, comparison_notes, comparison_table

    ablations = {"first_ablation": config.first_ablation, "second_ablation": config.second_ablation}
    comparison = compare_runs(*folders, **ablations)
    notes = comparison_notes(*folders, **ablations)
    table = comparison_table(comparison, markdown=config.markdown)
    return {"tasks": comparison, "notes": notes}, "\n".join([*notes, "", table])


def _policies(folders: list[Path], config: DictConfig) -> tuple[dict[str, Any], str]:
    from vega_policy.evaluation.compare import compare_policies, read_policies, results_table

    ablations = [config.first_ablation] * (len(folders) - 1) + [config.second_ablation]
    comparison = compare_policies(read_policies(folders, ablations))
    return comparison.numbers(), results_table(comparison, markdown=config.markdown)


main = Command(
    config="compare",
    run=run,
    summary="Compare evaluations of the same episodes: paired differences in success with intervals.",
    examples=[
        "vega-compare outputs/eval/A outputs/eval/B                two evaluations, task by task",
        "vega-compare assets/results/{wan_tiny,none}               policies, suite by suite and over seeds",
        "vega-compare outputs/eval/A outputs/eval/A second_ablation=blind",
    ],
    node=FIELDS,
    positional=("folders...",),
).main
