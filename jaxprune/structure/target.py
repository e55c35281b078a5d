"""Pruning to a number of *active* weights: bisection along a chain of nested masks.

Every ranking gives a chain of masks, each containing the one before: the best k of all weights,
or for a layerwise allocation the best of each layer at one nominal density. The number of active
weights never falls along the chain, so the sparsest mask with enough of them is found by
bisection (Vysogorets & Kempe, arXiv:2107.02306: the largest effective sparsity that does not pass
the target).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.allocation import SHARED, Shape, bounds
from jaxprune.errors import PruneError
from jaxprune.plan import Plan, density_of, keep_counts, plan_rounds
from jaxprune.select import count_kept, flatten, unflatten
from jaxprune.structure.connectivity import Connect
from jaxprune.structure.cost import COSTS
from jaxprune.types import GLOBAL, Counts, Masks, Scores

#: What a density or compression counts: all that is kept, the weights on a path; parameters or
#: operations of the network without the groups that are gone.
TARGETS = ('direct', 'effective', *COSTS)

#: Nominal densities tabulated for a layerwise allocation, evenly on a logarithmic scale, and the
#: steps between two of them, where counts are interpolated. The curve between two rows is straight
#: to less than 1e-4 of a layer's count.
_ROWS, _BETWEEN = 1024, 8192


class Chain(NamedTuple):
    """Nested keep counts, from the sparsest mask to the fullest.

    Attributes:
      length: number of masks in the chain.
      least: nominal density of the sparsest.
      counts: `position -> counts`, position a traced integer in [0, length); no count ever falls
        as the position rises.
    """

    length: int
    least: float
    counts: Callable[[jax.Array], Counts]


def chain(
    shapes: Mapping[str, Shape],
    allocation: str = 'global',
    *,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
) -> Chain:
    """The chain of an allocation.

    Args:
      shapes: path -> shape of every prunable leaf, in forward order.
      allocation: 'global' or 'lamp' (all numbers of weights), or a layerwise allocation.
      floor: see `keep_counts`.
      cap: see `keep_counts`.
    """
    fewest, most = bounds(shapes, floor, cap)
    size = sum(math.prod(shape) for shape in shapes.values())
    if allocation in SHARED:
        low, high = max(sum(fewest.values()), 1), sum(most.values())
        return Chain(high - low + 1, low / size, lambda at: {GLOBAL: low + at})

    def row(density: float) -> dict[str, int] | None:
        try:
            return keep_counts(shapes, density, allocation, floor=floor, cap=cap)
        except PruneError:  # too few weights for this rule
            return None

    grid = np.minimum(np.geomspace(1 / size, 1, _ROWS), 1.0).tolist()
    found = {density: counts for density in grid if (counts := row(density)) is not None}
    rows = list(found.values())
    if not rows:
        raise PruneError(f"allocation '{allocation}' allows no density of this network")
    # Rounding may take one weight from a layer where the allocation gives it more.
    table = {
        path: np.maximum.accumulate(np.array([r[path] for r in rows], np.int32)) for path in rows[0]
    }

    def counts(at: jax.Array) -> Counts:
        place = jnp.minimum(at // _BETWEEN, len(rows) - 2) if len(rows) > 1 else 0
        part = (at - place * _BETWEEN) / _BETWEEN

        def between(column):
            column = jnp.asarray(column)
            low, high = column[place], column[jnp.minimum(place + 1, len(rows) - 1)]
            return low + jnp.floor((high - low) * part).astype(jnp.int32)

        return {path: between(column) for path, column in table.items()}

    return Chain((len(rows) - 1) * _BETWEEN + 1, next(iter(found)), counts)


def rounds_before(
    shapes: Mapping[str, Shape],
    density: float,
    *,
    allocation: str = 'global',
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    **schedule: Any,
) -> Plan:
    """The rounds of a pruner with an effective target: those of the same direct density.

    Some allocations cannot be that sparse; the active weights of a denser mask may still be as few.
    Then the rounds end at the sparsest mask the allocation allows. Arguments: see `plan_rounds`.
    """
    shared = {'allocation': allocation, 'floor': floor, 'cap': cap}
    try:
        return plan_rounds(shapes, density, **shared, **schedule)
    except PruneError:
        least = chain(shapes, **shared).least
        if density >= least:
            raise
        return plan_rounds(shapes, least, **shared, **schedule)


class Ranking(NamedTuple):
    """An order of all weights, best first.

    Attributes:
      last: path -> int32, the last round in which a weight was scored; later = better.
      scores: path -> its score in that round, high = better; NaN and -inf are never kept.
    """

    last: dict[str, jax.Array]
    scores: Scores


def _places(last: jax.Array, scores: jax.Array) -> jax.Array:
    """Each entry's place in the order, 0 for the best; equal ones in order of their index."""
    worst = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    worst = jnp.where(worst == 0, 0.0, worst)  # -0 equals +0
    index = jnp.arange(scores.size, dtype=jnp.int32)
    order = jax.lax.sort((-last, -worst, index), num_keys=2, is_stable=True)[2]
    return jnp.zeros(scores.size, jnp.int32).at[order].set(index, unique_indices=True)


