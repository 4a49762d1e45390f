"""Logs of the simulated robot are summarized without the episodes that were cut short."""

import json
import sys

import pytest

from vega_policy.deployment.latency_benchmark import benchmark_inference, summarize_log
from vega_policy.run_dir import OtherRunError


def episode(success, **changes):
    whole = {
        "success": success,
        "steps": 50,
        "held_steps": 5,
        "late_steps": 0,
        "seconds": 2.5,
        "won_at": 2.5 if success else None,
        "cut_short": False,
    }
    return json.dumps(whole | changes)


def test_complete_episodes_are_counted_with_an_interval(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        episode(True),
        episode(False),
        episode(False, cut_short=True),
        episode(True, cut_short=True),  # counted only if failures were, too
        '{"event": "client gone"}',
        episode(True),
    ]
    log.write_text("\n".join(lines))
    row = summarize_log("sync", log)
    expected = {"run": "sync", "success": 2, "episodes": 3, "held_fraction": 0.1, "seconds_to_success": 2.5}
    assert {key: row[key] for key in expected} == expected
    assert 0.2 < row["low"] < 2 / 3 < row["high"] < 0.95
    assert summarize_log("first", log, episodes=2)["episodes"] == 2
    with pytest.raises(ValueError, match="3 complete episodes, expected 50"):
        summarize_log("sync", log, episodes=50)


DEPLOY = """
import json, pathlib, sys
fields = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(fields["output_dir"])
folder.mkdir(exist_ok=True)
lines = [json.loads(sys.argv[-1].partition("=")[2])] * int(fields["episodes"])
with (folder / "vega_sim.jsonl").open("a") as log:
    log.writelines(json.dumps(line) + "\\n" for line in lines)
"""


def test_inference_modes_alternate_and_a_comparison_resumes(tmp_path):
    output, command = tmp_path / "logs", [sys.executable, "-c", DEPLOY]
    overrides = [f"record={episode(True)}"]
    first, _ = benchmark_inference(overrides, output=output, episodes=3, block=2, command=command)
    assert (first["run"], first["success"], first["episodes"]) == ("sync", 3, 3)
    rows = benchmark_inference(overrides, output=output, episodes=4, block=2, command=command)
    assert [(row["run"], row["episodes"]) for row in rows] == [("sync", 4), ("rtc", 4)]
    with pytest.raises(OtherRunError, match="extra_latency"):
        benchmark_inference(overrides, output=output, extra_latency=0.6, command=command)
    with pytest.raises(RuntimeError, match="no episode was added"):
        benchmark_inference(overrides, output=tmp_path / "other", command=[sys.executable, "-c", ""])


def test_a_log_of_an_older_version_is_refused(tmp_path):
    log = tmp_path / "old.jsonl"
    line = {"episode": 0, "success": True, "steps": 3, "held_steps": 0, "late_steps": 0, "cut_short": False}
    log.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="older version"):
        summarize_log("sync", log)
