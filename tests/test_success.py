"""The table of demonstrators' successes."""

import pytest

import envs
from envs.success import TaskSuccess, measure, measure_task, success_table


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
        list(measure(["lift"], episodes=1, official=True, processes=1))
