"""One number for each coupled group from a number for each of its weights: every choice explicit.

Local numbers of slices, added up over the members of a group, then normalised over the groups of a
layer: the family of DepGraph (Fang et al., 2023, arXiv:2301.12900), see `group_importance`. Filter
norms (Li et al., 2017, arXiv:1608.08710), the scale of batch norm (Liu et al., 2017,
arXiv:1708.06519), FPGM (He et al., 2019, arXiv:1811.00250) and LAMP on groups are points of it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arguments import expression, flag
from jaxprune.errors import PruneError, check_choice, nearest, quoted
from jaxprune.score.derivatives import derivatives
from jaxprune.score.derivatives import parameters as every_parameter
from jaxprune.score.group_importance import (
    GROUP_MEASURES,
    NORMALISATIONS,
    REDUCTIONS,
    GroupMember,
    group_values,
    local_scores,
    reduced,
)
from jaxprune.score.loss import mean_loss, mean_over_batches
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Groups, Key, Problem, ScoreFn, Scores, View, Weights

#: Values of second order: the product of a weight with the Hessian times the gradient.
_CURVED = {'grasp': 'sum', 'gradient_norm_preservation': 'absolute'}
#: What a weight counts for.
COUPLED_MEASURES = (*GROUP_MEASURES, 'fpgm', 'fisher', *_CURVED)
#: Which slices count: those that make the group and follow it, or those that read it as well.
MEMBERS = ('out', 'all')
#: How the numbers of a group's slices become one.
AGGREGATIONS = (*REDUCTIONS, 'per_parameter')


class _Members(NamedTuple):
    """The part of a family that counts."""

    size: int
    members: tuple[GroupMember, ...]


def coupled_score(
    problem: Problem,
    *,
    by: Groups,
    measure: str = 'square',
    parameters: str = 'kernels',
    members: str = 'all',
    reduce: str = 'mean',
    root: bool = False,
    normalise: str = 'mean',
    train: bool = False,
) -> ScoreFn:
    """Scores coupled groups, high = keep. The defaults are those of Torch-Pruning.

    Args:
      by: the groups that compete; they must be coupled groups.
      measure: of a weight `w` with gradient `g` of the mean loss: one of `GROUP_MEASURES`
        ('magnitude' |w|, 'square' w², 'taylor' |w g|, 'taylor_sum' |Σ w g|, 'hessian' w² g²,
        'distance'); 'fpgm', the sum of distances to the other slices of the layer; 'fisher',
        w² F / 2 with F the mean of single examples' squared gradients; 'grasp', w Hg, signed;
        'gradient_norm_preservation', |Σ w Hg|.
      parameters: which of them count: 'kernels', those that masks may touch; or a regular
        expression that paths match anywhere: 'scale$' for the scales of flax's norms, '' for all.
      members: 'out', the slices that make a group and those that follow it, as a bias does; 'all',
        the slices that read it as well.
      reduce: the sum, mean, maximum or product over the members' local numbers, that of the first
        member, or 'per_parameter', the sum over the number of parameters.
      root: take the square root after that: with 'square' and 'sum', the L2 norm.
      normalise: over the groups of a layer, see `group_importance`; 'none' compares layers as they
        are.
      train: batch statistics, or running ones.

    Raises:
      PruneError: another choice; Fisher's with batch statistics; when called, a layer without a
        parameter that counts.
    """
    check_choice('measure', measure, COUPLED_MEASURES)
    check_choice('members', members, MEMBERS)
    check_choice('reduce', reduce, AGGREGATIONS)
    check_choice('normalise', normalise, NORMALISATIONS)
    if flag('root', root) and measure == 'grasp':
        raise PruneError("root: the values of 'grasp' have both signs")
    if not isinstance(by, Groups) or not by.families:
        raise PruneError("this scores coupled groups: by=jp.competing('unit', shapes, read)")
    if measure == 'fisher' and train:
        raise PruneError('fisher takes the gradients of single examples: train=False')
    slices = 'distance' if measure == 'fpgm' else _CURVED.get(measure, 'sum')
    if measure in GROUP_MEASURES:
        slices = GROUP_MEASURES[measure].slices

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        weights = _counting(view, parameters)
        values = _values(problem, key, view, batches, weights, measure, train)
        made = {}
        for layer, family in by.families.items():
            part = _part(family, members, values, layer, parameters)
            scores = _reduced(values, part, slices, reduce)
            scores = jnp.sqrt(scores) if root else scores
            made[layer] = reduced(scores[None], reduce='first', normalise=normalise)
        return made

    return score


def _reduced(
    values: Mapping[str, jax.Array], family: _Members, slices: str, reduce: str
) -> jax.Array:
    """One number for each group of a family."""
    local = local_scores(values, family, slices)
    if reduce != 'per_parameter':
        return reduced(local, reduce=reduce, normalise='none')
    ones = {m.path: jnp.ones_like(values[m.path]) for m in family.members}
    return local.sum(0) / local_scores(ones, family).sum(0)


def _part(
    family: object, members: str, values: Mapping[str, jax.Array], layer: str, parameters: str
) -> _Members:
    """The members of a family that count."""
    roles = ('out', 'along') if members == 'out' else ('out', 'along', 'in')
    part = tuple(m for m in family.members if m.role in roles and m.path in values)
    if not part:
        raise PruneError(
            f'parameters: no {members!r} parameter of layer {quoted(layer)} is among '
            f'{quoted(parameters)}; choose others, or keep that layer whole (prunable=)'
        )
    return _Members(family.size, part)


def _counting(view: View, parameters: str) -> Weights:
    """The parameters that count, masked."""
    if parameters == 'kernels':
        return view.weights
    leaves = every_parameter(view)
    search = expression('parameters', parameters)
    found = {path: leaf for path, leaf in leaves.items() if search(path)}
    if not found:
        raise PruneError(
            f'parameters: {quoted(parameters)} matches no parameter, {nearest(parameters, leaves)}'
        )
    return found


def _values(
    problem: Problem,
    key: Key,
    view: View,
    batches: Batches | None,
    weights: Weights,
    measure: str,
    train: bool,
) -> Weights:
    """The value of every parameter that counts."""
    if measure == 'fpgm':
        return weights
    if measure == 'fisher':
        squares = _mean_squares(problem, key, view, batches, weights)
        return {path: squares[path] * w**2 / 2 for path, w in weights.items()}
    if measure not in _CURVED and not GROUP_MEASURES[measure].gradient:
        return group_values(measure, weights)
    at = derivatives(problem, key, view, batches, train=train)
    if measure in _CURVED:
        bent = at.product(at.gradient)
        return {path: w * bent[path] for path, w in weights.items()}
    return group_values(measure, weights, at.gradient)


def _mean_squares(
    problem: Problem, key: Key, view: View, batches: Batches | None, weights: Weights
) -> Weights:
    """The mean over examples of the squared gradients of their own losses."""
    loss = mean_loss(problem, view, key, train=False)
    whole = put(view.params, view.weights)
    gradient = jax.grad(lambda own, batch: loss(put(whole, own), batch))

    def squares(batch: Batch) -> Weights:
        singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
        each = jax.vmap(gradient, (None, 0))(weights, singles)
        return {path: (g**2).mean(0) for path, g in each.items()}

    return mean_over_batches(squares, batches)
