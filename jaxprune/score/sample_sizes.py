"""How many draws an error allows, and how many different things they find (SiPP, PFP).

Of arXiv:1910.05422 and arXiv:1911.07412. What is to be drawn has probabilities p; m draws with
replacement find each thing with probability `1 - (1 - p)**m`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.arguments import least, positive
from jaxprune.types import Key

#: The published probability that a bound is broken, and the constant C of the bounds.
FAILURE, CONSTANT = 1e-16, 3.0
#: K of the number of draws.
_K = 3


def log_term(positions: int, taps: int, failure: ArrayLike = FAILURE) -> jax.Array:
    """`log(8 (positions + 1) taps / failure)` of the bounds."""
    positive('failure', failure)
    return math.log(8 * (positions + 1) * taps) - jnp.log(failure)


def sample_complexity(coefficient: ArrayLike, epsilon: float) -> np.ndarray:
    """The draws that keep the relative error of a layer below epsilon, at least 1.

    `ceil(3 (6 + 2 epsilon) S / epsilon**2)`, on the host.

    Args:
      coefficient: S, `2 C log(8 (positions + 1) taps / failure)` times a sum of sensitivities.
      epsilon: the error, above 0.
    """
    positive('epsilon', epsilon)
    wanted = _K * (6 + 2 * epsilon) * np.asarray(coefficient, np.float64) / epsilon / epsilon
    return np.maximum(np.ceil(wanted), 1)


def expected_unique(probabilities: ArrayLike, draws: ArrayLike) -> np.ndarray:
    """How many different things draws are expected to find, rounded up; on the host.

        expected_unique([0.25, 0.25, 0.25, 0.25], 4)  # ceil(2.734375) = 3

    Args:
      probabilities: `(..., n)`.
      draws: their number, of the shape of the leading axes.
    """
    p = np.asarray(probabilities, np.float64)
    found = 1 - (1 - p) ** np.asarray(draws, np.float64)[..., None]
    return np.ceil(found.sum(-1))


def draws_for(probabilities: ArrayLike, wanted: int, *, uniform: bool = False) -> int:
    """A number of draws whose `expected_unique` is the number wanted, on the host.

    Several numbers have that; this is the one where the authors' bisection ends. It starts from a
    bound that holds by the concavity of `1 - (1 - p)**m`, doubles it until enough is found, and
    stops at the first midpoint that fits. To find all n for certain no number is large enough, so
    n - 1 are asked for instead.

    Args:
      probabilities: `(n,)`; zeros do not count.
      wanted: how many different things.
      uniform: take all that are not zero for equally likely; that number has a closed form.

    Raises:
      PruneError: a number wanted that is below 0.
    """
    least(0, wanted=wanted)
    p = np.asarray(probabilities, np.float64).ravel()
    single = p.size == 1 and p[0] > 0
    p = p[p > 0]
    n = p.size
    if wanted <= 1 or single:
        return wanted
    if n <= 1:
        return n
    wanted = min(wanted, n - 1)
    if uniform:
        return math.ceil(math.log(n / (n - wanted)) / math.log(n / (n - 1)))
    low = math.floor(math.log(n / (n - wanted)) / -math.log1p(-p.mean()))
    return _first_fit(lambda draws: expected_unique(p, draws) - wanted, low)


def _first_fit(missing, low: int) -> int:
    """Where a bisection for a zero of a rising step function ends, from a number below it."""
    if missing(low) == 0:
        return low
    high = max(low, 1)
    while missing(high) < 0:
        high *= 2
    if missing(high) == 0:
        return high
    start, width = float(low), float(high - low)
    while True:
        width /= 2
        middle = start + width
        found = missing(int(middle))
        if found == 0:
            return int(middle)
        if found < 0:
            start = middle


def quotient(above: jax.Array, below: jax.Array) -> jax.Array:
    """The quotient, 0 where the denominator is 0."""
    return above / jnp.where(below == 0, 1, below)


def drawn(key: Key, probabilities: jax.Array, draws: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Counts of draws with replacement, and `count / (draws p)`, which is 1 in the mean.

    Args:
      key: the draw.
      probabilities: `(..., n)`, each row sums to 1 or is zero.
      draws: of the shape of the leading axes, or one for all.

    Returns:
      Both `(..., n)`; 0 where the probability is.
    """
    number = jnp.broadcast_to(jnp.asarray(draws, probabilities.dtype), probabilities.shape[:-1])
    counts = jax.random.multinomial(key, number, probabilities, dtype=probabilities.dtype)
    return counts, quotient(counts, number[..., None] * probabilities)
