import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from pyarrow import parquet

from vega_policy.cli.commands import compare
from vega_policy.evaluation.compare import (
    LIBERO,
    UnpairedRunsError,
    compare_policies,
    compare_runs,
    difference,
    read_policies,
    read_policy,
    results_table,
    success,
)
from vega_policy.evaluation.episodes import EpisodeResult, EvaluationFolder
from vega_policy.evaluation.stats import wilson_interval

RESULTS = Path(__file__).resolve().parents[2] / "assets/results"


def write(
    folder,
    solved,
    ablation="none",
    tasks=2,
    suite=None,
    start="",
    axis="none",
    task="task",
    seed=0,
    **settings,
):
    """An evaluation of `folder`'s suite, its episodes shared out among the tasks."""
    results = [
        EpisodeResult(
            ablation,
            suite or folder.name,
            f"{task}_{i % tasks}",
            i % tasks,
            i // tasks,
            seed,
            bool(s),
            9,
            3,
            f"{start}{i}",
            str(folder),
            axis,
        )
        for i, s in enumerate(solved)
    ]
    run = EvaluationFolder(folder, {"suite": folder.name, **settings})
    run.add(results)
    run.close()


def one(folder, ablation="none"):
    return read_policy(folder, ablation, folder.name)


def first_of(episodes, count):
    return [i < count for i in range(episodes)]


@pytest.fixture
def main_pair(tmp_path):
    """Two policies, two seeds, four suites of 20 episodes; successes chosen by hand."""
    counts = {"wan": {"seed_0": (20, 18, 16, 14), "seed_1": (20, 20, 16, 16)}, "none": {}}
    counts["none"] = {"seed_0": (19, 18, 14, 10), "seed_1": (18, 17, 16, 15)}
    for policy, seeds in counts.items():
        for seed, solved in seeds.items():
            for suite, count in zip(LIBERO, solved, strict=True):
                write(tmp_path / policy / seed / suite, first_of(20, count))
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, arguments)])
    compare.main()
    return capsys.readouterr().out


def refused(*folders, **fields):
    """Return the message of the command, which ends with it, without composing its config."""
    with pytest.raises((ValueError, OSError)) as stopped:
        compare.run(OmegaConf.create({**compare.node, "folders": [*map(str, folders)], **fields}))
    return str(stopped.value)


