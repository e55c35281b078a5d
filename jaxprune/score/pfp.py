"""PFP: the units whose readers listen to them, in numbers that follow from one error bound.

Liebenwein, Baykal, Lang, Feldman & Rus, "Provable filter pruning for efficient neural networks",
ICLR 2020, arXiv:1911.07412.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError, quoted
from jaxprune.score.edges import Edges, check_seen, edge_sensitivities, sensed
from jaxprune.score.products import Product, largest
from jaxprune.score.sample_sizes import CONSTANT, FAILURE, drawn, log_term, quotient
from jaxprune.score.sipp import evaluation_only
from jaxprune.types import Batches, Groups, Key, Problem, ScoreFn, Scores, View

#: Draws beyond that count as endless.
_MOST_DRAWS = 2**30
#: Entries of the table of channels x ranks that is looked at together.
_TABLE = 2**22


def pfp(
    problem: Problem,
    *,
    train: bool = False,
    failure: ArrayLike = FAILURE,
    by: str | Groups = 'weight',
) -> ScoreFn:
    """The error bound at which a channel is still kept: one ranking shares out all layers.

    A layer that reads channels of sensitivity `s_j` (the largest of its weights over outputs, taps,
    positions and examples) needs `m = ceil(3 (6 + 2 epsilon) S / epsilon**2)` draws for a relative
    error epsilon, `S = 2 C log(8 (positions + 1) taps / failure) sum s`. Draws with `p = s / sum s`
    are expected to find `k(m) = ceil(sum 1 - (1 - p_j)**m)` different channels, and deterministic
    PFP keeps the k best. So a channel of rank r stays up to the epsilon whose m is the fewest draws
    with k(m) >= r. Its score is `S / (m - 1)`, which rises with this epsilon: to keep the n best of
    all layers together is to follow the published search for epsilon, and C plays no part. The best
    channel of a layer outranks all that are not the best of theirs, as the authors keep one at
    least. A channel without sensitivity scores 0.

    With `by` as what competes (granularity = 'unit'), scores are those of units: the largest score
    of the slices that read it. A unit goes when none of its readers would keep it. Where several
    rows of a kernel read one unit, as behind a flattened map, they count as taps.

    Without, every weight has the score of the input channel that it reads. A row behind a flattened
    map is a channel of its own, as published. With target = 'effective' the density is then that of
    the weights that are left when filters go that nothing reads: the published budget.

    Args:
      problem: the network.
      train: must be False: single examples have no batch statistics.
      failure: the probability with which a bound may be broken.
      by: 'weight', or what competes.

    Raises:
      PruneError: train mode; groups of another kind, or units that no kernel reads; when called,
        no batches, or a kernel that is seen in no product.
    """
    evaluation_only('pfp', train)
    readers = _readers(by) if isinstance(by, Groups) else {}

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        if isinstance(by, Groups):
            paths = {path for path, _ in readers}
            found = edge_sensitivities(problem, view, batches, paths=paths)
            return _of_groups(found, readers, failure)
        found = sensed(problem, view, batches, 'max')
        scores = largest(_of_weights(*each, failure) for each in found)
        check_seen(view.weights, scores)
        return {path: scores[path] for path in view.weights}

    return jax.jit(score)  # of many small operations, also where nobody else compiles


def channel_scores(sensitivity: jax.Array, scale: ArrayLike) -> jax.Array:
    """`S / (m - 1)` of each channel of a layer, see `pfp`; pure.

    Args:
      sensitivity: `(channels,)`, at least 0.
      scale: S over the sum of the sensitivities.

    Returns:
      `(channels,)`; for the best channel, which one draw finds, a number above all others'.
    """
    total = sensitivity.sum()
    p = quotient(sensitivity, total)
    channels = sensitivity.shape[0]
    ranks = jnp.arange(1, channels + 1, dtype=jnp.int32)
    # Of equal channels the first is the better one.
    order = jnp.argsort(sensitivity, descending=True, stable=True)
    draws = jnp.zeros(channels, jnp.int32).at[order].set(_fewest_draws(p, ranks))
    before = jnp.maximum((draws - 1).astype(p.dtype), 1e-20)
    found = jnp.where(draws < _MOST_DRAWS, scale * total / before, 0)
    return jnp.where(sensitivity == 0, 0, found)


def _fewest_draws(p: jax.Array, ranks: jax.Array) -> jax.Array:
    """For each rank r the fewest draws with `ceil(sum 1 - (1 - p)**m) >= r`, int32."""
    missed = jnp.log1p(-jnp.minimum(p, 1))  # -inf where a draw is certain

    def fewest(rank: jax.Array) -> jax.Array:
        def halve(_, bounds):
            low, high = bounds
            middle = low + jnp.maximum((high - low) // 2, 1)
            found = -jnp.expm1(middle.astype(p.dtype) * missed).sum()
            # That they find more than r - 1 is what rounding up to r takes.
            enough = ~(found <= (rank - 1).astype(p.dtype))  # True for a NaN
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        # Fewer draws than r never find r, whatever a rounded sum says. Both ends are made from the
        # argument: inside `shard_map` a constant carry has another type.
        bounds = rank - 1, _MOST_DRAWS + 0 * rank
        return jax.lax.fori_loop(0, 31, halve, bounds)[1]

    return jax.lax.map(fewest, ranks, batch_size=max(_TABLE // max(p.size, 1), 1))


def _of_weights(product: Product, values: jax.Array, failure: ArrayLike) -> Scores:
    """The score of every weight of a kernel, that of the channel which it reads."""
    channels = values.max((2, 3))
    scale = _scale(product.positions, product.kernel.shape[2], failure)
    scores = channel_scores(channels.ravel(), scale).reshape(*channels.shape, 1, 1)
    return product.leaves(jnp.broadcast_to(scores, values.shape))


def _scale(positions: int, taps: int, failure: ArrayLike) -> jax.Array:
    """S over the sum of the sensitivities; see `pfp`."""
    return 2 * CONSTANT * log_term(positions, taps, failure)


class _Part(NamedTuple):
    """The rows of a kernel that read the units of a layer.

    Attributes:
      name: of the layer.
      rows: for each unit.
    """

    name: str
    rows: tuple[np.ndarray, ...]


#: Path and axis of every kernel that reads units -> what it reads.
_Readers = dict[tuple[str, int], list[_Part]]


def _readers(groups: Groups) -> _Readers:
    """What reads the units that compete.

    Raises:
      PruneError: nothing reads those of a layer.
    """
    made: _Readers = {}
    for name in groups.shapes:
        family = groups.families.get(name)
        readers = [m for m in family.members if m.role == 'in'] if family else []
        if not readers:
            raise PruneError(
                f'pfp goes by what reads a unit; no kernel reads those of {quoted(name)} '
                f"(granularity '{groups.kind}')"
            )
        for m in readers:
            made.setdefault((m.path, m.axis), []).append(_Part(name, m.indices))
    return made


def _of_groups(found: Mapping[str, Edges], readers: _Readers, failure: ArrayLike) -> Scores:
    """The score of every unit, the largest of those that read it."""
    each = (_read(found[path], axis, parts, failure) for (path, axis), parts in readers.items())
    return largest(each)


def _read(edges: Edges, axis: int, parts: Sequence[_Part], failure: ArrayLike) -> Scores:
    """Layer -> the scores that a kernel gives to its units, by its rows along an axis."""
    count = edges.values.shape[axis]
    rows = edges.values.max(tuple(i for i in range(edges.values.ndim) if i != axis))
    channels = _channels(parts, count)
    longest = max(map(len, channels))
    # A table with as many rows for each channel: shorter ones repeat their first.
    table = np.array([at + at[:1] * (longest - len(at)) for at in channels])
    taps = edges.channels * edges.taps * longest // count
    scores = channel_scores(rows[table].max(1), _scale(edges.positions, taps, failure))
    of_rows = jnp.zeros_like(rows).at[table].set(scores[:, None])
    return largest({part.name: of_rows[np.stack(part.rows)].max(1)} for part in parts)


def _channels(parts: Sequence[_Part], count: int) -> list[list[int]]:
    """The rows of each channel: all that belong to the same units, or one that belongs to none.

    Channels are in the order of their first rows: of equally good ones the first is kept.
    """
    units: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for number, part in enumerate(parts):
        for unit, rows in enumerate(part.rows):
            for row in rows:
                units[row].append((number, unit))
    made: dict[tuple, list[int]] = {}
    for row, own in enumerate(units):
        made.setdefault(tuple(own) or (row,), []).append(row)
    return list(made.values())


# --- drawn at random ------------------------------------------------------------------------------


def pfp_sample(
    key: Key, kernel: jax.Array, sensitivity: jax.Array, draws: ArrayLike, *, axis: int = -2
) -> tuple[jax.Array, jax.Array]:
    """A kernel that reads fewer channels and whose mean is the kernel: random PFP; pure.

    Channels are drawn with replacement with probabilities p in proportion to their sensitivities.
    The slice of a channel drawn c times of m is multiplied by `c / (m p)`.

    Args:
      key: the draw.
      kernel: any shape.
      sensitivity: `(channels,)`, at least 0.
      draws: a whole number, may be traced; `sample_complexity` has the bound, `draws_for` how many
        lead to how many channels.
      axis: of the kernel's input channels.

    Returns:
      The kernel, and bool `(channels,)`: was the channel drawn?

    Raises:
      PruneError: not one sensitivity for each channel.
    """
    if jnp.shape(sensitivity) != (kernel.shape[axis],):
        raise PruneError(
            f'the kernel reads {kernel.shape[axis]} channels, their sensitivities have shape '
            f'{jnp.shape(sensitivity)}'
        )
    counts, scale = drawn(key, quotient(sensitivity, sensitivity.sum()), draws)
    shape = [-1 if i == axis % kernel.ndim else 1 for i in range(kernel.ndim)]
    return kernel * scale.reshape(shape).astype(kernel.dtype), counts > 0
