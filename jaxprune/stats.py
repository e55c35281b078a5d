"""Intervals for a mean over few seeds: the percentile bootstrap, exact where it can be."""

import functools
import math

import numpy as np

_EXACT_UP_TO = 8
"""Largest sample whose every resample is enumerated: C(15, 8) = 6435 distinct ones."""


@functools.cache
def _all_resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every distinct resample of `n` values, and how many of the `n ** n` draws give it.

    Returns:
      `counts (m, n)`, how often each value is drawn, and `ways (m,)`, exact integers.
    """

    def compositions(total: int, parts: int):
        if parts == 1:
            yield (total,)
            return
        for first in range(total + 1):
            for rest in compositions(total - first, parts - 1):
                yield (first, *rest)

    counts = list(compositions(n, n))
    ways = [math.factorial(n) // math.prod(map(math.factorial, row)) for row in counts]
    return np.array(counts, np.float64), np.array(ways, np.int64)


@functools.lru_cache(maxsize=4)
def _drawn_resamples(n: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`resamples` random resamples in the form of `_all_resamples`."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return counts.astype(np.float64), np.ones(resamples, np.int64)


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile-bootstrap interval of the mean along the last axis (Efron, 1979).

    Up to eight values all `n ** n` resamples are counted exactly, so `resamples` and `seed` do not
    matter; beyond, `resamples` are drawn, the same ones for every row. An end of the interval is
    the outermost mean that leaves at most `(1 - level) / 2` of the resamples strictly outside.

    With a handful of values such an interval is known to be too narrow: read it as a lower bound
    on the uncertainty. For two or three values it is simply their range.

    Args:
      values: `(..., n)`, finite, `n >= 1`.
      level: share of the resampled means inside, in (0, 1).
      resamples: number of random resamples when `n > 8`.
      seed: of the random resamples.

    Returns:
      `(low, high)`, each of shape `(...)`; both NaN for `n = 1`, where nothing is known.

    Raises:
      ValueError: no values, values that are not finite, or a level outside (0, 1).

    >>> low, high = bootstrap_interval([1.0, 2.0, 6.0])
    >>> float(low), float(high)
    (1.0, 6.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError('an interval needs at least one value along the last axis')
    if not np.isfinite(values).all():
        raise ValueError('values must be finite: drop diverged runs first')
    if not 0 < level < 1:
        raise ValueError(f'level must lie between 0 and 1, got {level}')
    n = values.shape[-1]
    if n == 1:
        nothing = np.full(values.shape[:-1], np.nan)[()]
        return nothing, nothing
    if n <= _EXACT_UP_TO:
        counts, ways = _all_resamples(n)
    else:
        counts, ways = _drawn_resamples(n, resamples, seed)

    means = values @ counts.T / n
    order = np.argsort(means, axis=-1, kind='stable')
    means = np.take_along_axis(means, order, axis=-1)
    ways = ways[order]
    up_to = np.cumsum(ways, axis=-1)
    total = up_to[..., -1:]
    tail = (1 - level) / 2 * total
    low = np.argmax(up_to > tail, axis=-1)
    # Mirror image of `low`, so that negating the values negates and swaps the ends.
    from_here = total - up_to + ways
    high = means.shape[-1] - 1 - np.argmax((from_here > tail)[..., ::-1], axis=-1)

    def pick(index):
        return np.take_along_axis(means, index[..., None], axis=-1)[..., 0][()]

    return pick(low), pick(high)
