import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from vega_policy.evaluation.statistics import (
    mcnemar_exact,
    mean_of_groups,
    mean_of_tasks,
    paired_bootstrap,
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


def test_mcnemar_survives_thousands_of_disagreements():
    assert mcnemar_exact(3000, 3000) == 1.0
    assert 0 < mcnemar_exact(1100, 900) < 1e-4


def test_the_bootstrap_interval_covers_the_difference_and_agrees_with_resampling_pairs():
    rng = np.random.default_rng(0)
    first, second = rng.random(200) < 0.8, rng.random(200) < 0.6
    interval = paired_bootstrap(first.tolist(), second.tolist(), seed=1)
    indices = rng.integers(200, size=(10_000, 200))
    low, high = np.quantile((first[indices].mean(1) - second[indices].mean(1)), [0.025, 0.975])
    assert interval.low < first.mean() - second.mean() < interval.high
    assert interval.low == pytest.approx(low, abs=0.011)
    assert interval.high == pytest.approx(high, abs=0.011)


def test_the_bootstrap_interval_is_near_the_normal_one_for_many_pairs():
    rng = np.random.default_rng(0)
    first, second = rng.random(5000) < 0.7, rng.random(5000) < 0.65
    difference = first.astype(float) - second
    half = 1.96 * difference.std() / np.sqrt(5000)
    interval = paired_bootstrap(first.tolist(), second.tolist(), seed=0)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


def test_the_bootstrap_is_repeatable_and_equal_policies_differ_by_nothing():
    first, second = [True, False, True, True], [False, False, True, True]
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    equal = paired_bootstrap(first, first, seed=3)
    assert (equal.low, equal.high) == (0, 0)


def test_unpaired_sequences_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        paired_bootstrap([True, False], [True], seed=0)


def test_the_mean_of_groups_is_not_the_mean_of_tasks():
    rates = {"reach": 1.0, "push": 1.0, "pull": 1.0, "soccer": 0.0}
    groups = {"reach": "easy", "push": "easy", "pull": "easy", "soccer": "hard"}
    assert mean_of_tasks(rates) == 0.75
    assert mean_of_groups(rates, groups) == 0.5


def test_a_task_without_a_group_is_named():
    with pytest.raises(ValueError, match="soccer"):
        mean_of_groups({"soccer": 1.0}, {})
