import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from vega_policy.evaluation.stats import (
    Interval,
    TaskDifference,
    difference_over_tasks,
    interval_of_mean,
    mcnemar_exact,
    mean_of_groups,
    mean_of_tasks,
    paired_interval,
    repeated_wilson_interval,
    sign_flip_exact,
    student_interval,
    wilson_interval,
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_is_the_one_of_scipy(counts):
    expected = binomtest(*counts).proportion_ci(method="wilson")
    interval = wilson_interval(*counts)
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)


def test_the_wilson_interval_has_its_textbook_values():
    interval = wilson_interval(15, 20)
    assert (interval.low, interval.high) == (
        pytest.approx(0.531299, abs=1e-6),
        pytest.approx(0.888138, abs=1e-6),
    )
    # Closed form when nothing succeeds: z^2 / (n + z^2).
    assert wilson_interval(0, 10).low == 0
    assert wilson_interval(0, 10).high == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)


def test_a_higher_confidence_gives_a_wider_interval():
    narrow, wide = wilson_interval(30, 50, 0.9), wilson_interval(30, 50, 0.99)
    assert wide.low < narrow.low < 0.6 < narrow.high < wide.high


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} of {trials}"):
        wilson_interval(successes, trials)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_sign_test_on_disagreements(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_exact_for_thousands_of_disagreements():
    assert mcnemar_exact(3000, 3000) == 1.0
    assert 0 < mcnemar_exact(1100, 900) < 1e-4


def test_the_paired_interval_is_the_published_one():
    # Bonett and Price (2012): p12 = (f12 + 1) / (n + 2), p21 likewise, Wald's interval of p12 - p21.
    f12, f21, n = 8, 3, 100
    p12, p21 = (f12 + 1) / (n + 2), (f21 + 1) / (n + 2)
    half = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / (n + 2)) ** 0.5
    interval = paired_interval(np.repeat([1.0, -1.0, 0.0], [f12, f21, n - f12 - f21]))
    assert interval.low == pytest.approx(p12 - p21 - half, abs=1e-6)
    assert interval.high == pytest.approx(p12 - p21 + half, abs=1e-6)


@pytest.mark.parametrize("episodes", [10, 50, 500])
@pytest.mark.parametrize(("first_alone", "second_alone"), [(0.01, 0), (0.05, 0.02), (0.2, 0.1), (0.5, 0)])
def test_the_paired_interval_covers_the_difference_also_where_policies_hardly_differ(
    episodes, first_alone, second_alone
):
    rng, trials, covered = np.random.default_rng(0), 400, 0
    shares = [first_alone, second_alone, 1 - first_alone - second_alone]
    for counts in rng.multinomial(episodes, shares, size=trials):
        interval = paired_interval(np.repeat([1.0, -1.0, 0.0], counts))
        covered += interval.low <= first_alone - second_alone <= interval.high
    assert covered / trials >= 0.93


