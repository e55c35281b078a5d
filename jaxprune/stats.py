"""Student's interval for a mean over few seeds."""

import math

import numpy as np
from numpy.typing import ArrayLike

from jaxprune.errors import JaxpruneError


def student_interval(
    values: ArrayLike, level: float = 0.95
) -> tuple[np.ndarray | np.float64, np.ndarray | np.float64]:
    """Student's t interval of the mean along the last axis: `mean ± t s / sqrt(n)`.

    It covers the true mean in the share `level` of all samples if the values are independent and
    normal. The factor t makes up for an s estimated from few values: 12.7 for two of them, 4.3 for
    three and 2.8 for five, at 95 %.

    Args:
      values: `(..., n)`, finite, `n >= 1`.
      level: the share of samples whose interval holds the true mean, in (0, 1).

    Returns:
      `(low, high)`, each of shape `(...)`; both NaN for `n = 1`, which shows no spread.

    Raises:
      JaxpruneError: no values, values that are not finite, or a level outside (0, 1).

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(float(low), 3), round(float(high), 3)
    (-0.484, 4.484)
    """
    # Imported here, so that `import jaxprune` stays light.
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise JaxpruneError('an interval needs at least one value along the last axis')
    if not np.isfinite(values).all():
        raise JaxpruneError('values must be finite: drop diverged runs first')
    if not 0 < level < 1:
        raise JaxpruneError(f'level must lie between 0 and 1, got {level}')
    n = values.shape[-1]
    if n == 1:
        nothing = np.full(values.shape[:-1], np.nan)[()]
        return nothing, nothing
    mean = values.mean(axis=-1)
    half = stdtrit(n - 1, (1 + level) / 2) * values.std(axis=-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half
