"""LAMP: layer-adaptive magnitude (Lee et al., ICLR 2021, arXiv:2010.07611)."""

import jax
import jax.numpy as jnp

from jaxprune.score.scaled import normalise
from jaxprune.types import Batches, Key, ScoreFn, Scores, View


def lamp() -> ScoreFn:
    """`w² / Σ w_v²` over all weights v of the leaf that are at least as large, itself included.

    Within a leaf the order is that of `|w|`; of equal ones the lower index counts as the larger,
    as selections break ties. The largest weight of a leaf scores 1, so one ranking over all
    leaves empties none as long as it keeps one weight per leaf; and the scale of a leaf does not
    matter. Zeros score 0, the pruned weights among them.

    One sort per leaf.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key, batches
        return {path: _leaf(w) for path, w in view.weights.items()}

    return score


def _leaf(weights: jax.Array) -> jax.Array:
    # The square must not leave the range; a power of two changes no digit.
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    magnitude = jnp.abs(normalise(weights.reshape(-1).astype(wide)).array)
    order = jnp.argsort(magnitude, descending=True, stable=True)
    squares = magnitude[order] ** 2
    # XLA sums in a tree, to within a few units in the last place for millions of terms. But such
    # sums need not rise from each term to the next, so of the quotients the falling part is kept.
    sums = jnp.cumsum(squares)
    ratios = jax.lax.cummin(jnp.where(squares > 0, squares / sums, 0))
    return jnp.zeros_like(magnitude).at[order].set(ratios).reshape(weights.shape)
