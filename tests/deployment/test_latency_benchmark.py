"""The simulated robot's log is read for what it says, cut-short episodes left out."""

import json

import pytest

from vega_policy.deployment.latency_benchmark import claim, read_runs
from vega_policy.deployment.latency_benchmark import log_table as table


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


def test_whole_episodes_are_counted_with_an_interval(tmp_path):
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
    runs = read_runs("sync", log)
    assert (runs.successes, runs.episodes, runs.held_share, runs.seconds_to_success) == (2, 3, 0.1, 2.5)
    assert 0.2 < runs.low < 2 / 3 < runs.high < 0.95
    assert "| sync | 2/3 |" in table([runs])
    assert read_runs("first", log, episodes=2).episodes == 2
    with pytest.raises(ValueError, match="3 whole episodes, expected 50"):
        read_runs("sync", log, episodes=50)


def test_a_folder_of_other_episodes_is_refused(tmp_path):
    claim(tmp_path / "logs", {"extra_latency": 0.3})
    claim(tmp_path / "logs", {"extra_latency": 0.3})
    with pytest.raises(ValueError, match=r"(?s)0\.3.*not of.*0\.6"):
        claim(tmp_path / "logs", {"extra_latency": 0.6})


def test_a_log_of_an_older_version_is_refused(tmp_path):
    log = tmp_path / "old.jsonl"
    line = {"episode": 0, "success": True, "steps": 3, "held_steps": 0, "late_steps": 0, "cut_short": False}
    log.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="older version"):
        read_runs("sync", log)
