"""From scores to masks: exactly k weights, with k a traced integer.

A threshold is found by counting how many scores are above a guess, without a sort: some ten to
fifteen passes where bisection takes as many as a float has bits. Under `vmap` each pass is one
reduction over all runs. Ties go to the lowest flat index. NaN and -inf are never kept, so pruned
entries stay pruned when their score is -inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError
from jaxprune.tree import check_same_paths
from jaxprune.types import GLOBAL, Counts, Masks, Scores, SelectFn


def top_k_mask(scores: jax.Array, k: ArrayLike) -> jax.Array:
    """The mask of the k largest entries; of equal ones those with the lowest flat index.

    Args:
      scores: float array of any shape.
      k: integer in [0, scores.size], may be traced. Values outside are clipped.

    Returns:
      bool array of the shape of `scores` with exactly k True entries, or fewer if fewer than k
      entries are above -inf (NaN and -inf are never kept).
    """
    flat = as_floats(scores).reshape(-1)
    places = jnp.where(flat > -jnp.inf, ordered(flat), _lowest(flat.dtype))  # so NaN is lowest too
    places = _padded(places, _lowest(flat.dtype))
    k, bracket = _around(places, _count(k, flat.size))
    low, high, above_low, above_high = _narrowed(places, k, bracket)
    # Of ties that are too many the first ones: search their index as well, a cumulative sum would
    # cost more. Where all ties are in, that search ends before it begins.
    ties = (places >= low) & (places < high)
    rank = jnp.where(ties, places.size - jnp.arange(places.size, dtype=jnp.int32), 0)
    every = Bracket(k - k + 1, k - k + places.size + 1, above_low - above_high, k - k)
    first = _narrowed(rank, k - above_high, every)
    mask = (places >= high) | (rank >= first.low)
    return mask[: flat.size].reshape(scores.shape)


def as_floats(scores: jax.Array) -> jax.Array:
    """Scores in single or double precision; smaller floats are widened, which is exact.

    Raises:
      PruneError: the scores are not floating point.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise PruneError(f'scores must be floating point, not {scores.dtype}')
    return scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores


def _count(k: ArrayLike, size: int) -> jax.Array:
    """k as int32, clipped to [0, size] before it could overflow; a fraction is an error."""
    if not isinstance(k, jax.Array):
        k = np.asarray(k)  # exact, where a device array would wrap a large host integer
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise PruneError(f'a keep count must be an integer, not {k.dtype}')
    return jnp.asarray(k.clip(0, size), jnp.int32)


def ordered(flat: jax.Array) -> jax.Array:
    """Signed integers in the order of the floats, single or double; -0.0 equals +0.0."""
    signed = jnp.dtype(f'int{flat.dtype.itemsize * 8}')
    bits = jax.lax.bitcast_convert_type(flat, signed)
    return jnp.where(bits < 0, -(bits & np.iinfo(signed).max), bits)


def _lowest(dtype: jnp.dtype) -> int:
    """Below the places of all floats of a type."""
    return int(np.iinfo(f'int{dtype.itemsize * 8}').min)


#: Entries that are counted together in one byte: several times as fast on a CPU.
_TOGETHER = 16


def _padded(values: jax.Array, value: int) -> jax.Array:
    """Values with more behind them, so that their number is a multiple of `_TOGETHER`."""
    missing = -values.size % _TOGETHER if values.size > _TOGETHER else 0
    return jnp.pad(values, (0, missing), constant_values=value)


def _count_from(values: jax.Array, threshold: ArrayLike) -> jax.Array:
    """How many of padded integers are at least the threshold."""
    return (_by_few(values) >= threshold).sum(1, dtype=jnp.int8).sum(dtype=jnp.int32)


def _by_few(values: jax.Array) -> jax.Array:
    """Padded values in rows that are counted together."""
    return values.reshape(-1, min(values.size, _TOGETHER) or 1)


