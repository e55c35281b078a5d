"""Intervals against brute force, against scipy, and under the symmetries they must have."""

import itertools

import numpy as np
import pytest
from scipy import stats as reference

from jaxprune.stats import bootstrap_interval


def every_mean(values):
    """All `n ** n` resample means, sorted."""
    return np.sort([np.mean(draw) for draw in itertools.product(values, repeat=len(values))])


@pytest.mark.parametrize('n', [2, 3, 4, 5, 6])
@pytest.mark.parametrize('level', [0.5, 0.9, 0.95])
def test_small_samples_are_enumerated_exactly(n, level):
    values = np.random.default_rng(n).normal(size=n)
    means = every_mean(values)
    outside = int((1 - level) / 2 * len(means) + 1e-9)
    low, high = bootstrap_interval(values, level)
    np.testing.assert_allclose([low, high], [means[outside], means[-1 - outside]], atol=1e-12)


@pytest.mark.parametrize('n', [2, 3])
def test_interval_of_two_or_three_values_is_their_range(n):
    values = np.random.default_rng(0).normal(size=n)
    np.testing.assert_allclose(bootstrap_interval(values), (values.min(), values.max()))


@pytest.mark.parametrize('n', [5, 8, 9, 30])
def test_agrees_with_scipy(n):
    values = np.random.default_rng(n).normal(size=n)
    expected = reference.bootstrap(
        (values,), np.mean, method='percentile', n_resamples=40_000, rng=1
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values), expected, atol=0.02)


@pytest.mark.parametrize('n', [4, 20])
def test_rows_are_independent_and_repeatable(n):
    values = np.random.default_rng(0).normal(size=(3, 2, n))
    low, high = bootstrap_interval(values)
    assert low.shape == high.shape == (3, 2)
    assert (low <= values.mean(-1)).all() and (values.mean(-1) <= high).all()
    for place in np.ndindex(3, 2):
        assert (low[place], high[place]) == pytest.approx(bootstrap_interval(values[place]))


@pytest.mark.parametrize('n', [4, 7])
def test_shift_scale_and_mirror(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = bootstrap_interval(values)
    np.testing.assert_allclose(bootstrap_interval(3 * values + 5), (3 * low + 5, 3 * high + 5))
    np.testing.assert_allclose(bootstrap_interval(-values), (-high, -low))


def test_seed_matters_only_when_resamples_are_drawn():
    few, many = np.arange(5.0), np.random.default_rng(0).normal(size=12)
    assert bootstrap_interval(few, seed=0) == bootstrap_interval(few, seed=1)
    drawn = [bootstrap_interval(many, resamples=500, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_value_has_no_interval():
    assert np.isnan(bootstrap_interval([0.5])).all()
    low, high = bootstrap_interval(np.zeros((3, 1)))
    assert np.isnan(low).all() and np.isnan(high).all() and low.shape == (3,)


def test_equal_values_have_an_interval_of_no_width():
    np.testing.assert_allclose(bootstrap_interval([0.25] * 6), (0.25, 0.25))


@pytest.mark.parametrize(
    ('values', 'level', 'message'),
    [
        ([1.0, np.nan], 0.95, 'finite'),
        ([1.0, np.inf], 0.95, 'finite'),
        ([], 0.95, 'at least one'),
        (1.0, 0.95, 'at least one'),
        ([1.0, 2.0], 1.0, 'level'),
        ([1.0, 2.0], 0.0, 'level'),
    ],
)
def test_what_has_no_meaning_is_refused(values, level, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, level)
