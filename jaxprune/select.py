"""From scores to masks: exactly k weights, with k a traced integer.

A threshold is found by counting the scores at or above a guess, without a sort, see `threshold`
and `threshold_on_gpu`. Ties go to the lowest flat index. NaN and -inf are never kept, so pruned
entries stay pruned when their score is -inf.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError
from jaxprune.threshold import Bracket, Search, around, lowest, ordered, padded
from jaxprune.threshold_on_gpu import low_ends, thresholds
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
    return _top_k_masks({'': scores}, {'': k})['']


def _top_k_masks(scores: Scores, counts: Counts) -> Masks:
    """`top_k_mask` of each leaf. All leaves share one loop: every turn costs a GPU time."""
    flat = {name: as_floats(leaf).reshape(-1) for name, leaf in scores.items()}
    # -inf and NaN become the lowest integer.
    places = {name: jnp.where(v > -jnp.inf, ordered(v), lowest(v)) for name, v in flat.items()}
    places = {name: padded(values, lowest(values)) for name, values in places.items()}
    searches = {n: around(places[n], as_count(counts[n], leaf.size)) for n, leaf in flat.items()}
    found = thresholds(searches)
    # Where there are too many ties, keep the first ones. A second search finds the last index; a
    # cumulative sum would cost more. Where all ties are in, it ends before it begins.
    ranks = {}
    for name, values in places.items():
        low, high, above_low, above_high = found[name]
        ties, k = (values >= low) & (values < high), searches[name].k
        rank = jnp.where(ties, values.size - jnp.arange(values.size, dtype=jnp.int32), 0)
        every = Bracket(k - k + 1, k - k + values.size + 1, above_low - above_high, k - k)
        ranks[name] = Search(rank, k - above_high, every)
    first = low_ends(ranks)
    masks = {
        name: (values >= found[name].high) | (ranks[name].values >= first[name])
        for name, values in places.items()
    }
    return {n: masks[n][: leaf.size].reshape(scores[n].shape) for n, leaf in flat.items()}


def as_floats(scores: jax.Array) -> jax.Array:
    """Scores in single or double precision; smaller floats are widened, which is exact.

    Raises:
      PruneError: the scores are not floating point.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise PruneError(f'scores must be floating point, not {scores.dtype}')
    return scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores


def as_count(k: ArrayLike, size: int) -> jax.Array:
    """k as int32, clipped to [0, size] before it could overflow; a fraction is an error."""
    if not isinstance(k, jax.Array):
        k = np.asarray(k)  # exact, where a device array would wrap a large host integer
    elif k.dtype.itemsize < 4 and jnp.issubdtype(k.dtype, jnp.integer):
        k = k.astype(jnp.int32)  # the size may be beyond its type
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise PruneError(f'a keep count must be an integer, not {k.dtype}')
    return jnp.asarray(k.clip(0, size), jnp.int32)


def global_top_k(scores: Scores, counts: Counts) -> Masks:
    """One ranking over all leaves, concatenated in sorted path order.

    Args:
      scores: path -> scores; `within_bounds` puts floors and caps on leaves.
      counts: `{'*': k}`.

    Raises:
      PruneError: `scores` has no leaf, or `counts` has other keys than '*'.
    """
    check_same_paths('counts of a global selection', counts, {GLOBAL})
    if not scores:
        raise PruneError('a global selection needs the scores of at least one leaf')
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
        best = _top_k_masks(scores, most)
        scores = {path: jnp.where(best[path], leaf, -jnp.inf) for path, leaf in scores.items()}
    if fewest is not None:
        best = _top_k_masks(scores, fewest)
        scores = {path: jnp.where(best[path], jnp.inf, leaf) for path, leaf in scores.items()}
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
    return _top_k_masks(dict(sorted(scores.items())), counts)


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
