"""SPP and IncReg: groups fade out and come back by their rank, round by round.

Each group has a share of life in [0, 1], 1 at first. In a round the groups are ranked by their
size, averaged over the rounds so far; low ranks lose life, high ranks win some back, and who has
none left is removed for good. Numbers are those of MingSun-Tse/Caffe_IncReg.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import rng, tree
from jaxprune.arguments import positive
from jaxprune.method.any_groups import mean_sizes, pulled
from jaxprune.method.chosen_anew import selected
from jaxprune.method.lasting import Asked
from jaxprune.method.pruner import tallied
from jaxprune.select import as_count, count_kept
from jaxprune.tree import check_same_paths
from jaxprune.types import (
    GLOBAL,
    Batches,
    Counts,
    Hyper,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    Scores,
    StepHook,
    View,
)

#: Largest exponent of the curve.
_MOST = 60.0


class Fading(NamedTuple):
    """What the method carries from its first round to its last.

    Attributes:
      life: layer -> share of life of each group, in [0, 1].
      rank: layer -> its rank, 0 for the smallest, averaged over the rounds so far.
      round: rounds so far, int32.
      draw: key data of the masks that are drawn in each step.
    """

    life: Scores
    rank: Scores
    round: jax.Array
    draw: jax.Array


def spp(asked: Asked, *, amount: ArrayLike = 0.05, bend: ArrayLike = 0.25) -> Pruner:
    """Structured probabilistic pruning (Wang et al., BMVC 2018, arXiv:1709.06994).

    In every step a group computes with a probability, its share of life, drawn anew; weights that
    sit out keep their values and get no gradient of the loss. Evaluation uses all groups that are
    left. Each round is an update of the probabilities (the paper has one in 180 steps); when as
    many are gone as the target says, all others get probability 1.

    Args:
      asked: what is pruned; the paper prunes columns of kernels, by layer.
      amount: A, how much the lowest rank loses in a round.
      bend: u, the share of A that is lost at the centre of the curve; below 1.

    Raises:
      PruneError: a number that is not above 0.
    """

    def weights(state: Fading, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.draw), clock)
        drawn = {
            name: jax.random.bernoulli(jax.random.fold_in(key, i), life)
            for i, (name, life) in enumerate(state.life.items())
        }
        whole = asked.groups.spread(drawn)
        return tree.apply_masks(params, {path: m & whole[path] for path, m in masks.items()})

    def evaluated(state: Fading, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
        del state, clock
        return tree.apply_masks(params, masks)

    hook = StepHook(weights=weights, evaluated=evaluated)
    return _fading(asked, 'spp', hook, amount, bend, dense=True)


def increg(
    asked: Asked, *, amount: ArrayLike = 0.05, bend: ArrayLike = 0.25, ceiling: ArrayLike = 1.0
) -> Pruner:
    """Incremental regularisation (Wang et al. 2018, arXiv:1811.08390).

    As SPP with a penalty in place of chance: the gradient of a group gets `λ w`, and a group is
    removed when its λ reaches the ceiling. λ is `ceiling (1 - life)`.

    Args:
      asked, bend: see `spp`.
      amount: what the lowest rank wins of λ in a round, as a share of the ceiling.
      ceiling: of λ. Ours; the published one is not known to us.

    Raises:
      PruneError: a number that is not above 0.
    """
    positive('ceiling of increg', ceiling)
    pull = pulled(asked.groups)

    def gradient(
        state: Fading, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Fading, PyTree]:
        del masks, clock, hyper
        dtype = jax.tree.leaves(grads)[0].dtype
        strengths = {n: (ceiling * (1 - life)).astype(dtype) for n, life in state.life.items()}
        return state, pull(grads, strengths, params)

    return _fading(asked, 'increg', StepHook(gradient=gradient), amount, bend, dense=False)


def lost(rank: ArrayLike, going: ArrayLike, amount: ArrayLike, bend: ArrayLike) -> jax.Array:
    """What a group of a rank loses in a round: A at rank 0, 0 at rank n, less than 0 beyond.

    `A exp(-α r)` up to `N = ln(1/u) / α`, with `α = ln(2/u) / n`, then symmetric about the point
    `(N, u A)`: `2 u A - A exp(-α (2 N - r))`.

    Args:
      rank: 0 for the smallest of those left.
      going: n, how many of those left have to go; 0 for none, and nothing is lost.
      amount, bend: A and u.
    """
    slope = jnp.log(2 / bend) / jnp.maximum(going, 1)
    centre = -jnp.log(bend) / slope
    near = amount * jnp.exp(-slope * rank)
    # Shares of life end at 1: a larger exponent would change nothing, and overflow.
    beyond = jnp.minimum(slope * (rank - 2 * centre), _MOST)
    far = 2 * bend * amount - amount * jnp.exp(beyond)
    return jnp.where(going > 0, jnp.where(rank < centre, near, far), 0.0)


def _fading(
    asked: Asked, name: str, hook: StepHook, amount: ArrayLike, bend: ArrayLike, *, dense: bool
) -> Pruner:
    positive(f'amount of {name}', amount)
    positive(f'bend of {name}', bend)
    groups = asked.groups

    def init(key: Key, view: View) -> Fading:
        one = jnp.ones((), _wide(next(iter(view.weights.values())).dtype))
        alive = groups.alive(view.masks)
        life = {layer: jnp.where(m, one, 0) for layer, m in alive.items()}
        rank = {layer: jnp.zeros_like(leaf) for layer, leaf in life.items()}
        return Fading(life, rank, jnp.zeros((), jnp.int32), rng.words(key))

    def update(
        key: Key, state: Fading, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Fading, Masks, PruneInfo]:
        del key, batches
        stored = view.weights if view.stored is None else view.stored
        alive, sizes = groups.alive(view.masks), mean_sizes(groups, stored)
        rank = {
            layer: state.rank[layer] + (new - state.rank[layer]) / (state.round + 1)
            for layer, new in _ranks(asked, sizes, alive).items()
        }
        order = _ranks(asked, rank, alive)
        left, goal = _left(asked, alive), to_keep(asked, order, alive, counts)
        life = {}
        for layer, old in state.life.items():
            change = lost(order[layer], left[layer] - goal[layer], amount, bend)
            new = jnp.clip(old - change, 0, 1)
            life[layer] = jnp.where(alive[layer], new, 0).astype(old.dtype)
        # Of equal lives the rank decides; no more go than have to.
        ranked = {k: v + 1e-3 * order[k] / (order[k].max() + 1) for k, v in life.items()}
        best = selected(asked, ranked, alive, counts)
        last = state.round == len(asked.events) - 1
        kept = {k: best[k] | (alive[k] & (v > 0) & ~last) for k, v in life.items()}
        left = _left(asked, kept)
        for layer, mask in kept.items():
            whole = jnp.where(left[layer] <= goal[layer], 1, life[layer])
            life[layer] = jnp.where(mask, whole, 0).astype(life[layer].dtype)
        whole = groups.spread(kept)
        masks = {path: m & whole[path] for path, m in view.masks.items()}
        # As planned: those that still have some life left compute beside them.
        info = PruneInfo(count_kept(best), *tallied(sizes, alive))
        return Fading(life, rank, state.round + 1, state.draw), masks, info

    return Pruner(init, update, frozenset(), hook=hook, dense=dense)


def _left(asked: Asked, alive: Masks) -> dict[str, jax.Array]:
    """Layer -> how many groups are left in its ranking: its own, or that of all layers."""
    kept = count_kept(alive)
    return dict.fromkeys(kept, sum(kept.values())) if asked.shared else kept


def to_keep(asked: Asked, scores: Scores, alive: Masks, counts: Counts) -> dict[str, jax.Array]:
    """Layer -> how many groups its ranking is to keep, of those alive."""
    if asked.groups.own or asked.groups.eligible is not None:
        return _left(asked, selected(asked, scores, alive, counts))
    # A selection keeps as many as the counts say, if so many are alive and caps let them stay.
    check_same_paths('counts of a selection', counts, {GLOBAL} if asked.shared else alive)
    sizes = {name: mask.size for name, mask in alive.items()}
    left = count_kept(alive)
    if not asked.shared:
        return {n: jnp.minimum(as_count(counts[n], sizes[n]), k) for n, k in left.items()}
    if asked.most is not None:
        left = {n: jnp.minimum(as_count(asked.most[n], sizes[n]), k) for n, k in left.items()}
    wanted = as_count(counts[GLOBAL], sum(sizes.values()))
    return dict.fromkeys(left, jnp.minimum(wanted, sum(left.values())))


def _ranks(asked: Asked, scores: Scores, alive: Masks) -> Scores:
    """Ranks from 0 among those alive, of each layer, or of all; those gone are behind."""
    ranked = {name: jnp.where(alive[name], leaf, jnp.inf) for name, leaf in scores.items()}
    if not asked.shared:
        return {name: _rank(leaf.ravel()).reshape(leaf.shape) for name, leaf in ranked.items()}
    flat = _rank(jnp.concatenate([leaf.ravel() for leaf in ranked.values()]))
    found, at = {}, 0
    for name, leaf in ranked.items():
        found[name] = flat[at : at + leaf.size].reshape(leaf.shape)
        at += leaf.size
    return found


def _rank(values: jax.Array) -> jax.Array:
    """The place of each value in increasing order; of equal ones the first is lower."""
    order = jnp.argsort(values, stable=True)
    places = jnp.arange(values.size, dtype=_wide(values.dtype))
    return jnp.zeros_like(places).at[order].set(places)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """A type whose numbers can be ranks: bfloat16 counts to 256."""
    return jnp.promote_types(dtype, jnp.float32)