class Bracket(NamedTuple):
    """Two thresholds with the wanted one between them.

    Attributes:
      low, high: integers of one type, low < high.
      above_low: how many entries are at least `low`: as many as wanted, or more.
      above_high: how many are at least `high`: fewer than wanted, or as many.
    """

    low: jax.Array
    high: jax.Array
    above_low: jax.Array
    above_high: jax.Array


def _around(places: jax.Array, k: jax.Array) -> tuple[jax.Array, Bracket]:
    """k, but no more than can be kept, and a bracket: from 0, as scores are rarely negative."""
    lowest = _lowest(places.dtype)
    keepable, positive = _count_from(places, lowest + 1), _count_from(places, 0)
    k = jnp.minimum(k, keepable)
    # In two steps, which is faster on a CPU.
    largest = _by_few(places).max(1).max(initial=lowest)
    rarely = positive < k
    return k, Bracket(
        jnp.where(rarely, lowest + 1, 0).astype(places.dtype),
        jnp.where(rarely, 0, jnp.maximum(largest, 0) + 1).astype(places.dtype),
        jnp.where(rarely, keepable, positive),
        # 0, made of the arguments: inside `shard_map` a constant carry has another type.
        jnp.where(rarely, positive, k - k),
    )


#: Guesses by interpolation, before halves that always end: as many passes as bits at most.
_GUESSES = 24


