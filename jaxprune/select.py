"""From scores to masks: exactly k weights, with k a traced integer.

The k-th largest score is found by bisection over the bits of the floats, 32 counting passes
without a sort; under `vmap` each pass is one reduction over all runs. Ties go to the lowest flat
index. NaN and -inf are never kept, so pruned entries stay pruned when their score is -inf.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError
from jaxprune.tree import check_same_paths
from jaxprune.types import GLOBAL, Counts, Masks, Scores


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
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise PruneError(f'scores must be floating point, not {scores.dtype}')
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)  # exact
    flat = scores.reshape(-1)
    keepable = flat > -jnp.inf  # False for NaN as well
    bits = jnp.where(keepable, _ordered_bits(flat), 0)  # 0 is below the bits of any float
    k = jnp.minimum(_count(k, flat.size), keepable.sum(dtype=jnp.int32))
    threshold = _largest_with_count(bits, k, bits.dtype.itemsize * 8)
    above = bits > threshold
    ties = bits == threshold
    wanted = k - above.sum(dtype=jnp.int32)
    # The first `wanted` ties: bisect on their index as well, a cumulative sum would cost more.
    position = jnp.arange(flat.size, dtype=jnp.uint32)
    rank = jnp.where(ties, jnp.uint32(flat.size) - position, 0)  # low index = high rank, > 0
    first = rank >= _largest_with_count(rank, wanted, flat.size.bit_length())
    return (above | (ties & first)).reshape(shape)


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


def _largest_with_count(bits: jax.Array, k: jax.Array, width: int) -> jax.Array:
    """The largest t < 2**width for which at least k entries are >= t.

    For k >= 1 that is the k-th largest entry; for k = 0 it is 2**width - 1, above all entries.
    """
    one = jnp.ones((), bits.dtype)

    def refine(i, t):
        candidate = t | (one << (width - 1 - i).astype(bits.dtype))
        enough = (bits >= candidate).sum(dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, t)

    # The start is made from data: inside `shard_map` a constant carry has another type.
    start = bits[0] ^ bits[0] if bits.size else jnp.zeros((), bits.dtype)
    return jax.lax.fori_loop(0, width, refine, start)


def global_top_k(scores: Scores, counts: Counts) -> Masks:
    """One ranking over all leaves, concatenated in sorted path order.

    Args:
      scores: path -> scores.
      counts: `{'*': k}`.
    """
    check_same_paths('counts of a global selection', counts, {GLOBAL})
    ordered = sorted(scores)
    flat = jnp.concatenate([scores[path].reshape(-1) for path in ordered])
    mask = top_k_mask(flat, counts[GLOBAL])
    masks, start = {}, 0
    for path in ordered:
        size = scores[path].size
        masks[path] = mask[start : start + size].reshape(scores[path].shape)
        start += size
    return masks


def layerwise_top_k(scores: Scores, counts: Counts) -> Masks:
    """One ranking within each leaf.

    Args:
      scores: path -> scores.
      counts: path -> how many to keep there.
    """
    check_same_paths('counts of a layerwise selection', counts, scores)
    return {path: top_k_mask(leaf, counts[path]) for path, leaf in sorted(scores.items())}


def kept(masks: Masks) -> dict[str, jax.Array]:
    """Path -> number of weights kept, int32."""
    return {path: mask.sum(dtype=jnp.int32) for path, mask in masks.items()}
