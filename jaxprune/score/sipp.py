"""SiPP: the weights with the largest share in the sums that they take part in.

Baykal, Liebenwein, Gilitschenski, Feldman & Rus, "SiPPing neural networks: sensitivity-informed
provable pruning of neural networks", arXiv:1910.05422.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.allocation import bisect
from jaxprune.arguments import least
from jaxprune.errors import PruneError
from jaxprune.score.edges import edge_sensitivities
from jaxprune.score.sample_sizes import CONSTANT, FAILURE, drawn, log_term, quotient
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def sipp(problem: Problem, *, train: bool = False) -> ScoreFn:
    """The sensitivity of each weight: its largest share over examples of the mean over positions.

    This is the deterministic version. It ranks all weights together; `edge_sensitivity` has the
    formula. A weight is compared with those of its own sign that lead to the same output, so layers
    need no factors between them. It needs inputs without labels; a few hundred are published.

    Args:
      problem: the network.
      train: must be False: single examples have no batch statistics.

    Raises:
      PruneError: train mode; when called, no batches, or a kernel that is seen in no product.
    """
    evaluation_only('sipp', train)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        found = edge_sensitivities(problem, view, batches, reduce='mean')
        return {path: edges.values for path, edges in found.items()}

    return jax.jit(score)  # of many small operations, also where nobody else compiles


def evaluation_only(name: str, train: bool) -> None:
    """Raises PruneError in train mode."""
    if train:
        raise PruneError(
            f'{name} looks at single examples, whose batch statistics mean nothing: score with '
            'train=False'
        )


class Rows(NamedTuple):
    """What each filter's positive weights, and its negative ones, are drawn by.

    Attributes:
      probabilities: `(2, filters, weights)`, positive ones first; they sum to 1 where any weight
        has a sensitivity, else to 0.
      coefficients: `(2, filters)`, `2 C log(8 (positions + 1) taps / failure)` times the sum of the
        sensitivities.
      nonzero: int32 `(2, filters)`, how many of them are not zero.
    """

    probabilities: jax.Array
    coefficients: jax.Array
    nonzero: jax.Array


def sipp_rows(
    problem: Problem,
    view: View,
    batches: Batches | None,
    *,
    axis: int = -1,
    failure: ArrayLike = FAILURE,
    constant: ArrayLike = CONSTANT,
) -> dict[str, Rows]:
    """The rows of every prunable kernel for random SiPP, with 'max' over positions; pure.

    Args:
      problem: the network, in evaluation mode.
      view: its weights.
      batches: the examples; labels are not used.
      axis: of a kernel's outputs, its filters.
      failure: the probability with which a bound may be broken.
      constant: C of the bounds.

    Raises:
      PruneError: no batches; a prunable leaf that is seen in no product.
    """
    found = edge_sensitivities(problem, view, batches)

    def rows(path: str) -> Rows:
        values, positions, _, taps = found[path]
        signed = _signed(view.weights[path], values, axis)
        sums = signed.sum(-1)
        factor = 2 * constant * log_term(positions, taps, failure)
        nonzero = (signed > 0).sum(-1, dtype=jnp.int32)
        return Rows(quotient(signed, sums[..., None]), factor * sums, nonzero)

    return {path: rows(path) for path in view.weights}


def sipp_allocation(rows: Mapping[str, Rows], budget: int) -> dict[str, np.ndarray]:
    """How many weights random SiPP keeps of each filter and sign, on the host.

    Minimises the sum over layers of the mean over filters of the error `e(x)` with
    `x = coefficient (6 + 2 epsilon) / (3 epsilon**2)` and `e = epsilon / 2`, subject to
    `0 <= x <= nonzero` and a sum of at most `budget`, and rounds x up, so the counts may add up to
    more. The problem is convex and its parts meet only in the budget: at the optimum all slopes
    `e'(x)` inside of the bounds are equal, and this slope is found by bisection. The authors' code
    gives the same problem to a general solver.

    Args:
      rows: see `sipp_rows`.
      budget: how many weights are kept in all, before rounding up.

    Returns:
      path -> int `(2, filters)`.

    Raises:
      PruneError: a budget that is no whole number of at least 1.
    """
    least(1, budget=budget)
    sizes = {path: np.shape(row.coefficients) for path, row in rows.items()}
    flat = [np.asarray(row.coefficients, np.float64).ravel() / 3 for row in rows.values()]
    third = np.concatenate(flat)
    most = np.concatenate([np.ravel(row.nonzero) for row in rows.values()]).astype(np.float64)
    share = np.concatenate([np.full(2 * n, 1 / n) for _, n in sizes.values()])
    kept = most
    if most.sum() > budget:
        # The steeper the common slope is, the fewer weights are kept.
        slope = bisect(lambda s: _kept_at(s, third, share, most).sum() >= budget, 0.0, 1e12)
        kept = _kept_at(slope, third, share, most)
    # Not up to the next number for a rounding error of the bisection.
    counts = np.ceil(kept * (1 - 1e-9)).astype(int)
    ends = np.cumsum([2 * n for _, n in sizes.values()])[:-1]
    parts = zip(sizes.items(), np.split(counts, ends), strict=True)
    return {path: part.reshape(shape) for (path, shape), part in parts}


def _kept_at(slope: float, third: np.ndarray, share: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Where the weighted errors fall with a slope, within the bounds."""

    def steepness(x: np.ndarray) -> np.ndarray:
        a = third / x
        return share * a / (2 * x) * ((a + 3) / np.sqrt(a * a + 6 * a) + 1)

    low, high = np.full_like(most, 1e-12), np.maximum(most, 1e-12)
    with np.errstate(invalid='ignore'):  # 0 / 0 of rows without any weight
        for _ in range(100):
            middle = (low + high) / 2
            steeper = steepness(middle) > slope
            low, high = np.where(steeper, middle, low), np.where(steeper, high, middle)
    return np.where(most > 0, np.minimum(high, most), 0)