def test_policies_that_never_disagreed_may_still_differ():
    interval = paired_interval(np.zeros(50))
    assert interval.high == -interval.low == pytest.approx(1.959964 * 2**0.5 / 52, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (np.zeros(0), r"got shape \[0\]"),
        (np.zeros((2, 3)), r"got shape \[2, 3\]"),
        (np.array([0.0, 2.0]), r"in \[-1, 1\], got 2.0"),
        (np.array([0.0, np.nan]), r"in \[-1, 1\], got nan"),
    ],
)
def test_what_is_no_paired_difference_is_refused(differences, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(differences)


def test_the_mean_of_groups_is_not_the_mean_of_tasks():
    rates = {"reach": 1.0, "push": 1.0, "pull": 1.0, "soccer": 0.0}
    groups = {"reach": "easy", "push": "easy", "pull": "easy", "soccer": "hard"}
    assert mean_of_tasks(rates) == 0.75
    assert mean_of_groups(rates, groups) == 0.5


def test_a_task_without_a_group_is_named():
    with pytest.raises(ValueError, match="soccer"):
        mean_of_groups({"soccer": 1.0}, {})


def test_intervals_of_an_average_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    rates, states, seeds, trials = np.array([0.98, 0.9, 0.6, 0.75])[:, None, None], 100, 2, 300
    covered = np.zeros(2)
    for _ in range(trials):
        # A tenth of the states is hard: there the episodes of both seeds, and of both policies, mostly fail.
        ease = np.where(rng.random((4, 1, states)) < 0.1, 0.2, 1)
        first = rng.random((4, seeds, states)) < rates * ease
        second = rng.random((4, seeds, states)) < (rates - 0.1) * ease
        changes = (first.astype(int) - second).mean(axis=1)
        difference = interval_of_mean(
            changes.mean(axis=1).tolist(), [paired_interval(suite) for suite in changes]
        )
        success = interval_of_mean(
            first.mean(axis=(1, 2)).tolist(), [repeated_wilson_interval(suite) for suite in first]
        )
        covered += [
            difference.low <= 0.92 * 0.1 <= difference.high,
            success.low <= 0.92 * rates.mean() <= success.high,
        ]
    assert covered.min() / trials >= 0.92
    assert covered.max() / trials <= 0.99


def test_repetitions_of_a_state_count_as_much_as_they_differ():
    rng = np.random.default_rng(0)
    once = rng.random((1, 400)) < 0.7
    wilson = wilson_interval(int(once.sum()), 400)
    assert repeated_wilson_interval(once) == wilson
    copied = repeated_wilson_interval(np.repeat(once, 3, axis=0))
    assert (copied.low, copied.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    independent = rng.random((3, 400)) < 0.7
    narrow, expected = repeated_wilson_interval(independent), wilson_interval(int(independent.sum()), 1200)
    assert narrow.high - narrow.low == pytest.approx(expected.high - expected.low, rel=0.1)
    assert repeated_wilson_interval(np.ones((3, 50), bool)) == wilson_interval(50, 50)


def test_the_interval_of_a_mean_of_one_is_its_own_and_stays_below_one():
    interval = wilson_interval(49, 50)
    assert interval_of_mean([0.98], [interval]) == Interval(
        pytest.approx(interval.low), pytest.approx(interval.high)
    )
    full = interval_of_mean([1.0, 1.0], [wilson_interval(50, 50)] * 2)
    assert full.high == 1
    assert full.low == pytest.approx(1 - (1 - wilson_interval(50, 50).low) / 2**0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_all_ways_of_swapping(values):
    differences = np.array(values)
    flips = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    expected = np.mean(abs(flips @ differences) >= abs(differences.sum()))
    assert sign_flip_exact(differences) == pytest.approx(expected)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (7, 2), (0, 11), (400, 330)])
def test_with_one_episode_a_state_the_sign_flip_test_is_mcnemars(first, second):
    differences = np.array([1] * first + [-1] * second + [0] * 5)
    assert sign_flip_exact(differences) == pytest.approx(mcnemar_exact(first, second))


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one estimate"):
        interval_of_mean([], [])
    with pytest.raises(ValueError, match=r"got \[0, 4\]"):
        repeated_wilson_interval(np.ones((0, 4), bool))


def test_students_interval_of_five_values_is_the_textbook_one():
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    margin = 2.776445 * 0.025**0.5 / 5**0.5  # the table's quantile for 4 degrees of freedom
    assert student_interval(values) == pytest.approx((0.3 - margin, 0.3 + margin), abs=1e-6)
    with pytest.raises(ValueError, match=r"n >= 2, got shape \[1\]"):
        student_interval(values[:1])


def test_a_task_counts_once_whatever_its_states_and_seeds():
    # Five tasks of 2, 2, 2, 4 and 1 states under two seeds; their means are 1, 1/2, 0, -1/4 and 1.
    tasks = list("aabbccdddde")
    changes = np.array([[1, 1, 1, 0, 1, -1, -1, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0, 0, -1, 0, 0, 1]])
    value = difference_over_tasks(changes, tasks)
    expected = ttest_1samp([1, 0.5, 0, -0.25, 1], 0).confidence_interval(0.95)
    assert value == TaskDifference(5, pytest.approx(0.45), pytest.approx(expected.low), 1.0, 3, 1)
    assert expected.high > 1  # clipped to what a difference can be
    assert difference_over_tasks(changes[:, 2:], tasks[2:]) is None  # four tasks


def test_states_of_a_task_that_repeat_each_other_narrow_only_the_interval_over_episodes():
    tasks, once = np.array(list("abcdefgh")), np.array([[1, 1, 1, 0, 0, 0, 0, -1]])
    single, tenfold = (difference_over_tasks(once.repeat(n, axis=1), list(tasks.repeat(n))) for n in (1, 10))
    assert tenfold == single
    assert tenfold is not None
    over_episodes = paired_interval(once[0].repeat(10))
    assert tenfold.high - tenfold.low > 2.5 * (over_episodes.high - over_episodes.low)
    mixed = np.tile([1, 1, 1, 0, 0, 0, 0, -1], 8)[None]  # the same outcomes in every task
    alike = difference_over_tasks(mixed, list(tasks.repeat(8)))
    assert alike == TaskDifference(8, 0.25, None, None, 8, 0)
    assert alike.describe("all") == (
        "all, over 8 tasks: +25.0 in every task, no interval; tasks better : worse 8:0."
    )


def test_one_task_whose_states_all_end_alike_widens_the_interval_over_tasks():
    tasks = [name for name in "abcdefgh" for _ in range(8)]
    spread = np.zeros((8, 8), int)
    spread[range(8), range(8)] = 1  # one state in each task ...
    spread[0, 1] = 1  # (and a second one, so that the tasks differ)
    together = np.zeros((8, 8), int)
    together[0] = 1  # ... or all states of one task
    together[1, 0] = 1
    narrow, wide = (difference_over_tasks(of.reshape(1, -1), tasks) for of in (spread, together))
    over_episodes = [paired_interval(of.reshape(-1).astype(float)) for of in (spread, together)]
    assert over_episodes[0] == over_episodes[1]
    assert narrow is not None
    assert wide is not None
    assert narrow.difference == wide.difference
    assert narrow.high - narrow.low < over_episodes[0].high - over_episodes[0].low < wide.high - wide.low
