"""Agreement of two measures of importance: on values, on ranks, on the weights they would keep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.allocation import check_density
from jaxprune.errors import PruneError
from jaxprune.select import as_floats, top_k_mask
from jaxprune.tree import check_masks_of, check_same_paths
from jaxprune.types import GLOBAL, Masks, Weights


class Agreement(NamedTuple):
    """Agreement of two measures, path -> scalar, and at '*' over all leaves together.

    Attributes:
      pearson: linear correlation of the values.
      spearman: the same of the ranks; equal values share their mean rank.
      overlap: of the k weights that each would keep, the share that both keep, |A ∩ B| / k; the
        Jaccard index is `overlap / (2 - overlap)`.

    All three are NaN where no entry counts or a value is NaN; the correlations also where a measure
    does not vary.
    """

    pearson: dict[str, jax.Array]
    spearman: dict[str, jax.Array]
    overlap: dict[str, jax.Array]


def agreement(
    one: Weights, other: Weights, masks: Masks | None = None, *, density: ArrayLike = 0.1
) -> Agreement:
    """Compares two measures over unpruned weights, or over units, with one value per unit.

    Args:
      one: path -> values, such as scores, or sums of them by `score.group_sums`.
      other: the same paths and shapes.
      masks: which entries count; None for all.
      density: of `overlap`: the share of entries each measure would keep.

    Raises:
      PruneError: nothing to compare, other paths or shapes, masks that are not boolean, a density
        not in (0, 1].
    """
    if not one:
        raise PruneError('there is nothing to compare: the measures have no leaves')
    check_same_paths('measures', other, one)
    if masks is not None:
        check_masks_of(one, masks)
    if not isinstance(density, jax.core.Tracer):
        check_density(density)
    for path, leaf in one.items():
        if leaf.shape != other[path].shape:
            raise PruneError(f"'{path}' has shapes {leaf.shape} and {other[path].shape}")

    def flat(tree: Weights) -> dict[str, jax.Array]:
        leaves = {path: tree[path].ravel() for path in sorted(one)}
        return {**leaves, GLOBAL: jnp.concatenate(list(leaves.values()))}

    keep = (
        {path: jnp.ones(leaf.shape, bool) for path, leaf in one.items()} if masks is None else masks
    )
    a, b, keep = flat(one), flat(other), flat(keep)
    each = {path: (a[path], b[path], keep[path]) for path in a}
    return Agreement(
        {path: pearson(*values) for path, values in each.items()},
        {path: spearman(*values) for path, values in each.items()},
        {path: top_overlap(*values, density=density) for path, values in each.items()},
    )


def pearson(a: jax.Array, b: jax.Array, keep: jax.Array) -> jax.Array:
    """Linear correlation of the entries that count; NaN where either does not vary."""
    count = keep.sum()
    # Checked first: the mean of equal numbers may differ from them by a rounding error.
    vary = _varies(a, keep) & _varies(b, keep)
    a, b = (jnp.where(keep, v - jnp.where(keep, v, 0).sum() / count, 0) for v in (a, b))
    # Scaled first: squares of small gradients leave float32.
    a, b = (v / jnp.where(v.any(), jnp.abs(v).max(), 1) for v in (a, b))
    lengths = jnp.sqrt((a**2).sum() * (b**2).sum())
    alike = (a * b).sum() / jnp.where(lengths > 0, lengths, 1)
    return jnp.where(vary & (lengths > 0), alike, jnp.nan)


def spearman(a: jax.Array, b: jax.Array, keep: jax.Array) -> jax.Array:
    """Correlation of the ranks of the entries that count."""
    a, b = as_floats(a), as_floats(b)
    found = pearson(_ranks(a, keep), _ranks(b, keep), keep)
    return jnp.where(_broken(a, b, keep), jnp.nan, found)


def top_overlap(a: jax.Array, b: jax.Array, keep: jax.Array, *, density: ArrayLike) -> jax.Array:
    """Of the entries that count, the share of the largest that is common to both."""
    k = jnp.maximum(jnp.round(density * keep.sum()).astype(jnp.int32), 1)
    first, second = (top_k_mask(jnp.where(keep, v, -jnp.inf), k) for v in (a, b))
    return jnp.where(_broken(a, b, keep) | ~keep.any(), jnp.nan, (first & second).sum() / k)


def _varies(values: jax.Array, keep: jax.Array) -> jax.Array:
    """Are there two different values that count?"""
    low, high = (jnp.where(keep, values, bound) for bound in (jnp.inf, -jnp.inf))
    return high.max() > low.min()


def _broken(a: jax.Array, b: jax.Array, keep: jax.Array) -> jax.Array:
    """Is a value that counts NaN?"""
    return ((jnp.isnan(a) | jnp.isnan(b)) & keep).any()


def _ranks(values: jax.Array, keep: jax.Array) -> jax.Array:
    """Ranks among the entries that count, ties at their mean; float, from 0."""
    place = jnp.arange(values.size, dtype=jnp.int32)
    order, back = jax.lax.sort((jnp.where(keep, values, jnp.inf), place), num_keys=1)
    new = jnp.concatenate([jnp.ones(1, bool), order[1:] != order[:-1]])
    first = jax.lax.cummax(jnp.where(new, place, 0))
    last = jax.lax.cummin(jnp.where(jnp.roll(new, -1), place, values.size), reverse=True)
    ranks = (first + last).astype(values.dtype) / 2
    return jnp.zeros_like(values).at[back].set(ranks)