def prune_to_active(
    connect: Connect, ranking: Ranking, masks: Chain, active: ArrayLike
) -> tuple[Masks, jax.Array]:
    """The sparsest mask of a chain with at least a number of active weights.

    Args:
      connect: see `connectivity`.
      ranking: the order of the weights, best first.
      masks: the chain, see `chain`.
      active: how many weights must lie on a path, int32, may be traced. If not even the fullest
        mask has so many, that one is returned.

    Returns:
      The masks (not the effective ones: kept weights may be inactive), and how many of their
      weights are active.
    """
    whole = GLOBAL in jax.eval_shape(masks.counts, jax.ShapeDtypeStruct((), jnp.int32))
    if whole:
        flat = _places(flatten(ranking.last), flatten(ranking.scores))
        places = unflatten(flat, ranking.scores)
    else:
        places = {
            path: _places(ranking.last[path].reshape(-1), leaf.reshape(-1)).reshape(leaf.shape)
            for path, leaf in ranking.scores.items()
        }

    def at(position: jax.Array) -> Masks:
        counts = masks.counts(position)
        return {
            path: (place < (counts[GLOBAL] if whole else counts[path]))
            & (ranking.scores[path] > -jnp.inf)
            for path, place in places.items()
        }

    def count(position: jax.Array) -> jax.Array:
        return sum(count_kept(connect(at(position))).values())

    def halve(_, bracket):
        low, high = bracket  # too few active weights at `low`; enough at `high`, as far as known
        middle = low + (high - low) // 2
        enough = count(middle) >= active
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    zero = jnp.asarray(active, jnp.int32) * 0  # from data: inside `shard_map` a constant differs
    start = zero - 1, zero + (masks.length - 1)
    _, best = jax.lax.fori_loop(0, masks.length.bit_length(), halve, start)
    return at(best), count(best)


def active_wanted(size: int, compression: float) -> int:
    """Fewest active weights whose effective compression does not pass a target.

    The tolerance keeps a target that is met exactly from asking for one more.
    """
    return max(math.ceil(size / compression - 1e-6), 1)


def effective_top_k(
    connect: Connect,
    scores: Scores,
    compression: float | None = None,
    *,
    density: float | None = None,
    allocation: str = 'global',
    shapes: Mapping[str, Shape] | None = None,
) -> Masks:
    """Masks of an effective compression, from one set of scores.

    Random scores prune at random: drawn once, all masks of the chain use the same draw.

    Args:
      connect: see `connectivity`.
      scores: path -> scores, high = keep.
      compression: target, weights before / active weights; not passed.
      density: 1 / compression, in place of it.
      allocation: 'global' or a layerwise allocation.
      shapes: path -> shape in forward order, for allocations that depend on the order.
    """
    shapes = {path: leaf.shape for path, leaf in scores.items()} if shapes is None else shapes
    size = sum(leaf.size for leaf in scores.values())
    wanted = active_wanted(size, 1 / density_of(density, compression))
    never = {path: jnp.zeros(leaf.shape, jnp.int32) for path, leaf in scores.items()}
    ranking = Ranking(never, scores)
    return prune_to_active(connect, ranking, chain(shapes, allocation), wanted)[0]
