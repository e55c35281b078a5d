"""One score for each coupled group, from values of its weights: local scores, then their sum.

What is removed together is judged together. A slice of a member gets a local score, the local
scores of a group are reduced to one, and the scores of alike groups are normalised, so that groups
of different layers can be ranked together. The family is that of DepGraph (Fang et al., 2023,
arXiv:2301.12900) and its library Torch-Pruning; `docs/groups.md` lists where it is not followed.

Groups come as plain data: a family has a `size` and `members` with `path`, `axis` and `indices`,
as those of `jp.groups` do. What is scored is chosen by what values there are: with kernels only,
biases and norms do not count. The functions are pure; `jit` and `vmap` them with the family closed
over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arguments import positive, real
from jaxprune.errors import PruneError, check_choice, quoted, shown
from jaxprune.types import Weights


class GroupMember(Protocol):
    """A slice that goes with each group: for group n, `indices[n]` along an axis."""

    path: str
    axis: int
    indices: Sequence[np.ndarray]


class GroupFamily(Protocol):
    """Groups that are alike; `members` in an order whose first one 'first' takes."""

    size: int
    members: Iterable[GroupMember]


class Measure(NamedTuple):
    """A local score.

    Attributes:
      value: `(weight, gradient) -> value` of every weight.
      slices: what the values of a slice become, one of `SLICES`.
      gradient: does it take gradients?
      doc: in a few words.
    """

    value: Callable[[jax.Array, Any], jax.Array]
    slices: str = 'sum'
    gradient: bool = False
    doc: str = ''


#: The local scores. The scale of a norm is one value for each unit: 'magnitude' of scales alone is
#: that of network slimming (Liu et al., 2017, arXiv:1708.06519).
GROUP_MEASURES: dict[str, Measure] = {
    'magnitude': Measure(lambda w, g: jnp.abs(w), doc='sum of |w|'),
    'square': Measure(lambda w, g: w * w, doc='sum of w²: the squared norm, without a root'),
    'taylor': Measure(lambda w, g: jnp.abs(w * g), gradient=True, doc='sum of |w g|'),
    'taylor_sum': Measure(
        lambda w, g: w * g, 'absolute', True, 'size of the sum of w g: the change of the loss'
    ),
    'hessian': Measure(
        lambda w, g: (w * g) ** 2, gradient=True, doc='sum of w² g², with g² for the curvature'
    ),
    'distance': Measure(
        lambda w, g: w * w, 'distance', doc='distances to all other slices, of squared entries'
    ),
}
SLICES = ('sum', 'absolute', 'distance')
REDUCTIONS = ('sum', 'mean', 'max', 'prod', 'first')
NORMALISATIONS = ('none', 'mean', 'sum', 'max', 'min_max', 'gaussian', 'sentinel', 'lamp')
#: Keeps quotients finite, as in Torch-Pruning.
_TINY = 1e-8


def group_values(
    measure: str, weights: Mapping[str, jax.Array], gradients: Mapping[str, jax.Array] | None = None
) -> Weights:
    """The value of every weight, for `group_importance`.

    Args:
      measure: one of `GROUP_MEASURES`.
      weights: path -> array of what is to be scored: kernels, or scales and biases as well.
      gradients: path -> array of the loss's gradient, where the measure takes one. The Hessian's
        diagonal is that of one example's loss: take the mean of the values over examples.

    Raises:
      PruneError: another measure; a gradient that is missing.
    """
    check_choice('measure', measure, GROUP_MEASURES)
    value, _, needs, _ = GROUP_MEASURES[measure]
    if needs and (missing := sorted(set(weights) - set(gradients or ()))):
        raise PruneError(f'{measure} takes gradients, also of {quoted(missing[0])}')
    return {path: value(w, gradients[path] if needs else None) for path, w in weights.items()}


def group_importance(
    values: Mapping[str, jax.Array],
    family: GroupFamily,
    *,
    slices: str = 'sum',
    reduce: str = 'mean',
    normalise: str = 'mean',
    fraction: float = 0.5,
) -> jax.Array:
    """One score for each group of a family, high = keep.

        values = group_values('taylor', weights, gradients)
        scores = group_importance(values, family)

    Args:
      values: path -> one value for every weight. Members without values do not count.
      family: groups that are alike; see `GroupFamily`.
      slices: the local score of a slice, at each index along its axis: 'sum' of its values, their
        sum's size ('absolute'), or the sum of its distances to the slices of all groups
        ('distance'; FPGM, He et al., 2019, arXiv:1811.00250). `GROUP_MEASURES` has that of each
        measure. Where several indices go with a group, as behind a flattened map, their local
        scores are added.
      reduce: of the members' local scores, 'sum', 'mean', 'max', 'prod', or that of the 'first'
        member with values.
      normalise: over the groups of the family. 'mean', 'sum' and 'max' divide by that; 'min_max'
        maps the lowest score to 0 and the highest to 1; 'gaussian' subtracts the mean and divides
        by the standard deviation; 'sentinel' divides by the score of rank `fraction`; 'lamp'
        divides by the sum of all that are not smaller (Lee et al., 2021, arXiv:2010.07611).
      fraction: of groups whose scores lie below the sentinel.

    Raises:
      PruneError: an unknown choice, a family of which nothing has values, values that do not fit.
    """
    local = local_scores(values, family, slices)
    return reduced(local, reduce=reduce, normalise=normalise, fraction=fraction)


def local_scores(
    values: Mapping[str, jax.Array], family: GroupFamily, slices: str = 'sum'
) -> jax.Array:
    """The local scores, `(members with values, groups)`; see `group_importance`."""
    check_choice('slices', slices, SLICES)
    members = [m for m in family.members if m.path in values]
    if not members:
        paths = ', '.join(sorted({m.path for m in family.members}))
        raise PruneError(f'no member of the family has values; its members: {paths}')
    return jnp.stack([_local(values[m.path], m, family.size, slices) for m in members])


def reduced(
    local: jax.Array, *, reduce: str = 'mean', normalise: str = 'mean', fraction: float = 0.5
) -> jax.Array:
    """One score for each group from `local_scores`; see `group_importance`."""
    check_choice('reduce', reduce, REDUCTIONS)
    check_choice('normalise', normalise, NORMALISATIONS)
    if not 0 <= real('fraction', fraction) < 1:
        raise PruneError(f'fraction must be at least 0 and below 1, not {shown(fraction)}')
    scores = local[0] if reduce == 'first' else getattr(jnp, reduce)(local, axis=0)
    return _normalised(scores, normalise, fraction)


def group_decay(
    weights: Mapping[str, jax.Array],
    families: Iterable[GroupFamily],
    *,
    rate: float = 1e-2,
    strongest: float = 16.0,
) -> Weights:
    """What group-norm regularisation adds to the gradient, so that weak groups shrink faster.

    A weight `w` gets `rate * w * strongest**((high - s) / (high - low))` from each group that it
    belongs to, where `s` is the root of the group's 'square', with the mean over members and over
    groups, and high and low are those of its family: the strongest group of a family decays at
    `rate`, the weakest at `rate * strongest`.

    Args:
      weights: path -> array; what has a path here is scored, and shrinks.
      families: see `group_importance`; a weight may belong to several.
      rate: of the decay.
      strongest: the factor of the weakest group.

    Returns:
      path -> increment of the gradient, for all weights; zero for those of no family.
    """
    positive('strongest', strongest)
    squares = group_values('square', weights)
    made = {path: jnp.zeros_like(w) for path, w in weights.items()}
    for family in families:
        score = jnp.sqrt(group_importance(squares, family))
        span = score.max() - score.min()
        weakness = (score.max() - score) / jnp.where(span > 0, span, 1)
        factors = rate * jnp.power(jnp.asarray(strongest, score.dtype), weakness)
        for member in family.members:
            if member.path in weights:
                leaf = weights[member.path]
                lines, groups = _lines(member, family.size, leaf)
                each = jnp.zeros(leaf.shape[member.axis], score.dtype)
                each = each.at[lines].add(factors[groups])
                shape = [-1 if i == member.axis else 1 for i in range(leaf.ndim)]
                made[member.path] += (leaf * each.reshape(shape)).astype(leaf.dtype)
    return made


def _lines(member: GroupMember, size: int, leaf: Any) -> tuple[np.ndarray, np.ndarray]:
    """The indices along a member's axis, group after group, and the group of each."""
    lines = np.concatenate([np.asarray(at, int).ravel() for at in member.indices])
    fits = len(member.indices) == size and member.axis < leaf.ndim
    if not fits or lines.min(initial=0) < 0 or lines.max(initial=0) >= leaf.shape[member.axis]:
        raise PruneError(
            f'the values of {quoted(member.path)} have shape {tuple(leaf.shape)}; '
            f'its {len(member.indices)} groups of {size} along axis {member.axis} do not fit'
        )
    return lines, np.repeat(np.arange(size), [np.size(at) for at in member.indices])


