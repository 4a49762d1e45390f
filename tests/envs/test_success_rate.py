"""Success rates of demonstrators: counting, resuming, and results of other code."""

import pytest

import envs
from envs.demos.collect import (
    TaskSuccess,
    code_version,
    load_results,
    measure_success,
    measure_task,
    merge_result,
    save_results,
    success_table,
)


def test_a_task_is_measured_on_fresh_resets_or_official_states():
    (task,) = envs.tasks("lift")
    result = measure_task(task, range(2), official=False)
    assert result.successes == 2
    assert len(set(result.lengths)) == 2


def test_the_table_counts_by_task_and_failures_have_no_length():
    one, two = envs.tasks("robosuite")[:2]
    table = success_table([TaskSuccess(two, False, (50, 0)), TaskSuccess(one, False, (40, 60))])
    assert "| robosuite | fresh | 3/4 (75.0%) | 2 1 | 50 |" in table


def test_more_official_states_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"\['lift'\] have fewer than 1 official initial states"):
        list(measure_success(["lift"], episodes=1, official=True, processes=1))


def test_stored_results_come_back_and_known_episodes_are_not_repeated(tmp_path):
    (task,) = envs.tasks("lift")
    path = tmp_path / "table.json"
    assert load_results(path) == []
    save_results(path, [TaskSuccess(task, False, (7, 0))])
    (result,) = measure_success(
        ["lift"], episodes=2, official=False, processes=1, known=load_results(path)
    )  # no demonstrator lifts in 7 steps
    assert result.lengths == (7, 0)


@pytest.mark.slow
def test_a_resumed_measurement_equals_an_uninterrupted_one():
    arguments = {"official": False, "processes": 1}
    first = list(measure_success(["lift"], episodes=1, **arguments))
    (longer,) = measure_success(["lift"], episodes=2, known=first, **arguments)
    (whole,) = measure_success(["lift"], episodes=2, **arguments)
    assert longer == whole


def test_a_new_result_replaces_only_that_of_its_task_and_start():
    one, two = envs.tasks("robosuite")[:2]
    known = [TaskSuccess(one, False, (1,)), TaskSuccess(one, True, (2,)), TaskSuccess(two, False, (3,))]
    grown = TaskSuccess(one, False, (1, 4))
    assert merge_result(known, grown) == [known[1], known[2], grown]


def test_results_of_other_code_are_not_mixed_into_a_table(tmp_path):
    path = tmp_path / "table.json"
    save_results(path, [TaskSuccess(envs.tasks("lift")[0], False, (7,))])
    path.write_text(path.read_text().replace(code_version(), "0123456789ab"))
    with pytest.raises(ValueError, match=r"other code: 0123456789ab, now [0-9a-f]{12}; one table"):
        load_results(path)


def test_a_file_of_something_else_is_no_results(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="holds no results"):
        load_results(path)
