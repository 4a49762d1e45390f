"""Sweeps end in one table whose paired statistics follow their closed forms."""

import json
import runpy
import sys
from pathlib import Path

from tests.policies import SMALL_ENCODERS
from tests.synthetic_dataset import write_dataset
from vega_policy.evaluation.stats import wilson_interval
from vega_policy.training.sweep import Job, labels, render, sign_flip, summarize

REPOSITORY = Path(__file__).parents[2]


def job(number, fusion, seed, loss, wins=()):
    settings = {"policy.fusion.name": fusion, "seed": seed, "output_dir": f"out/{number}", "steps": 30}
    measures = {} if loss is None else {"loss": loss}
    return Job(Path(str(number)), settings, measures, {(0, k): bool(won) for k, won in enumerate(wins)})


def test_what_varies_names_a_configuration_but_not_its_seed_or_folder():
    jobs = [job(0, "token_gate", 0, 1.0), job(1, "add", 1, 1.0), Job(Path("2"), {}, {}, {})]
    assert labels(jobs) == ["fusion=token_gate", "fusion=add", "job 2: did not start"]


def test_the_sign_flip_test_counts_sign_patterns():
    assert sign_flip([1.0]) == 1.0
    assert sign_flip([1.0, 2.0]) == 0.5  # ++ and -- of four
    assert sign_flip([1.0, -1.0]) == 1.0
    assert sign_flip([1.0] * 5) == 2 / 2**5
    assert sign_flip([1.0] * 20) < 1e-3


def test_seeds_are_paired_with_the_same_seed_of_the_first_configuration():
    jobs = [
        job(0, "token_gate", 0, 1.0),
        job(1, "token_gate", 1, 3.0),
        job(2, "add", 1, 3.5),
        job(3, "add", 0, 1.25),
        job(4, "add", 2, 9.0),  # has no partner
    ]
    first, second = summarize(jobs)
    assert first["paired"] == {}
    assert first["measures"]["loss"]["mean"] == 2.0
    assert second["paired"]["loss"] == {"difference": 0.375, "p": 0.5, "pairs": 2}


def test_episodes_are_paired_over_all_seeds():
    jobs = [
        job(0, "token_gate", 0, 1.0, wins=(1, 1, 1, 0)),
        job(1, "token_gate", 1, 1.0, wins=(1, 1, 0, 0)),
        job(2, "add", 0, 1.0, wins=(0, 0, 1, 0)),
        job(3, "add", 1, 1.0, wins=(0, 0, 0, 0)),
    ]
    first, second = summarize(jobs)
    assert (first["successes"], first["episodes"]) == (5, 8)
    paired = second["paired"]["success"]
    assert paired["difference"] == -0.5
    assert paired["p"] == 0.5  # two states, in both seeds won by the first: 2 / 2^2
    assert -1 <= paired["low"] < -0.5 < paired["high"]
    table = render([first, second])
    assert "success 1/8 = 12.5%" in table
    assert "success by initial state (sign-flip p)" in table
    # Two seeds on four states are no eight independent episodes.
    assert second["high"] > wilson_interval(1, 8).high


def test_a_run_that_failed_takes_only_its_own_pair_from_the_success():
    wins = (1, 1, 0, 0)
    jobs = [
        job(k, fusion, seed, 1.0, wins)
        for k, (fusion, seed) in enumerate([("gate", 0), ("gate", 1), ("add", 0)])
    ]
    _, second = summarize([*jobs, job(3, "add", 1, None)])
    assert second["paired"]["success"]["pairs"] == 4
    assert second["episodes"] == 4


def test_a_run_that_failed_has_a_line_without_a_result():
    table = render(
        summarize([job(0, "token_gate", 0, 1.0), job(1, "add", 0, None), Job(Path("2"), {}, {}, {})])
    )
    assert table.count("no result") == 2


def test_a_multirun_trains_every_job_in_its_folder_and_ends_in_one_table(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", lengths=(4, 3), frame_shapes=((32, 32), (32, 32)))
    monkeypatch.chdir(tmp_path)
    sizes = ["steps=2", "batch_size=2", "policy.frame_size=32", "policy.device=cpu", "dataset.root=data"]
    for part in ("backbone", "head"):
        sizes += [f"{part}.width=16", f"{part}.depth=1", f"{part}.heads=2"]
    sizes += [f"backbone.{name}={value}" for name, value in SMALL_ENCODERS.items()]
    fields = ["experiment=demo", "prior=random", "fusion.name=token_gate,add,wrong_name", "seed=0"]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "-m", *fields, *sizes, "output_dir=sweep"])
    runpy.run_path(str(REPOSITORY / "scripts" / "train_policy.py"), run_name="__main__")
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["label"] for row in rows] == ["fusion=token_gate", "fusion=add", "job 2: did not start"]
    assert rows[1]["paired"]["loss"]["pairs"] == 1
    table = (tmp_path / "sweep" / "sweep.txt").read_text()
    assert "minus fusion=token_gate, paired by seed" in table
    for number in range(2):
        assert (tmp_path / "sweep" / str(number) / "checkpoints" / "last").is_symlink()
