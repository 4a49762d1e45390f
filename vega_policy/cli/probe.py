"""`vega-probe`: measure what a frozen prior encodes about space."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Probe and return where the report is."""
    from vega_policy.analysis.config import decode
    from vega_policy.analysis.probe import run as probe

    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return f"report: {probe(decode(values))}"


main = Command(
    config="probe",
    run=run,
    summary="Measure what a frozen prior encodes about space: correspondence, linear probes, questions.",
    examples=[
        "vega-probe prior=wan_tiny scenes=libero_spatial",
        "vega-probe prior=wan_tiny prior.path=FOLDER                  other weights against untrained ones",
        "vega-probe scenes=folder 'scenes.folders=[A,B,C]'            posed frames (transforms.json)",
    ],
).main
