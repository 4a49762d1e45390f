"""Open-loop evaluation: errors against closed forms, and a checkpoint on its run's held-out episodes."""

import json

import numpy as np
import pytest
import torch

from tests.training_runs import tiny_run
from vega_policy.cli.commands import compare, evaluate_offline
from vega_policy.data.dataset import read_table
from vega_policy.evaluation.compare import compare_open_loop
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
    errors = np.array(list(report["by_episode"].values()))
    assert errors.shape == (2, 7)
    compare.main([str(tmp_path / "report")] * 2)
    assert "over 18 chunks of 2 episodes" in capsys.readouterr().out


def write_errors(folder, by_episode, **changed):
    policy = np.mean(by_episode, axis=0).tolist()
    report = {"joints": ["pan", "lift"], "chunks": 6, "policy": policy}
    report |= {"last_action": [2.0, 2.0], "mean_action": [3.0, 3.0], **changed}
    report["by_episode"] = {str(number): errors for number, errors in enumerate(by_episode)}
    folder.mkdir()
    (folder / "open_loop.json").write_text(json.dumps(report))
    return folder


def test_two_policies_are_compared_on_the_same_episodes_with_students_interval(tmp_path):
    first = write_errors(tmp_path / "first", [[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]])
    second = write_errors(tmp_path / "second", [[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    lines = compare_open_loop(first, second).splitlines()
    assert lines[1].split() == ["pan", "3", "2", "+1", "[-3.968,", "+5.968]"]  # 1 +- 4.303 * 2 / sqrt(3)
    assert lines[2].split() == ["lift", "2", "1", "+1", "[+1,", "+1]"]
    other = write_errors(tmp_path / "other", [[1.0, 2.0]], last_action=[2.0, 2.5])
    with pytest.raises(ValueError, match=r"other recorded actions \(last_action differs\).*same root"):
        compare_open_loop(first, other)


def test_a_run_that_held_out_nothing_names_what_to_give(root, tmp_path):
    checkpoint = train(tiny_run(root, tmp_path / "run", steps=1))
    with pytest.raises(SystemExit, match=r"held out no episodes.*episodes=\[\.\.\.\]"):
        evaluate_offline.main([str(checkpoint), f"output_dir={tmp_path / 'report'}", "device=cpu"])
