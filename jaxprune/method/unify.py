"""Micro-structured weight unification with ADMM (arXiv:2106.08301): blocks with one magnitude.

All weights of a unified block have the same size and keep their signs, so a block needs a number
and a bit for each weight. A block with size 0 is pruned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import positive
from jaxprune.errors import PruneError
from jaxprune.method.admm import Split, begun, drawn, split, strength_at
from jaxprune.method.chosen_anew import selected
from jaxprune.method.lasting import Asked
from jaxprune.method.pruner import tallied
from jaxprune.select import count_kept, global_top_k, layerwise_top_k
from jaxprune.types import (
    GLOBAL,
    Batches,
    Counts,
    Groups,
    Hyper,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    Scores,
    StepHook,
    View,
    Weights,
)


class Unified(NamedTuple):
    """What the method carries from its first round to its last.

    Attributes:
      split: see `admm.Split`; its `round` counts.
      tied: path -> bool, the weights that share a size with their block; none before the last round
        but one.
      signs: path -> their signs, int8.
    """

    split: Split
    tied: Masks
    signs: dict[str, jax.Array]


def unify(
    asked: Asked,
    *,
    unified: ArrayLike = 1.0,
    strength: ArrayLike = 1e-4,
    strength_end: ArrayLike = 0.1,
) -> Pruner:
    """Prunes blocks, and gives all weights of other blocks the same size.

    Of the blocks that the density keeps, those that unification changes least are unified: the sum
    of `(|w| - q)²` over a block, q its mean of |w|. ADMM draws weights there, see `admm`. The round
    before the last prunes and unifies for good; from then on a block trains as one number,
    `∂L/∂q = Σ sign(w) ∂L/∂w`. The last round ends that: let it be where training ends.

    Args:
      asked: what is pruned: blocks or kernels.
      unified: share of the kept blocks that are unified, in [0, 1].
      strength, strength_end: see `admm`.

    Raises:
      PruneError: fewer than three rounds, other groups, a strength that is not above 0.
    """
    groups, last = asked.groups, len(asked.events) - 1
    if groups.own or groups.eligible is not None or groups.kind == 'weight':
        raise PruneError(f"granularity: 'unify' needs blocks or kernels, not {groups.kind}")
    if last < 2:
        raise PruneError(f"rounds: 'unify' needs three or more, not {last + 1}")
    positive('strength of unify', strength)
    positive('strength_end of unify', strength_end)

    def init(key: Key, view: View) -> Unified:
        none = {path: jnp.zeros_like(mask) for path, mask in view.masks.items()}
        signs = {path: jnp.zeros(w.shape, jnp.int8) for path, w in view.weights.items()}
        return Unified(begun(key, view), none, signs)

    def update(
        key: Key, state: Unified, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Unified, Masks, PruneInfo]:
        del key, batches
        alive, number = groups.alive(view.masks), state.split.round
        rho = strength_at(asked._replace(events=asked.events[:-1]), number, strength, strength_end)

        now, before = number == last - 1, number < last - 1

        def project(point: Weights) -> tuple[Weights, tuple[Masks, Masks]]:
            blocks = chosen(asked, point, alive, counts, unified)
            return nearest_unified(groups, point, *blocks), blocks

        moved, (kept, tied) = split(state.split, view.weights, rho, project, ~before)
        prunes = sum(count_kept(kept).values()) < sum(count_kept(alive).values())
        moved = moved._replace(prunes=(prunes | (jnp.asarray(unified) > 0)) & before)
        whole, shared = groups.spread(kept), groups.spread(tied)
        masks = {path: m & (whole[path] | ~now) for path, m in view.masks.items()}
        state = Unified(
            moved,
            {p: jnp.where(now, shared[p], m & ~before) for p, m in state.tied.items()},
            {
                p: jnp.where(now, jnp.sign(view.weights[p]).astype(jnp.int8), s)
                for p, s in state.signs.items()
            },
        )
        after = {n: jnp.where(before | now, kept[n], alive[n]) for n in kept}
        return state, masks, PruneInfo(count_kept(after), *tallied(_squares(groups, view), alive))

    def gradient(
        state: Unified, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Unified, PyTree]:
        _, grads = drawn(state.split, grads, params, masks, clock, hyper)
        return state, tree.put(grads, as_one(groups, state, dict(tree.paths(grads)), total=True))

    def project(
        state: Unified, before: PyTree, after: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Unified, PyTree]:
        del before, masks, clock, hyper
        return state, tree.put(after, as_one(groups, state, dict(tree.paths(after))))

    def values(state: Unified, view: View) -> Weights:
        return as_one(groups, state, view.weights)

    hook = StepHook(gradient=gradient, project=project)
    return Pruner(init, update, frozenset(), values, hook=hook)


def chosen(
    asked: Asked, weights: Weights, alive: Masks, counts: Counts, unified: ArrayLike
) -> tuple[Masks, Masks]:
    """The blocks that are kept, those with the largest norms, and which of them are unified."""
    groups = asked.groups
    norms = groups.gather({path: w**2 for path, w in weights.items()})
    kept = selected(asked, norms, alive, counts)
    change = unification_loss(groups, weights)
    ranked = {name: jnp.where(kept[name], -leaf, -jnp.inf) for name, leaf in change.items()}
    left = count_kept(kept)
    if GLOBAL in counts:
        left = {GLOBAL: sum(left.values())}
    share = {n: jnp.floor(k * jnp.asarray(unified)).astype(jnp.int32) for n, k in left.items()}
    return kept, (global_top_k if GLOBAL in counts else layerwise_top_k)(ranked, share)


def shared_sizes(groups: Groups, weights: Weights) -> Scores:
    """q of each block: the mean of |w| over its weights that are not 0, which stay 0."""
    sizes = groups.gather({path: jnp.abs(w) for path, w in weights.items()})
    counted = groups.gather({path: (w != 0).astype(w.dtype) for path, w in weights.items()})
    return {name: total / jnp.maximum(counted[name], 1) for name, total in sizes.items()}


def unification_loss(groups: Groups, weights: Weights) -> Scores:
    """The sum of `(|w| - q)²` over each block, see `shared_sizes`: what unification changes."""
    means = groups.spread(shared_sizes(groups, weights))
    changes = {p: jnp.where(w == 0, 0, (jnp.abs(w) - means[p]) ** 2) for p, w in weights.items()}
    return groups.gather(changes)


def nearest_unified(groups: Groups, weights: Weights, kept: Masks, tied: Masks) -> Weights:
    """The nearest weights with these blocks pruned and unified; a weight of 0 stays 0."""
    means = groups.spread(shared_sizes(groups, weights))
    whole, shared = groups.spread(kept), groups.spread(tied)
    found = {}
    for path, w in weights.items():
        one = jnp.where(shared[path], jnp.sign(w) * means[path], w)
        found[path] = jnp.where(whole[path], one, 0)
    return found


def as_one(groups: Groups, state: Unified, values: Weights, *, total: bool = False) -> Weights:
    """Values of tied weights made equal over each block, but for their signs.

    Args:
      values: path -> weights or their gradients, of all parameters.
      total: the sum over the block, as of gradients, in place of the mean.
    """
    signs = {path: s.astype(values[path].dtype) for path, s in state.signs.items()}
    sums = groups.gather({path: s * values[path] for path, s in signs.items()})
    if not total:
        counted = groups.gather({path: jnp.abs(s) for path, s in signs.items()})
        sums = {name: leaf / jnp.maximum(counted[name], 1) for name, leaf in sums.items()}
    each = groups.spread(sums)
    return {p: jnp.where(m, signs[p] * each[p], values[p]) for p, m in state.tied.items()}


def _squares(groups: Groups, view: View) -> Scores:
    return groups.gather({path: w**2 for path, w in view.weights.items()})