def refusal(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    return stopped.value.code


def test_averages_over_suites_and_seeds_are_those_computed_by_hand(main_pair):
    wan, none = one(main_pair / "wan"), one(main_pair / "none")
    value = difference(wan, none, "LIBERO average")
    assert value.first.rate == pytest.approx(140 / 160)
    assert value.second.rate == pytest.approx(127 / 160)
    assert value.by_seed == {"seed_0": pytest.approx(7 / 80), "seed_1": pytest.approx(6 / 80)}
    assert value.seed_deviation == pytest.approx(1 / 80 / 2**0.5)
    assert value.difference == pytest.approx(13 / 160)
    assert value.low < 13 / 160 < value.high
    assert (value.only_first, value.only_second, value.first.episodes) == (13, 0, 160)
    assert success(wan, "LIBERO average") == value.first


def test_the_line_of_a_suite_with_one_seed_is_that_of_its_two_evaluations(tmp_path):
    rng = np.random.default_rng(0)
    for policy in ("a", "b"):
        write(tmp_path / policy / "seed_0/libero_goal", rng.random(60) < 0.7)
    value = difference(one(tmp_path / "a"), one(tmp_path / "b"), "libero_goal")
    pair = compare_runs(*(tmp_path / policy / "seed_0/libero_goal" for policy in "ab"))["all"]
    assert (value.low, value.high) == (pytest.approx(pair["ci_low"]), pytest.approx(pair["ci_high"]))
    assert value.p == pytest.approx(pair["mcnemar_p"])
    interval = wilson_interval(round(60 * value.first.rate), 60)
    assert (value.first.low, value.first.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert value.seed_deviation is None


def test_the_same_episodes_in_every_seed_are_no_further_evidence(tmp_path):
    rng = np.random.default_rng(1)
    for policy, rate in (("a", 0.8), ("b", 0.6)):
        solved = rng.random(40) < rate
        write(tmp_path / f"{policy}_once/seed_0/lift", solved)
        for seed in range(3):
            write(tmp_path / policy / f"seed_{seed}/lift", solved)
    thrice = difference(one(tmp_path / "a"), one(tmp_path / "b"), "lift")
    once = difference(one(tmp_path / "a_once"), one(tmp_path / "b_once"), "lift")
    assert thrice.p == pytest.approx(once.p)
    assert (thrice.low, thrice.high) == (once.low, once.high)
    assert (thrice.first.low, thrice.first.high) == (
        pytest.approx(once.first.low),
        pytest.approx(once.first.high),
    )
    assert thrice.first.episodes == 3 * once.first.episodes


def test_an_average_needs_all_four_suites_in_the_same_seed_on_both_sides(main_pair):
    (main_pair / "none/seed_1/libero_10/episodes.parquet").unlink()
    comparison = compare_policies([one(main_pair / "wan"), one(main_pair / "none")])
    assert set(comparison.differences["wan"]["LIBERO average"].by_seed) == {"seed_0"}
    assert set(comparison.differences["wan"]["libero_10"].by_seed) == {"seed_0"}
    text = results_table(comparison)
    assert "in wan but not in none: seed_1/libero_10." in text
    assert "LIBERO average, wan against none: without seed_1" in text
    (main_pair / "none/seed_0/libero_10/episodes.parquet").unlink()
    assert (
        "LIBERO average"
        not in compare_policies([one(main_pair / "wan"), one(main_pair / "none")]).differences["wan"]
    )


def test_the_script_prints_suites_averages_and_numbers(main_pair, monkeypatch, capsys):
    wan, none, numbers = main_pair / "wan", main_pair / "none", main_pair / "numbers.json"
    for policy, count in (("wan", 12), ("none", 9)):
        for suite in LIBERO:
            write(main_pair / policy / f"seed_0/{suite}_swap", first_of(20, count))
    text = run(monkeypatch, capsys, wan, none, f"json={numbers}")
    lines = {line[:21].strip(): line for line in text.splitlines()}
    assert "87.5 [" in lines["LIBERO average"]
    assert "+8.1 [" in lines["LIBERO average"]
    assert "+8.8, +7.5 (sd 0.9)" in lines["LIBERO average"]
    assert "+15.0 [" in lines["LIBERO average swap"]
    assert "1 x 80" in lines["LIBERO average swap"]
    assert "(5:0)" in lines["libero_10"]
    stored = json.loads(numbers.read_text())
    assert stored["difference_to_reference"]["wan"]["LIBERO average"]["difference"] == pytest.approx(13 / 160)
    page = run(monkeypatch, capsys, wan, none, "markdown=true").splitlines()
    assert page[0].startswith("| suite | seeds x episodes | wan | none |")
    assert {line.count("|") for line in page if line.startswith("|")} == {8}


def test_many_policies_are_each_compared_with_the_last(main_pair, monkeypatch, capsys):
    write(main_pair / "vae/seed_0/libero_spatial", first_of(20, 15))
    text = run(monkeypatch, capsys, main_pair / "wan", main_pair / "vae", main_pair / "none")
    rows = [line.split("  ") for line in text.splitlines() if line.startswith("vae")]
    assert "75.0 [53.1, 88.8] (1 x 20)" in [cell.strip() for cell in rows[0]]
    assert rows[1][-1].strip() == "-"
    assert any(cell.strip().startswith("-20.0 [") for cell in rows[1])
    assert "difference to none" in text


def test_an_ablation_is_compared_with_the_policy_as_it_is(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "wan/seed_0/lift"
    write(folder, first_of(20, 15))
    write(folder, first_of(20, 5), ablation="blind")
    write(tmp_path / "wan/seed_1/lift", first_of(20, 15))
    text = run(monkeypatch, capsys, tmp_path / "wan", tmp_path / "wan", "second_ablation=blind")
    assert "wan (blind)" in text
    assert "+50.0 [" in text
    assert "not in wan (blind): seed_1/lift" in text


def test_policies_of_the_same_name_are_called_by_their_paths(tmp_path):
    for place in ("x", "y"):
        write(tmp_path / place / "wan/seed_0/lift", first_of(4, 2))
    folders = [tmp_path / place / "wan" for place in ("x", "y")]
    assert [p.name for p in read_policies(folders, ["none", "none"])] == [str(folder) for folder in folders]
    write(folders[0] / "seed_0/lift", first_of(4, 1), ablation="blind")
    names = [policy.name for policy in read_policies(folders, ["blind", "none"])]
    assert names == [f"{folders[0]} (blind)", str(folders[1])]


def test_a_copied_evaluation_is_no_second_training(main_pair):
    shutil.copytree(main_pair / "wan/seed_0/libero_10", main_pair / "wan/seed_2/libero_10")
    with pytest.raises(ValueError, match=r"seed_0/libero_10 and .*seed_2/libero_10 are the same episodes"):
        one(main_pair / "wan")


def test_one_checkpoint_is_no_second_training_even_if_its_episodes_ended_otherwise(tmp_path):
    for seed, count in (("seed_0", 3), ("seed_1", 2)):
        write(tmp_path / "wan" / seed / "lift", first_of(4, count), checkpoint_sha256="9f8c")
    with pytest.raises(ValueError, match=r"seed_0/lift and .*seed_1/lift are of one checkpoint"):
        one(tmp_path / "wan")
    write(tmp_path / "many/seed_0/lift", first_of(4, 2), checkpoint_sha256="9f8c")
    write(tmp_path / "many/seed_0/stack", first_of(4, 2), checkpoint_sha256="9f8c")
    assert len(one(tmp_path / "many").runs) == 2


def test_conditions_that_differ_are_reported(tmp_path, monkeypatch, capsys):
    for policy, size in (("a", 128), ("b", 256)):
        write(tmp_path / policy / "seed_0/lift", first_of(20, 9), frame_size=size, rendering="fast")
    unlike = "Evaluated differently, frame_size: a 128, b 256 (seed_0/lift)."
    table = run(monkeypatch, capsys, tmp_path / "a", tmp_path / "b")
    assert unlike in table
    assert "rendering" not in table
    single = run(monkeypatch, capsys, *(tmp_path / policy / "seed_0/lift" for policy in "ab"))
    assert "frame_size: first 128, second 256" in single
    assert single.startswith(f"first: {tmp_path / 'a'}")
    (tmp_path / "b/seed_0/lift/settings.json").unlink()
    numbers = tmp_path / "numbers.json"
    table = run(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", f"json={numbers}")
    unknown = "Conditions unknown: b has no settings.json (seed_0/lift)."
    assert unknown in table
    assert unknown in json.loads(numbers.read_text())["notes"]
    assert "Evaluated differently" not in table


def test_the_action_steps_that_were_executed_are_compared(tmp_path):
    for policy, steps in (("a", 4), ("b", 8)):
        write(tmp_path / policy / "seed_0/lift", first_of(20, 9), action_steps=None)
        (tmp_path / policy / "seed_0/lift/summary.json").write_text(json.dumps({"action_steps": steps}))
    notes = compare_policies([one(tmp_path / "a"), one(tmp_path / "b")]).numbers()["notes"]
    assert "Evaluated differently, action_steps: a 4, b 8 (seed_0/lift)." in notes


def test_a_folder_is_not_compared_with_itself(main_pair, monkeypatch, capsys):
    for folder in (main_pair / "wan", main_pair / "wan/seed_0/libero_10"):
        again = folder.parent / ".." / folder.parent.name / folder.name
        assert "one folder under one ablation (none)" in refusal(monkeypatch, capsys, folder, again)


def test_the_shards_of_an_evaluation_are_not_evaluations(tmp_path):
    write(tmp_path / "wan/seed_0/lift", first_of(4, 2))
    write(tmp_path / "wan/seed_0/lift/shards/0_of_2", first_of(2, 2), suite="lift")
    assert set(one(tmp_path / "wan").runs) == {("seed_0", "lift")}


def test_bad_folders_end_in_one_message(main_pair, monkeypatch, capsys):
    wan = main_pair / "wan"
    (main_pair / "empty").mkdir()
    write(main_pair / "lift/seed_0/lift", first_of(4, 2))
    write(main_pair / "misnamed/seed_0/lift", first_of(4, 2), suite="door")
    write(main_pair / "damaged/seed_0/lift", first_of(4, 2))
    (main_pair / "damaged/seed_0/lift/episodes.parquet").write_text("version https://git-lfs")
    monkeypatch.chdir(main_pair)
    for folder, message in {
        "empty": "empty holds no evaluation; expected",
        "nowhere": "nowhere holds no evaluation; expected",
        "wan/seed_0/libero_10": "libero_10 is one evaluation itself",
        "lift": "no <seed>/<suite> in common",
        "misnamed": "holds episodes of door; expected the folder to be named as its suite",
        "damaged": "episodes.parquet cannot be read",
        ".": "expected <seed>/<suite>; give the folder of one policy",
    }.items():
        assert message in refused(wan, folder)
    assert "under the ablation 'zero'; it has none" in refused(wan, wan, first_ablation="zero")
    assert "folders: expected at least two, got 1" in refusal(monkeypatch, capsys, wan)


def test_unpaired_episodes_are_refused_with_suite_and_seed(main_pair):
    write(main_pair / "few/seed_1/libero_goal", first_of(10, 5))
    with pytest.raises(UnpairedRunsError, match=r"seed_1/libero_goal of wan .* few .* 10 only in the first"):
        compare_policies([one(main_pair / "wan"), one(main_pair / "few")])
    write(main_pair / "few/seed_0/libero_goal", first_of(20, 5))
    with pytest.raises(UnpairedRunsError, match=r"few: seed_1/libero_goal has other episodes \(10\)"):
        success(one(main_pair / "few"), "libero_goal")


OFFICIAL = {"official_states": True, "frame_size": 128, "rendering": "fast"}


def test_official_states_are_paired_by_number_where_their_last_bits_differ(tmp_path, monkeypatch, capsys):
    for policy, count in (("gpu", 15), ("cpu", 12)):
        write(tmp_path / policy / "seed_0/libero_10", first_of(20, count), start=policy, **OFFICIAL)
    value = difference(one(tmp_path / "gpu"), one(tmp_path / "cpu"), "libero_10")
    assert (value.only_first, value.only_second, value.first.episodes) == (3, 0, 20)
    numbers = tmp_path / "numbers.json"
    table = run(monkeypatch, capsys, tmp_path / "gpu", tmp_path / "cpu", f"json={numbers}")
    line = (
        "Start states of gpu and cpu differ in the last bits or more (their hashes do not say how far): "
        "paired by number of the official state (seed_0/libero_10 20 of 20)."
    )
    assert line in table.splitlines()
    assert line in json.loads(numbers.read_text())["notes"]
    single = run(monkeypatch, capsys, *(tmp_path / policy / "seed_0/libero_10" for policy in ("gpu", "cpu")))
    assert "paired by number of the official state (libero_10 20 of 20)." in single
    assert "Left out" not in table + single


@pytest.mark.parametrize(
    "other",
    [
        {"frame_size": 256},
        {"rendering": "full"},
        {"official_states": False},
        {"official_states": None},
        {"seed": 10_000},
        {"seed": 10_000, "start": "gpu"},
        {"task": "renamed"},
        {"task": "renamed", "start": "gpu"},
    ],
)
def test_other_settings_are_never_paired_by_number(tmp_path, other):
    write(tmp_path / "gpu/libero_10", first_of(4, 2), start="gpu", **OFFICIAL)
    write(tmp_path / "cpu/libero_10", first_of(4, 2), **{"start": "cpu", **OFFICIAL, **other})
    with pytest.raises(UnpairedRunsError, match="episode 0 of task_0 did not start alike"):
        compare_runs(tmp_path / "gpu/libero_10", tmp_path / "cpu/libero_10")


@pytest.mark.parametrize("without", ["perturbation", "settings"])
def test_perturbed_starts_and_unknown_settings_are_never_paired_by_number(tmp_path, without):
    axis = {"axis": "layout"} if without == "perturbation" else {}
    for policy in ("gpu", "cpu"):
        write(tmp_path / policy / "libero_10", first_of(4, 2), start=policy, **axis, **OFFICIAL)
    if without == "settings":
        (tmp_path / "cpu/libero_10/settings.json").unlink()
    with pytest.raises(UnpairedRunsError, match="episode 0 of task_0 did not start alike"):
        compare_runs(tmp_path / "gpu/libero_10", tmp_path / "cpu/libero_10")


def test_the_states_that_both_have_are_compared_and_the_others_are_counted(tmp_path, monkeypatch, capsys):
    many, few = [True, True, True, False, False, True], [False, True, True, True]
    write(tmp_path / "many/seed_0/libero_10", many, episodes_per_task=3, **OFFICIAL)
    write(tmp_path / "few/seed_0/libero_10", few, episodes_per_task=3, **OFFICIAL)
    value = difference(one(tmp_path / "many"), one(tmp_path / "few"), "libero_10")
    assert (value.only_first, value.only_second, value.first.episodes) == (1, 1, 4)
    assert (value.first.rate, value.second.rate) == (3 / 4, 3 / 4)
    table = run(monkeypatch, capsys, tmp_path / "many", tmp_path / "few", "markdown=true").splitlines()
    assert "Left out, states of many that few does not have: seed_0/libero_10 2 of 6." in table
    assert not any("states of few" in line for line in table)
    assert any("to the end: few (seed_0/libero_10 4 of 6 episodes)" in line for line in table)
    folders = [tmp_path / policy / "seed_0/libero_10" for policy in ("few", "many")]
    rows = compare_runs(*folders)
    assert [rows[name]["episodes"] for name in ("task_0", "task_1", "all")] == [2, 2, 4]
    assert (rows["task_0"]["only_second"], rows["task_1"]["only_first"]) == (1, 1)
    assert "Left out, states of second that first does not have: libero_10 2 of 6." in run(
        monkeypatch, capsys, *folders
    )
    write(tmp_path / "seeds/libero_10", few, **{**OFFICIAL, "official_states": False})
    with pytest.raises(UnpairedRunsError, match="2 only in the first, 0 only in the second, 4 in both"):
        compare_runs(folders[1], tmp_path / "seeds/libero_10")


@pytest.mark.parametrize(
    ("first", "second", "row", "expected"),
    [
        (
            "layouts/partial_displacement",
            "layouts/partial_none",
            "LIBERO pooled swap",
            (200, 13.0, 7.2, 18.6, 31, 5),
        ),
        (
            "layouts/partial_displacement",
            "layouts/partial_none",
            "libero_10_swap",
            (50, 22.0, 5.8, 36.5, 14, 3),
        ),
        ("layouts/partial_none", "layouts/none", "LIBERO pooled swap", (400, 16.5, 12.2, 20.6, 74, 8)),
        ("layouts/none", "layouts/standard_only", "LIBERO pooled swap", (400, 22.0, 17.7, 26.1, 90, 2)),
        ("layouts/partial_displacement_bf16", "layouts/none", "LIBERO pooled", (400, 1.0, -1.6, 3.6, 15, 11)),
        (
            "layouts/partial_displacement_bf16",
            "layouts/partial_none",
            "LIBERO pooled",
            (200, 0.5, -2.4, 3.4, 4, 3),
        ),
        ("layouts/future_cut_off", "layouts/none", "libero_10_swap", (93, -5.4, -13.2, 2.7, 4, 9)),
        ("augmentation/all", "none", "libero_object", (250, 17.2, 11.6, 22.5, 49, 6)),
        ("augmentation/dropout", "augmentation/jitter", "libero_object", (100, 3.0, -2.1, 8.0, 4, 1)),
    ],
)
def test_differences_that_the_results_page_reports_come_out_of_the_raw_episodes(first, second, row, expected):
    value = difference(one(RESULTS / first), one(RESULTS / second), row)
    points = (round(100 * number, 1) for number in (value.difference, value.low, value.high))
    assert (value.first.episodes, *points, value.only_first, value.only_second) == expected


def test_pooled_states_of_two_suites_are_one_sample(main_pair):
    for suite in LIBERO[2:]:
        (main_pair / f"none/seed_1/{suite}/episodes.parquet").unlink()
        (main_pair / f"none/seed_0/{suite}/episodes.parquet").unlink()
    value = difference(one(main_pair / "wan"), one(main_pair / "none"), "LIBERO pooled")
    assert value.by_seed == {"seed_0": pytest.approx(1 / 40), "seed_1": pytest.approx(5 / 40)}
    assert value.difference == pytest.approx(6 / 80)
    assert (value.only_first, value.only_second, value.first.episodes) == (6, 0, 80)
    (main_pair / "none/seed_0/libero_object/episodes.parquet").unlink()
    (main_pair / "none/seed_1/libero_object/episodes.parquet").unlink()
    assert difference(one(main_pair / "wan"), one(main_pair / "none"), "LIBERO pooled") is None


@pytest.mark.parametrize(
    ("first", "second", "count"), [("partial_displacement", "partial_none", 5), ("none", "standard_only", 10)]
)
def test_the_interval_over_tasks_is_that_of_the_means_of_the_raw_episodes(
    first, second, count, monkeypatch, capsys, tmp_path
):
    means = []
    for suite in (f"{name}_swap" for name in LIBERO):
        sides = []
        for policy in (first, second):
            table = parquet.read_table(RESULTS / f"layouts/{policy}/seed_0/{suite}/episodes.parquet")
            solved = np.zeros((10, 10))
            for row in table.to_pylist():
                solved[row["task_index"], row["index"]] = row["success"]
            sides.append(solved[:, :count])
        means += list((sides[0] - sides[1]).mean(axis=1))
    center, margin = np.mean(means), 2.022691 * np.std(means, ddof=1) / 40**0.5  # t for 39 degrees of freedom
    line = (
        f"LIBERO pooled swap, over 40 tasks: {100 * center:+.1f} [{100 * (center - margin):+.1f}, "
        f"{100 * (center + margin):+.1f}]; tasks better : worse "
        f"{sum(mean > 0 for mean in means)}:{sum(mean < 0 for mean in means)}."
    )
    folders, file = [RESULTS / "layouts" / name for name in (first, second)], tmp_path / "numbers.json"
    assert line in run(monkeypatch, capsys, *folders, f"json={file}").splitlines()
    assert f"\n\n{line}\n\n" in run(monkeypatch, capsys, *folders, "markdown=true")
    rows = json.loads(file.read_text())["difference_to_reference"][first]
    pooled = rows["LIBERO pooled swap"]
    over_tasks = [pooled["over_tasks"][name] for name in ("difference", "low", "high")]
    assert over_tasks == pytest.approx([center, center - margin, center + margin], abs=1e-6)
    assert pooled["difference"] == pytest.approx(center)
    assert over_tasks[1] < pooled["low"] < pooled["high"] < over_tasks[2]
    assert rows["libero_10_swap"]["over_tasks"]["tasks"] == 10
    assert rows["LIBERO average swap"]["over_tasks"] is None


def test_seeds_are_averaged_within_a_task_and_a_suite_alone_has_its_own_line(tmp_path, monkeypatch, capsys):
    """Six tasks of two states under two seeds; task 0 is gained in both seeds, task 1 in one of them."""
    gained = {"seed_0": (0, 6, 1, 7), "seed_1": (0, 6)}
    for seed, episodes in gained.items():
        write(tmp_path / "new" / seed / "lift", [i in episodes for i in range(12)], tasks=6)
        write(tmp_path / "old" / seed / "lift", [False] * 12, tasks=6)
    margin = 2.570582 * np.std([1, 0.5, 0, 0, 0, 0], ddof=1) / 6**0.5  # t for 5 degrees of freedom
    low, high = 100 * (0.25 - margin), 100 * (0.25 + margin)
    line = f"over 6 tasks: +25.0 [{low:+.1f}, {high:+.1f}]; tasks better : worse 2:0."
    assert f"lift, {line}" in run(monkeypatch, capsys, tmp_path / "new", tmp_path / "old").splitlines()
    shutil.copytree(tmp_path / "old", tmp_path / "third")
    many = run(monkeypatch, capsys, *(tmp_path / name for name in ("third", "new", "old"))).splitlines()
    assert f"lift, new against old, {line}" in many
    assert (
        "lift, third against old, over 6 tasks: +0.0 in every task, no interval; tasks better : worse 0:0."
        in many
    )
    pair = [tmp_path / name / "seed_0/lift" for name in ("new", "old")]
    printed, file = run(monkeypatch, capsys, *pair, f"json={tmp_path / 'pair.json'}"), tmp_path / "pair.json"
    margin = 100 * 2.570582 * np.std([1, 1, 0, 0, 0, 0], ddof=1) / 6**0.5
    assert f"all, over 6 tasks: +33.3 [{100 / 3 - margin:+.1f}, {100 / 3 + margin:+.1f}]" in printed
    assert json.loads(file.read_text())["tasks"]["all"]["over_tasks"]["better"] == 2


def test_fewer_than_five_tasks_have_no_interval_over_tasks(main_pair, monkeypatch, capsys):
    for suite in LIBERO[1:]:
        for seed in ("seed_0", "seed_1"):
            (main_pair / f"none/{seed}/{suite}/episodes.parquet").unlink()
    assert "over tasks" not in run(monkeypatch, capsys, main_pair / "wan", main_pair / "none")
    pair = [main_pair / policy / "seed_0/libero_spatial" for policy in ("wan", "none")]
    assert compare_runs(*pair)["all"]["over_tasks"] is None
    assert "over tasks" not in run(monkeypatch, capsys, *pair)
