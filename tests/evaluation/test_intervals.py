import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from fewshot_nlp.evaluation.intervals import mean_interval, paired_interval


def test_by_hand():
    # s = 1, so the half-width is t(0.975, 2) / sqrt(3) = 4.30265 / 1.73205.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.n == 3
    assert interval.ci95 == pytest.approx(2.48414, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)


@pytest.mark.parametrize("n", [2, 5, 600])
def test_agrees_with_scipy(n):
    values = np.random.default_rng(n).beta(9, 1, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)


def test_over_given_stages_it_is_welchs():
    """The mean of two means, of groups that are spread unlike."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.9, 0.02, 30), generator.normal(0.4, 0.2, 30)
    low, high = stats.ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    interval = mean_interval([a, b])
    assert (2 * interval.low, 2 * interval.high) == pytest.approx((low, high), rel=1e-9)
    assert interval.n == 60 and interval.ci95 < 0.5 * mean_interval(np.concatenate([a, b])).ci95
    assert mean_interval(np.ones((3, 4))).ci95 == 0.0
    assert mean_interval(np.ones((3, 1))).ci95 is None


def test_paired_agrees_with_the_t_test():
    generator = np.random.default_rng(0)
    task = generator.normal(0.8, 0.1, 50)
    a, b = task + generator.normal(0.02, 0.01, 50), task
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    paired = paired_interval(a, b)
    assert (paired.low, paired.high) == pytest.approx((low, high), rel=1e-9)
    assert paired.above_zero
    # The point of pairing: the tasks' own spread is gone.
    assert paired.ci95 < 0.2 * mean_interval(a).ci95


def test_the_sign_is_a_minus_b():
    assert paired_interval([0.5, 0.7], [0.9, 0.8]).mean == pytest.approx(-0.25)
    assert not paired_interval([0.5, 0.7], [0.9, 0.8]).above_zero


def test_one_value_has_no_interval_and_stays_valid_json():
    interval = mean_interval([0.9])
    assert interval.mean == 0.9
    assert interval.low is None
    assert interval.high is None
    assert not interval.above_zero
    assert json.loads(json.dumps(asdict(interval), allow_nan=False)) == {"mean": 0.9, "ci95": None, "n": 1}


def test_equal_values_have_an_interval_of_zero():
    assert mean_interval([0.25] * 4).ci95 == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "1 number or more"), ([[[0.1, 0.2]]], "1 number or more"), ([0.5, math.nan], r"values\[1\]=nan")],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values)


def test_unequal_lengths():
    with pytest.raises(ValueError, match="not 2 and 3"):
        paired_interval([1, 2], [1, 2, 3])