def _narrowed(values: jax.Array, k: jax.Array, bracket: Bracket) -> Bracket:
    """The bracket whose low end has exactly k entries at or above it; so has then the high end.

    Where ties rule that out: the bracket of length 1 around them, so that its low end has more than
    k entries at or above it and its high end fewer.

    The Illinois method: a guess where a straight line between both ends says k, and an end that
    stays twice counts half.
    """
    unsigned = jnp.dtype(f'uint{values.dtype.itemsize * 8}')

    def length(b: Bracket) -> jax.Array:
        return (b.high - b.low).astype(unsigned)  # wraps twice: right where it overflows

    def open_(state):
        b, *_ = state
        return (b.above_low != k) & (b.above_high != k) & (length(b) > 1)

    def refine(state):
        b, over, under, number, side = state
        way = length(b)
        guess = (way.astype(jnp.float32) * (over / (over + under))).astype(unsigned)
        guess = jnp.where(number < _GUESSES, guess, way // 2)
        guess = b.low + jnp.clip(guess, 1, way - 1).astype(b.low.dtype)
        count = _count_from(values, guess)
        more = count >= k
        off = jnp.abs(count - k).astype(jnp.float32)
        new = Bracket(
            jnp.where(more, guess, b.low),
            jnp.where(more, b.high, guess),
            jnp.where(more, count, b.above_low),
            jnp.where(more, b.above_high, count),
        )
        over = jnp.where(more, off, jnp.where(side < 0, over / 2, over))
        under = jnp.where(more, jnp.where(side > 0, under / 2, under), off)
        return new, over, under, number + 1, jnp.where(more, 1, -1).astype(side.dtype)

    over, under = (bracket.above_low - k).astype(jnp.float32), (k - bracket.above_high)
    start = bracket, over, under.astype(jnp.float32), k - k, k - k
    b = jax.lax.while_loop(open_, refine, start)[0]
    exact_low, exact_high = b.above_low == k, b.above_high == k
    return Bracket(
        jnp.where(exact_high & ~exact_low, b.high, b.low),
        jnp.where(exact_low & ~exact_high, b.low, b.high),
        jnp.where(exact_high, k, b.above_low),
        jnp.where(exact_low, k, b.above_high),
    )


def global_top_k(scores: Scores, counts: Counts) -> Masks:
    """One ranking over all leaves, concatenated in sorted path order.

    Args:
      scores: path -> scores; `within_bounds` puts floors and caps on leaves.
      counts: `{'*': k}`.
    """
    check_same_paths('counts of a global selection', counts, {GLOBAL})
    return unflatten(top_k_mask(flatten(scores), counts[GLOBAL]), scores)


def within_bounds(scores: Scores, fewest: Counts | None, most: Counts | None) -> Scores:
    """Scores under which one ranking over all leaves keeps to bounds per leaf.

    Args:
      scores: path -> scores.
      fewest: path -> how many weights its leaf keeps at least, whatever the other leaves score:
        its best are lifted to +inf. Their sum must not pass the number kept in all.
      most: path -> how many it keeps at most: the others become -inf. Their sum must not be less
        than the number kept in all.
    """
    for kind, bound in (('fewest', fewest), ('most', most)):
        if bound is not None:
            check_same_paths(f'bounds ({kind})', bound, scores)
    if most is not None:
        scores = {
            path: jnp.where(top_k_mask(leaf, most[path]), leaf, -jnp.inf)
            for path, leaf in scores.items()
        }
    if fewest is not None:
        scores = {
            path: jnp.where(top_k_mask(leaf, fewest[path]), jnp.inf, leaf)
            for path, leaf in scores.items()
        }
    return scores


def flatten(leaves: dict[str, jax.Array]) -> jax.Array:
    """All entries in one row, leaves in sorted path order."""
    return jnp.concatenate([leaves[path].reshape(-1) for path in sorted(leaves)])


def unflatten(flat: jax.Array, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `flatten`: leaves with the paths and shapes of `like`."""
    leaves, start = {}, 0
    for path in sorted(like):
        size = like[path].size
        leaves[path] = flat[start : start + size].reshape(like[path].shape)
        start += size
    return leaves


def layerwise_top_k(scores: Scores, counts: Counts) -> Masks:
    """One ranking within each leaf.

    Args:
      scores: path -> scores.
      counts: path -> how many to keep there.
    """
    check_same_paths('counts of a layerwise selection', counts, scores)
    return {path: top_k_mask(leaf, counts[path]) for path, leaf in sorted(scores.items())}


def divisible(kept: jax.Array, multiple: int, size: int) -> jax.Array:
    """A number kept of `size`, rounded up to a multiple: one multiple at least, or all."""
    return jnp.clip(-(-kept // multiple) * multiple, min(multiple, size), size)


def in_multiples(select: SelectFn, multiple: int) -> SelectFn:
    """The selection with the next best of each leaf, so that each keeps a multiple."""

    def selected(scores: Scores, counts: Counts) -> Masks:
        found = count_kept(select(scores, counts))
        wanted = {
            path: divisible(found[path], multiple, leaf.size) for path, leaf in scores.items()
        }
        return layerwise_top_k(scores, wanted)

    return select if multiple == 1 else selected


def unit_norm(scores: Scores) -> Scores:
    """Each leaf divided by its L2 norm plus 1e-8, so that no leaf wins by its scale alone.

    A global ranking of raw magnitudes compares the layers' scales above all; jaxpruner divides by
    the norm before its global rankings by default (Lee et al., 2023, arXiv:2304.14082). Within a
    leaf the order stays, up to rounding. As a selection:
    `lambda scores, counts: global_top_k(unit_norm(scores), counts)`.

    The norm is taken over the finite entries, where jaxpruner takes it over all: with pruned
    entries at -inf every score of its leaf would become 0 or NaN. What is not finite stays as it
    is: -inf and NaN are never kept, +inf ranks first.

    Args:
      scores: path -> float scores of any shape; half floats are widened first.

    Returns:
      The same paths and shapes. A leaf without a finite entry above 0 in size stays as it is.
    """

    def scaled(leaf):
        finite = jnp.where(jnp.isfinite(leaf), leaf, 0)
        # Squares of scores beyond 1e19 overflow; the scale 1 leaves ordinary scores untouched.
        scale = jnp.max(jnp.abs(finite), initial=1)
        norm = jnp.sqrt(jnp.square(finite / scale).sum())
        return leaf / scale / (norm + 1e-8 / scale)

    return {path: scaled(as_floats(leaf)) for path, leaf in sorted(scores.items())}


def count_kept(masks: Masks) -> dict[str, jax.Array]:
    """Path -> number of weights kept, int32."""
    return {path: mask.sum(dtype=jnp.int32) for path, mask in masks.items()}
