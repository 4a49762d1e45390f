"""Open-loop evaluation: errors against closed forms, and a checkpoint on its run's held-out episodes."""

import json

import numpy as np
import pytest
import torch

from tests.training_runs import tiny_run
from vega_policy.cli.commands import evaluate_offline
from vega_policy.data.dataset import read_table
from vega_policy.evaluation.open_loop import measure
from vega_policy.training.train import train


def test_errors_are_those_of_the_closed_form_without_padded_actions(root):
    table = read_table(root)
    rows = torch.tensor([0, 7, 9, 26])

    def exact_plus_one(rows):
        return table.chunks(rows, 4)[0].numpy() + 1.0

    errors = measure(exact_plus_one, table, rows, None)
    assert errors.policy == pytest.approx(np.ones(7))
    recorded = [(0, k) for k in range(4)] + [(7, 7), (7, 8)] + [(9, 9 + k) for k in range(4)] + [(26, 26)]
    last = {0: 0, 7: 6, 9: 9, 26: 25}  # 0 and 9 begin an episode
    expected = np.mean(
        [(table.action[last[row]] - table.action[now]).abs().numpy() for row, now in recorded], 0
    )
    assert errors.last_action == pytest.approx(expected, rel=1e-5)
    mean = table.action.mean(0)
    assert errors.mean_action == pytest.approx(
        np.mean([(mean - table.action[now]).abs().numpy() for _, now in recorded], 0), rel=1e-5
    )
    assert errors.names[6] == "action[6]"


def test_a_checkpoint_is_measured_on_the_episodes_that_its_run_held_out(root, tmp_path, capsys):
    run = tiny_run(root, tmp_path / "run", dataset={"held_out": 0.4}, steps=1)
    checkpoint = train(run)
    evaluate_offline.main([str(checkpoint), f"output_dir={tmp_path / 'report'}", "device=cpu"])
    printed = capsys.readouterr().out
    assert "over 18 chunks" in printed  # episodes 1 and 2
    report = json.loads((tmp_path / "report" / "open_loop.json").read_text())
    assert len(report["policy"]) == 7
    assert (tmp_path / "report" / "open_loop.png").stat().st_size > 10_000


def test_a_run_that_held_out_nothing_names_what_to_give(root, tmp_path):
    checkpoint = train(tiny_run(root, tmp_path / "run", steps=1))
    with pytest.raises(SystemExit, match=r"held out no episodes.*episodes=\[\.\.\.\]"):
        evaluate_offline.main([str(checkpoint), f"output_dir={tmp_path / 'report'}", "device=cpu"])
