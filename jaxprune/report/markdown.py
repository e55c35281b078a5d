"""Markdown for scripts that check the claims of a study: tables, differences and verdicts."""

from collections.abc import Sequence

import numpy as np

from jaxprune.stats import student_interval


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table; bars within cells are escaped."""
    lines = [head, ['---'] * len(head), *rows]
    cells = ((str(cell).replace('|', r'\|') for cell in line) for line in lines)
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Mean and standard deviation over seeds: `95.31 ± 0.12`."""
    return f'{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}'


def interval(values: np.ndarray, digits: int = 2) -> str:
    """Mean over seeds with its 95 % Student interval: `95.31 [95.10, 95.52]`."""
    low, high = _interval(values)
    return f'{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def difference(values: np.ndarray, digits: int = 2) -> str:
    """The mean of paired differences with its 95 % Student interval: `+0.19 [+0.03, +0.40]`."""
    low, high = _interval(values)
    return f'{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


def verdict(values: np.ndarray, digits: int = 2) -> str:
    """Whether differences are positive as expected: 'holds', 'reversed' or 'open', and the mean.

    It holds if the interval lies above zero, is reversed if it lies below, and open otherwise.
    """
    low, high = _interval(values)
    word = 'holds' if low > 0 else 'reversed' if high < 0 else 'open'
    return f'{word}, {difference(values, digits)}'


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval; NaN where a value is not finite, so that the verdict is 'open'."""
    return student_interval(values) if np.isfinite(values).all() else (np.nan, np.nan)
