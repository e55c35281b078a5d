"""Student's intervals: by a printed table of t, against scipy, and under their symmetries."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as reference

from jaxprune.errors import JaxpruneError
from jaxprune.stats import student_interval

#: Upper critical values of t, as printed in the NIST/SEMATECH e-Handbook of Statistical Methods,
#: section 1.3.6.7.2: (degrees of freedom, probability to the left) -> t, three decimals.
TABLE = {
    (1, 0.975): 12.706,
    (2, 0.975): 4.303,
    (3, 0.975): 3.182,
    (4, 0.975): 2.776,
    (9, 0.975): 2.262,
    (29, 0.975): 2.045,
    (2, 0.95): 2.920,
    (4, 0.95): 2.132,
    (4, 0.995): 4.604,
}


@pytest.mark.parametrize(('freedom', 'left'), TABLE)
def test_intervals_by_a_table_of_t(freedom, left):
    """Expectation: 0, 1, ..., n - 1 have mean (n - 1) / 2 and variance n (n + 1) / 12."""
    n = freedom + 1
    middle = (n - 1) / 2
    half = TABLE[freedom, left] * np.sqrt((n + 1) / 12)
    found = student_interval(np.arange(n), level=2 * left - 1)
    np.testing.assert_allclose(found, (middle - half, middle + half), atol=6e-4 * np.sqrt(n))


def test_two_values_by_hand():
    """Expectation: mean 97.2, s = 0.2 / sqrt(2), half-width 12.706 * 0.1 = 1.2706."""
    low, high = student_interval([97.1, 97.3])
    assert (low, high) == pytest.approx((95.9294, 98.4706), abs=1e-4)


@pytest.mark.parametrize('n', [2, 3, 5, 8, 30])
@pytest.mark.parametrize('level', [0.5, 0.9, 0.95, 0.999])
def test_agrees_with_scipy(n, level):
    values = np.random.default_rng(n).normal(size=n)
    expected = reference.t.interval(level, n - 1, values.mean(), reference.sem(values))
    np.testing.assert_allclose(student_interval(values, level), expected, rtol=1e-12)


@pytest.mark.parametrize('n', [4, 20])
def test_rows_are_independent(n):
    values = np.random.default_rng(0).normal(size=(3, 2, n))
    low, high = student_interval(values)
    assert low.shape == high.shape == (3, 2)
    assert (low < values.mean(-1)).all() and (values.mean(-1) < high).all()
    for place in np.ndindex(3, 2):
        assert (low[place], high[place]) == pytest.approx(student_interval(values[place]))


@pytest.mark.parametrize('n', [2, 7])
def test_shift_scale_and_mirror(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = student_interval(values)
    np.testing.assert_allclose(student_interval(3 * values + 5), (3 * low + 5, 3 * high + 5))
    np.testing.assert_allclose(student_interval(-values), (-high, -low))


def test_covers_the_mean_as_often_as_it_says():
    """Expectation: 95 % of 20,000 samples of three, give or take three standard errors."""
    low, high = student_interval(np.random.default_rng(0).normal(size=(20_000, 3)))
    assert np.mean((low < 0) & (high > 0)) == pytest.approx(0.95, abs=3 * 0.0016)


def test_one_value_has_no_interval():
    assert np.isnan(student_interval([0.5])).all()
    low, high = student_interval(np.zeros((3, 1)))
    assert np.isnan(low).all() and np.isnan(high).all() and low.shape == (3,)


def test_equal_values_have_an_interval_of_no_width():
    np.testing.assert_allclose(student_interval([0.25] * 6), (0.25, 0.25))


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
    with pytest.raises(JaxpruneError, match=message):
        student_interval(values, level)


def test_importing_jaxprune_does_not_import_scipy():
    code = (
        'import sys, jaxprune, jaxprune.stats\n'
        'assert not [m for m in sys.modules if m.partition(".")[0] == "scipy"]'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
