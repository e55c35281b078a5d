"""Markdown for scripts that check what a study says: tables, and differences with a verdict."""

from collections.abc import Sequence

import numpy as np

from jaxprune.stats import bootstrap_interval


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table; cells are written as they are."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Mean and standard deviation over seeds: `95.31 ± 0.12`."""
    return f'{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}'


def difference(values: np.ndarray, digits: int = 2) -> str:
    """The mean of paired differences with its 95 % bootstrap interval: `+0.19 [+0.03, +0.40]`."""
    low, high = bootstrap_interval(values)
    return f'{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


def verdict(values: np.ndarray, digits: int = 2) -> str:
    """What paired differences say of an expected plus: 'holds', 'reversed' or 'open', and the mean.

    It holds if the interval lies above zero, is reversed if it lies below, and open otherwise.
    """
    low, high = bootstrap_interval(values)
    word = 'holds' if low > 0 else 'reversed' if high < 0 else 'open'
    return f'{word}, {difference(values, digits)}'
