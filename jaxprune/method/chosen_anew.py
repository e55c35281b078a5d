"""The frame of methods that choose their masks anew in each round, by a score of everything."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.method.lasting import Asked, kept_groups
from jaxprune.method.pruner import among, tallied
from jaxprune.select import count_kept, global_top_k, layerwise_top_k, within_bounds
from jaxprune.types import (
    Counts,
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


class Anew(NamedTuple):
    """What such a method carries from its first round to its last.

    Attributes:
      masks: those before its first round: what was pruned then never returns.
      round: rounds so far, int32.
      prunes: did the counts of the last round leave something out? bool.
      own: of the method itself.
    """

    masks: Masks
    round: jax.Array
    prunes: jax.Array
    own: PyTree


def chosen_anew(
    asked: Asked,
    hook: StepHook,
    score: Callable[[Key, View, PyTree], Scores],
    *,
    begin: Callable[[View], PyTree] = lambda view: (),
    learn: Callable[[PyTree, Scores, Masks, Counts], PyTree] | None = None,
    dense: bool = True,
    only_last: bool = False,
    remaining: bool = False,
    learned: bool = False,
) -> Pruner:
    """A pruner that chooses its masks anew in each round.

    Args:
      asked: see `Asked`.
      hook: of the step; its `weights` makes the masked network.
      score: `(key, view, state of its own) -> a score of each prunable weight`, high = keep; those
        of a group are added up. With `learned` a score of each group.
      begin: makes the state of its own.
      learn: `(state of its own, scores, what may be kept, counts) -> state` after each round.
      dense: stored weights stay dense, see `Pruner`; else weights that come back are zero.
      only_last: earlier rounds leave the masks as they are: the hook has its own.
      remaining: the last round keeps what the hook leaves above zero, and the best of each layer,
        whatever the counts say.
      learned: scores are of groups already, and all zero in the first round, which leaves the masks
        as they are.

    Returns:
      A pruner with the state `Anew`.
    """

    def init(key: Key, view: View) -> Anew:
        del key
        return begun(view, begin(view))

    def update(
        key: Key, state: Anew, view: View, counts: Counts, batches: Any
    ) -> tuple[Anew, Masks, PruneInfo]:
        del batches
        scores = score(key, view, state.own)
        scores = scores if learned else asked.groups.gather(scores)
        alive = asked.groups.alive(state.masks)
        chosen = selected(asked, scores, alive, counts)
        if remaining:
            best = layerwise_top_k(among(scores, alive), dict.fromkeys(scores, 1))
            left = asked.groups.alive({path: w != 0 for path, w in view.weights.items()})
            chosen = {name: alive[name] & (left[name] | best[name]) for name in chosen}
        masks = {path: m & state.masks[path] for path, m in asked.groups.spread(chosen).items()}
        if only_last:
            last = state.round == len(asked.events) - 1
            masks = {path: m | (state.masks[path] & ~last) for path, m in masks.items()}
        nonfinite, nonzero = tallied(scores, alive)
        if learned:
            first = state.round == 0
            masks = {path: m | (state.masks[path] & first) for path, m in masks.items()}
            nonzero = jnp.where(first, 1, nonzero)
        info = PruneInfo(count_kept(chosen), nonfinite, nonzero)
        own = state.own if learn is None else learn(state.own, scores, alive, counts)
        state = Anew(state.masks, state.round + 1, leave_out(asked, counts), own)
        return state, masks, info

    returning = None if dense else as_they_are
    return Pruner(init, update, frozenset(), returning, hook=hook, dense=dense)


def as_they_are(state: PyTree, view: View) -> Weights:
    """The values of weights after a round: what was pruned is zero, in the mask or not."""
    del state
    return view.weights


def begun(view: View, own: PyTree = ()) -> Anew:
    """The state before the first round."""
    return Anew(view.masks, jnp.zeros((), jnp.int32), jnp.zeros((), bool), own)


def leave_out(asked: Asked, counts: Counts) -> jax.Array:
    """Do the counts keep less than everything?"""
    if asked.cost:
        return jnp.asarray(counts[asked.cost] < 1)
    total = sum(math.prod(shape) for shape in asked.groups.shapes.values())
    return jnp.asarray(sum(counts.values()) < total)


def selected(asked: Asked, scores: Scores, alive: Masks, counts: Counts) -> Masks:
    """The groups with the best scores, as many as the counts say."""
    groups = asked.groups
    ranked = among(scores, alive)
    if groups.own:
        return kept_groups(asked, ranked, counts)
    if groups.eligible is not None:
        ranked = groups.eligible(ranked)
    if not asked.shared:
        return layerwise_top_k(ranked, counts)
    return global_top_k(within_bounds(ranked, asked.fewest, asked.most), counts)


def check_rounds(asked: Asked, name: str) -> None:
    """Raises PruneError unless the clock of each round is known, and there are two or more."""
    if len(asked.events) < 2:
        raise PruneError(f"'{name}' needs two rounds or more, not {len(asked.events)}")


# --- for hooks ----------------------------------------------------------------------------------


def straight_through(params: PyTree, masks: Masks) -> PyTree:
    """Parameters that are zero where pruned, but the gradient goes to all weights."""
    leaves = dict(tree.paths(params))
    # Exact: w + (w - w) is w, and w + (0 - w) is 0.
    moved = {
        path: leaves[path] + jax.lax.stop_gradient(jnp.where(mask, leaves[path], 0) - leaves[path])
        for path, mask in masks.items()
    }
    return tree.put(params, moved)


def straight_weights(state: PyTree, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
    """`straight_through` as the `weights` of a hook."""
    del state, clock
    return straight_through(params, masks)


def masked_weights(state: PyTree, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
    """Parameters that are zero where pruned, as the `weights` of a hook."""
    del state, clock
    return tree.apply_masks(params, masks)


def by_size(key: Key, view: View, state: PyTree) -> Weights:
    """`sizes_of` as a score."""
    del key, state
    return sizes_of(view)


def sizes_of(view: View) -> Weights:
    """The sizes of all stored weights: where a method keeps dense ones, pruned ones too."""
    stored = view.weights if view.stored is None else view.stored
    return {path: jnp.abs(w) for path, w in stored.items()}
