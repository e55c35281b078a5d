"""From scores to masks: exactly k weights, with k a traced integer.

A threshold is found by bisection over the bits of the floats, at most 32 counting passes without
a sort, fewer where one leaves exactly k before that; under `vmap` each pass is one reduction over
all runs. Ties go to the lowest flat index. NaN and -inf are never kept, so pruned entries stay
pruned when their score is -inf.
"""

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
    shape = scores.shape
    flat = as_floats(scores).reshape(-1)
    keepable = flat > -jnp.inf  # False for NaN as well
    bits = jnp.where(keepable, _ordered_bits(flat), 0)  # 0 is below the bits of any float
    k = jnp.minimum(_count(k, flat.size), keepable.sum(dtype=jnp.int32))
    threshold, exact = _bisect(bits, k, bits.dtype.itemsize * 8, jnp.bool_(False))
    above = bits > threshold
    ties = bits == threshold
    wanted = k - above.sum(dtype=jnp.int32)
    # Of ties that are too many the first `wanted`: bisect on their index as well, a cumulative sum
    # would cost more. If the threshold is exact, all ties are in: done, the bound on the rank is 0.
    position = jnp.arange(flat.size, dtype=jnp.uint32)
    rank = jnp.where(ties, jnp.uint32(flat.size) - position, 0)  # low index = high rank, > 0
    lowest, _ = _bisect(rank, wanted, flat.size.bit_length(), exact)
    return (above | (ties & (rank >= lowest))).reshape(shape)


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


def _ordered_bits(flat: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats, single or double; -0.0 equals +0.0."""
    width = flat.dtype.itemsize * 8
    unsigned = jnp.uint64 if width == 64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(flat, unsigned)
    sign = unsigned(1 << (width - 1))
    # Not `flat == 0`: on the CPU that is true for subnormal numbers too.
    bits = jnp.where(bits == sign, unsigned(0), bits)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _bisect(
    bits: jax.Array, k: jax.Array, width: int, done: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A threshold t < 2**width with exactly k entries >= t, and True.

    Where ties rule that out: the largest t with at least k entries >= t, and False; for k >= 1
    this is the k-th largest entry. If already `done`, t is 0.
    """
    one = jnp.ones((), bits.dtype)

    def refine(state):
        i, t, _ = state
        candidate = t | (one << (width - 1 - i).astype(bits.dtype))
        count = (bits >= candidate).sum(dtype=jnp.int32)
        return i + 1, jnp.where(count >= k, candidate, t), count == k

    # The start is made from the arguments: inside `shard_map` a constant carry has another type.
    none = k - k
    zero = none.astype(bits.dtype) | (bits[0] ^ bits[0] if bits.size else 0)
    start = zero.astype(jnp.int32), zero, done | (zero > 0)
    _, t, exact = jax.lax.while_loop(lambda s: (s[0] < width) & ~s[2], refine, start)
    return t, exact


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