def sipp_sample(
    key: Key, kernel: jax.Array, sensitivity: jax.Array, draws: ArrayLike, *, axis: int = -1
) -> tuple[jax.Array, jax.Array]:
    """A random sparse kernel whose mean is the kernel: SiPP's random version; pure.

    Each filter's positive weights, and its negative ones, are drawn with replacement with
    probabilities p in proportion to their sensitivities. A weight drawn c times of m becomes
    `w c / (m p)`. So what a filter computes is right in the mean, as far as its weights have a
    sensitivity; those without are never drawn. The authors leave a filter as it is where the draw
    misses none of its weights, which gives up some of that; here all filters are treated alike.

    Args:
      key: the draw.
      kernel: any shape.
      sensitivity: of the kernel's shape, at least 0.
      draws: whole numbers `(2, filters)`, or one for all; may be traced. With 0 nothing is kept.
        `draws_for` says how many lead to how many weights.
      axis: of the kernel's outputs, its filters.

    Returns:
      The kernel and its mask, True where a weight was drawn.

    Raises:
      PruneError: sensitivities of another shape.
    """
    if jnp.shape(sensitivity) != jnp.shape(kernel):
        raise PruneError(
            f'the kernel has shape {jnp.shape(kernel)}, its sensitivities {jnp.shape(sensitivity)}'
        )
    signed = _signed(kernel, sensitivity, axis)
    counts, scale = drawn(key, quotient(signed, signed.sum(-1, keepdims=True)), draws)
    turned = jnp.moveaxis(kernel, axis, 0)

    def back(of_signs: jax.Array) -> jax.Array:  # a weight has one sign
        return jnp.moveaxis(of_signs.sum(0).reshape(turned.shape), 0, axis)

    return kernel * back(scale).astype(kernel.dtype), back(counts) > 0


def _signed(kernel: jax.Array, sensitivity: jax.Array, axis: int) -> jax.Array:
    """`(2, filters, weights)`: the sensitivities of positive weights, and of negative ones."""
    filters = kernel.shape[axis]
    w, s = (jnp.moveaxis(a, axis, 0).reshape(filters, -1) for a in (kernel, sensitivity))
    return jnp.stack([jnp.where(w > 0, s, 0), jnp.where(w < 0, s, 0)])
