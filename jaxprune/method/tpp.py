"""TPP: trainability-preserving pruning (Wang & Fu, ICLR 2023, arXiv:2207.12534).

Filters to be pruned are chosen first. Then training goes on with a growing penalty: it decorrelates
them from the filters that stay, and pulls them to zero. At the end they are removed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import least, positive
from jaxprune.flow.orthogonal import tpp_gradients, tpp_strength
from jaxprune.method.any_groups import mean_sizes
from jaxprune.method.lasting import Asked, kept_groups
from jaxprune.method.pruner import among, tallied
from jaxprune.select import count_kept
from jaxprune.types import (
    Batches,
    Counts,
    Hyper,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    StepHook,
    View,
)


class Chosen(NamedTuple):
    """What TPP carries from its first round to its last.

    Attributes:
      kept: layer -> bool `(groups,)`, what its last round keeps.
      steps: training steps since the first round, int32.
      round: rounds so far, int32.
    """

    kept: Masks
    steps: jax.Array
    round: jax.Array


def tpp(
    asked: Asked,
    *,
    weight: ArrayLike = 1000.0,
    interval: int = 10,
    increment: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1.0,
) -> Pruner:
    """Chooses units by the mean of |w| in its first round, removes them in its last.

    In between the gradient of the loss gets `flow.tpp_gradients` at `λ = flow.tpp_strength(t)`, t
    the steps since the first round. What belongs to a unit is what the coupled groups say: its
    filter, its bias, scale and bias of its norm.

    The authors zero one layer every 100 iterations at the end; here all go in the last round.

    Args:
      asked: what is pruned: whole units, or other coupled groups.
      weight: of the decorrelation against the pull to zero.
      interval: steps after which the penalty grows.
      increment: by how much.
      ceiling: how far.

    Raises:
      PruneError: an interval below 1, another number that is not above 0.
    """
    groups = asked.groups
    least(1, interval=interval)
    for name, value in (('weight', weight), ('increment', increment), ('ceiling', ceiling)):
        positive(f'{name} of tpp', value)

    def init(key: Key, view: View) -> Chosen:
        del key, view
        zero = jnp.zeros((), jnp.int32)
        return Chosen({n: jnp.ones(shape, bool) for n, shape in groups.shapes.items()}, zero, zero)

    def update(
        key: Key, state: Chosen, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Chosen, Masks, PruneInfo]:
        del key, batches
        scores = mean_sizes(groups, view.weights)
        alive, first = groups.alive(view.masks), state.round == 0
        ranked = among(scores, alive)
        found = kept_groups(asked, ranked, counts)
        kept = {name: jnp.where(first, found[name], m) for name, m in state.kept.items()}
        whole = groups.spread(kept)
        in_force = {path: m & (whole[path] | first) for path, m in view.masks.items()}
        nonfinite, nonzero = tallied(scores, alive)
        state = Chosen(kept, state.steps, state.round + 1)
        return state, in_force, PruneInfo(count_kept(kept), nonfinite, nonzero)

    def gradient(
        state: Chosen,
        grads: PyTree,
        params: PyTree,
        masks: Masks,
        clock: ArrayLike,
        hyper: Hyper,
    ) -> tuple[Chosen, PyTree]:
        del masks, clock, hyper
        strength = tpp_strength(state.steps, every=interval, increment=increment, ceiling=ceiling)
        leaves = dict(tree.paths(params))
        last, pruned = {}, {}
        for path, own in groups.own.items():
            last[path] = jnp.moveaxis(leaves[path], own.axis, -1)
            pruned[path] = ~jnp.append(state.kept[own.name], True)[own.group]
        makers = [path for path, own in groups.own.items() if own.makes or leaves[path].ndim == 1]
        added = tpp_gradients(
            {path: last[path] for path in makers},
            {path: pruned[path] for path in makers},
            strength,
            weight=weight,
        )
        added |= {  # what follows units as a depthwise kernel does is only pulled to zero
            path: strength * jnp.where(pruned[path], leaf, 0)
            for path, leaf in last.items()
            if path not in added
        }
        loss = dict(tree.paths(grads))
        grads = tree.put(
            grads,
            {p: loss[p] + jnp.moveaxis(push, -1, groups.own[p].axis) for p, push in added.items()},
        )
        return state._replace(steps=state.steps + 1), grads

    return Pruner(init, update, frozenset(), hook=StepHook(gradient=gradient))
