"""TPP: trainability-preserving pruning (Wang & Fu, ICLR 2023, arXiv:2207.12534).

Filters to be pruned are chosen first. Then training goes on with a growing penalty: it decorrelates
them from the filters that stay, and pulls them to zero. At the end they are removed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import least, positive
from jaxprune.flow.orthogonal import tpp_gradients, tpp_strength
from jaxprune.method.unit_pruning import alike
from jaxprune.score.magnitude import magnitude
from jaxprune.select import count_kept
from jaxprune.types import (
    Batches,
    Counts,
    Hyper,
    Key,
    Masks,
    Problem,
    PruneInfo,
    Pruner,
    PyTree,
    SelectFn,
    StepHook,
    View,
)


class Chosen(NamedTuple):
    """What TPP carries from its first round to its last.

    Attributes:
      masks: those of its last round.
      pruned: path -> bool `(units,)` of everything that belongs to the units to be pruned.
      steps: training steps since the first round, int32.
      round: rounds so far, int32.
    """

    masks: Masks
    pruned: dict[str, jax.Array]
    steps: jax.Array
    round: jax.Array


def tpp(
    problem: Problem,
    units: Mapping[str, tuple[int, ...]],
    select: SelectFn,
    *,
    weight: ArrayLike = 1000.0,
    interval: int = 10,
    increment: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1.0,
) -> Pruner:
    """Chooses units by the mean of |w| in its first round, removes them in its last.

    In between the gradient of the loss gets `flow.tpp_gradients` at `λ = flow.tpp_strength(t)`, t
    the steps since the first round. What belongs to a unit: its filter, a bias in the same module,
    and scale and bias of the batch norm that is called like a convolution (`conv_3` and `bn_3`).

    The authors zero one layer every 100 iterations at the end; here all go in the last round.

    Args:
      problem: the network.
      units: path -> `(units,)` of the layers that are pruned.
      select: `(scores, counts of units) -> masks` of whole units and what reads them.
      weight: of the decorrelation against the pull to zero.
      interval: steps after which the penalty grows.
      increment: by how much.
      ceiling: how far.

    Raises:
      PruneError: an interval below 1, another number that is not above 0.
    """
    del problem
    least(1, interval=interval)
    for name, value in (('weight', weight), ('increment', increment), ('ceiling', ceiling)):
        positive(f'{name} of tpp', value)
    score = alike(magnitude())

    def init(key: Key, view: View) -> Chosen:
        del key
        zero = jnp.zeros((), jnp.int32)
        members = belonging(view.params, units)
        sizes = dict(tree.paths(view.params))
        pruned = {path: jnp.zeros(sizes[path].shape[-1], bool) for path in members}
        return Chosen(view.masks, pruned, zero, zero)

    def update(
        key: Key, state: Chosen, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Chosen, Masks, PruneInfo]:
        scores = score(key, view, batches)
        first = state.round == 0
        found = select(scores, counts)
        masks = {path: jnp.where(first, found[path], m) for path, m in state.masks.items()}
        gone = {path: ~masks[path].reshape(-1, masks[path].shape[-1]).any(0) for path in units}
        pruned = {path: gone[unit] for path, unit in belonging(view.params, units).items()}
        in_force = {path: m & (masks[path] | first) for path, m in view.masks.items()}
        values = [jnp.where(view.masks[path], leaf, 0) for path, leaf in scores.items()]
        nonfinite = sum((~jnp.isfinite(leaf)).sum(dtype=jnp.int32) for leaf in values)
        nonzero = sum((leaf != 0).sum(dtype=jnp.int32) for leaf in values)
        state = Chosen(masks, pruned, state.steps, state.round + 1)
        return state, in_force, PruneInfo(count_kept(in_force), nonfinite, nonzero)

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
        members = {path: leaves[path] for path in state.pruned}
        added = tpp_gradients(members, state.pruned, strength, weight=weight)
        loss = dict(tree.paths(grads))
        grads = tree.put(grads, {path: loss[path] + push for path, push in added.items()})
        return state._replace(steps=state.steps + 1), grads

    return Pruner(init, update, frozenset(), hook=StepHook(gradient=gradient))


def belonging(params: PyTree, units: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Path -> path of the kernel whose units it belongs to: kernels, biases, batch norms."""
    leaves = dict(tree.paths(params))
    found = {}
    for path, (count,) in units.items():
        module, _, kernel = path.rpartition('/')
        normed = module.replace('conv', 'bn')
        near = [path, f'{module}/bias'] if kernel == 'kernel' else [path]
        near += [f'{normed}/scale', f'{normed}/bias'] if normed != module else []
        for member in near:
            if member in leaves and (member == path or leaves[member].shape == (count,)):
                found[member] = path
    return found
