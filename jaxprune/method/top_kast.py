"""Top-KAST: always sparse training (Jayakumar et al., NeurIPS 2020, arXiv:2106.03517)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.method.any_groups import check_free
from jaxprune.method.chosen_anew import (
    Anew,
    by_size,
    chosen_anew,
    leave_out,
    selected,
    straight_weights,
)
from jaxprune.method.lasting import Asked
from jaxprune.types import Counts, Hyper, Masks, Pruner, PyTree, Scores, StepHook, View


class Explored(NamedTuple):
    """What Top-KAST carries besides its masks.

    Attributes:
      masks: the weights that learn: those that compute, and the next largest.
      density: path -> share of a layer's weights that compute, scalar.
      prunes: does anything stay out? bool.
    """

    masks: Masks
    density: dict[str, jax.Array]
    prunes: jax.Array


def top_kast(asked: Asked, *, explore: ArrayLike = 0.1, penalty: ArrayLike = 1e-4) -> Pruner:
    """Computes with the largest weights, and trains the next largest as well.

    A share D of the weights computes, the largest. The gradient at this network moves a share
    D + `explore`, by size too: a weight can grow until it computes. The others stand still. The
    gradient gets `penalty w` for weights that compute and `penalty w / D` for those that only
    learn, so those that do not help fall behind. The paper chooses both sets in every step, or in
    every hundredth. With a penalty of its own it needs no weight decay of the run.

    Args:
      asked: what is pruned; weights, kernels or blocks.
      explore: density of the weights that learn beyond those that compute, of each layer, or of all
        in one ranking.
      penalty: λ of the paper.

    Raises:
      PruneError: coupled groups, n:m.
    """
    groups = asked.groups
    check_free(groups, 'top_kast')

    def begin(view: View) -> Explored:
        density = {path: jnp.ones((), w.dtype) for path, w in view.weights.items()}
        return Explored(view.masks, density, jnp.zeros((), bool))

    def learn(own: Explored, scores: Scores, alive: Masks, counts: Counts) -> Explored:
        sizes = {name: leaf.size for name, leaf in scores.items()}
        sizes = {name: sizes.get(name, sum(sizes.values())) for name in counts}
        more = {n: k + jnp.int32(jnp.round(explore * sizes[n])) for n, k in counts.items()}
        wider = asked._replace(most=None)
        learning = selected(
            wider, scores, alive, {n: jnp.minimum(k, sizes[n]) for n, k in more.items()}
        )
        computing = groups.spread(selected(asked, scores, alive, counts))
        density = {p: computing[p].mean().astype(d.dtype) for p, d in own.density.items()}
        masks = {p: m | computing[p] for p, m in groups.spread(learning).items()}
        return Explored(masks, density, leave_out(asked, counts))

    def gradient(
        state: Anew, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Anew, PyTree]:
        del clock, hyper
        loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
        strength = jnp.where(state.own.prunes, penalty, 0.0)
        pulled = {}
        for path, mask in masks.items():
            rarer = 1 / jnp.maximum(state.own.density[path], 1 / mask.size)
            pull = strength * jnp.where(mask, 1, rarer)
            pulled[path] = loss[path] + pull.astype(loss[path].dtype) * stored[path]
        return state, tree.put(grads, pulled)

    hook = StepHook(
        weights=straight_weights,
        gradient=gradient,
        moves=lambda state, masks: state.own.masks,
    )
    return chosen_anew(asked, hook, by_size, begin=begin, learn=learn)