def _local(values: jax.Array, member: GroupMember, size: int, slices: str) -> jax.Array:
    """The local score of each group's slice of a member."""
    values = jnp.asarray(values)
    lines, groups = _lines(member, size, values)
    rows = jnp.moveaxis(values, member.axis, 0).reshape(values.shape[member.axis], -1)
    if slices == 'distance':
        scores = _distances(rows[lines])
    else:
        scores = rows.sum(1)[lines]
        scores = jnp.abs(scores) if slices == 'absolute' else scores
    if len(lines) == size and np.array_equal(groups, np.arange(size)):
        return scores
    return jax.ops.segment_sum(scores, groups, size, indices_are_sorted=True)


def _distances(rows: jax.Array) -> jax.Array:
    """For each row the sum of its distances to all others."""

    def of(row: jax.Array) -> jax.Array:
        return jnp.sqrt(((rows - row) ** 2).sum(1)).sum()

    return jax.lax.map(of, rows)  # all pairs of entries at once would fill memory


def _normalised(scores: jax.Array, how: str, fraction: float) -> jax.Array:
    if how == 'none':
        return scores
    if how in ('mean', 'sum', 'max'):
        return scores / getattr(jnp, how)(scores)
    if how == 'min_max':
        low, high = scores.min(), scores.max()
        return (scores - low) / (high - low + _TINY)
    if how == 'gaussian':
        return (scores - scores.mean()) / (scores.std(ddof=1) + _TINY)
    if how == 'sentinel':
        return scores / (jnp.sort(scores)[int(fraction * len(scores))] + _TINY)
    order = jnp.argsort(scores, descending=True, stable=True)
    larger = jnp.cumsum(scores[order])
    return jnp.zeros_like(scores).at[order].set(scores[order] / larger)
