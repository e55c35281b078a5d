"""Markdown of studies: verdicts are those of Student's t test."""

import numpy as np
import pytest

from jaxprune.report import markdown


@pytest.mark.parametrize('count', [2, 3, 5])
def test_intervals_are_those_of_the_t_test(count):
    """Expectation: scipy's one-sample t test; zero is outside iff its p value is below 5 %."""
    import scipy.stats

    for seed in range(20):
        values = np.random.default_rng(seed).normal(1, 1, count)
        test = scipy.stats.ttest_1samp(values, 0)
        low, high = test.confidence_interval(0.95)
        assert markdown.difference(values, 6).endswith(f'[{low:+.6f}, {high:+.6f}]')
        word = 'open' if test.pvalue > 0.05 else 'holds' if values.mean() > 0 else 'reversed'
        assert markdown.verdict(values).startswith(f'{word}, ')


def test_verdicts():
    """Expectation: mean 2, half-width 4.3027 / sqrt(3) of (1, 2, 3), by a table of t."""
    assert markdown.verdict(np.array([1.0, 2.0, 3.0])) == 'open, +2.00 [-0.48, +4.48]'
    assert markdown.verdict(np.array([3.0, 4.0, 5.0]), 1) == 'holds, +4.0 [+1.5, +6.5]'
    assert markdown.verdict(np.array([1.0, np.nan])).startswith('open, ')
    assert markdown.interval(np.array([1.0, 2.0, 3.0])) == '2.00 [-0.48, 4.48]'
    assert markdown.verdict(-np.array([3.0, 4.0, 5.0]), 1) == 'reversed, -4.0 [-6.5, -1.5]'


def test_tables():
    assert markdown.table(['a', 'b'], [[1, 2]]) == '| a | b |\n| --- | --- |\n| 1 | 2 |'
    assert markdown.table(['|w|'], [[1.5]]) == '| \\|w\\| |\n| --- |\n| 1.5 |'
    assert markdown.spread(np.array([1.0, 3.0]), 1) == '2.0 ± 1.4'
