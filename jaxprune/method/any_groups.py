"""What methods do with groups of any kind: weights, patterns, blocks, kernels, coupled groups."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.method.own_slices import PerGroup, vectors
from jaxprune.types import Groups, PyTree, Scores, Weights


def check_free(groups: Groups, name: str) -> None:
    """Raises PruneError unless any set of the groups may be kept: weights, kernels or blocks."""
    if groups.own or groups.eligible is not None:
        what = f"'{name}' prunes weights, kernels or blocks"
        raise PruneError(f'granularity: {what}, not {groups.kind}')


def mean_sizes(groups: Groups, weights: Weights) -> Scores:
    """The mean of |w| over each group; of coupled ones over the kernels that make it."""
    sums = groups.gather({path: jnp.abs(w) for path, w in weights.items()})
    counted = groups.gather({path: jnp.ones_like(w) for path, w in weights.items()})
    return {name: total / counted[name] for name, total in sums.items()}


def pulled(groups: Groups) -> Callable[[PyTree, PerGroup, PyTree], PyTree]:
    """`(gradients, strengths, params) -> gradients` with strength times weight added, by group.

    Of coupled groups to all that makes and follows them; of other kinds to prunable weights.
    """
    if groups.own:
        return vectors(groups, silent=False).plus

    def plus(grads: PyTree, strengths: PerGroup, params: PyTree) -> PyTree:
        loss, known = dict(tree.paths(grads)), dict(tree.paths(params))
        each = groups.spread(strengths)
        return tree.put(grads, {path: loss[path] + s * known[path] for path, s in each.items()})

    return plus
