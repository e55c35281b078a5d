"""ADMM pruning: weights are drawn to a set of pruned networks that moves with them.

Zhang et al., ECCV 2018, arXiv:1804.03294, for single weights and structures alike. The set is what
a granularity and a density allow: so many weights, n of every m, blocks, kernels, units.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import positive
from jaxprune.method.chosen_anew import as_they_are, leave_out, selected
from jaxprune.method.lasting import Asked
from jaxprune.method.pruner import tallied
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
    Scores,
    StepHook,
    View,
    Weights,
)


class Split(NamedTuple):
    """What ADMM carries from its first round to its last.

    Attributes:
      target: Z, the point of the set that weights are drawn to.
      dual: U, the sum of the differences so far, scaled.
      strength: ρ, scalar.
      round: rounds so far, int32.
      prunes: does the set leave anything out? bool.
    """

    target: Weights
    dual: Weights
    strength: jax.Array
    round: jax.Array
    prunes: jax.Array


def admm(asked: Asked, *, strength: ArrayLike = 1e-4, strength_end: ArrayLike = 0.1) -> Pruner:
    """Trains `L(W) + ρ/2 ‖W - Z + U‖²`; each round takes Z to the set and moves U.

    `Z = Π(W + U)`, `U = U + W - Z`, Π the nearest point of the set: the groups with the largest
    norms stay. ρ grows by the same factor in each round, and U shrinks by it. The last round prunes
    W itself. The paper has 10 to 30 rounds.

    Args:
      asked: what is pruned. The norm of coupled groups is that of the kernels that make them.
      strength, strength_end: ρ after the first round, and after the last but one.

    Raises:
      PruneError: a number that is not above 0.
    """
    positive('strength of admm', strength)
    positive('strength_end of admm', strength_end)

    def update(
        key: Key, state: Split, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Split, Masks, PruneInfo]:
        del key, batches
        alive = asked.groups.alive(view.masks)
        last = state.round == len(asked.events) - 1
        rho = strength_at(asked, state.round, strength, strength_end)

        def project(point: Weights) -> tuple[Weights, tuple[Masks, Scores]]:
            return nearest_sparse(asked, point, alive, counts)

        state, (kept, scores) = split(state, view.weights, rho, project, last)
        whole = asked.groups.spread(kept)
        masks = {path: m & (whole[path] | ~last) for path, m in view.masks.items()}
        info = PruneInfo(count_kept(kept), *tallied(scores, alive))
        return state._replace(prunes=leave_out(asked, counts)), masks, info

    return Pruner(begun, update, frozenset(), as_they_are, hook=StepHook(gradient=drawn))


def nearest_sparse(
    asked: Asked, weights: Weights, alive: Masks, counts: Counts
) -> tuple[Weights, tuple[Masks, Scores]]:
    """The nearest weights with so many groups: `(weights, (groups kept, squared norms))`."""
    norms = asked.groups.gather({path: w**2 for path, w in weights.items()})
    kept = selected(asked, norms, alive, counts)
    whole = asked.groups.spread(kept)
    return {path: jnp.where(whole[path], w, 0) for path, w in weights.items()}, (kept, norms)


def split(
    state: Split,
    weights: Weights,
    strength: jax.Array,
    project: Callable[[Weights], tuple[Weights, Any]],
    settles: jax.Array,
) -> tuple[Split, Any]:
    """A round of ADMM: Z and U, and what else `project` has found.

    The first round takes Z from the weights, and U is 0. So does one that `settles` the masks.
    """
    shrunk = jnp.where((state.round == 0) | settles, 0, state.strength / strength)
    dual = {path: u * shrunk.astype(u.dtype) for path, u in state.dual.items()}
    target, found = project({path: w + dual[path] for path, w in weights.items()})
    first = state.round == 0
    dual = {p: jnp.where(first, 0, u + weights[p] - target[p]) for p, u in dual.items()}
    strength = strength.astype(state.strength.dtype)
    return Split(target, dual, strength, state.round + 1, state.prunes), found


def strength_at(
    asked: Asked, number: jax.Array, strength: ArrayLike, strength_end: ArrayLike
) -> jax.Array:
    """ρ after a round: from `strength` to `strength_end` in the last but one, by equal factors."""
    way = jnp.minimum(number / max(len(asked.events) - 2, 1), 1)
    return jnp.asarray(strength * (strength_end / strength) ** way)


def drawn(
    state: Split, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
) -> tuple[Split, PyTree]:
    """The gradient with `ρ (W - Z + U)` added."""
    del masks, clock, hyper
    loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
    rho = jnp.where(state.prunes, state.strength, 0)
    pulled = {
        path: loss[path] + rho * (stored[path] - z + state.dual[path])
        for path, z in state.target.items()
    }
    return state, tree.put(grads, pulled)


def begun(key: Key, view: View) -> Split:
    """The state before the first round."""
    del key
    zeros = {path: jnp.zeros_like(w) for path, w in view.weights.items()}
    scalar = jnp.zeros((), next(iter(zeros.values())).dtype)
    return Split(zeros, zeros, scalar, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
