"""The frame of methods that act from their first round to their last, and remove groups in it.

In the rounds before the last one such a method learns how many groups may go. Its hook then works
on the weights, step by step. The last round removes the groups that are left smallest: those that
the hook has made zero, if it made enough of them zero.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice
from jaxprune.method.budget import within_share
from jaxprune.method.own_slices import PerGroup, Vectors, vectors
from jaxprune.method.pruner import among, tallied
from jaxprune.select import (
    count_kept,
    global_top_k,
    in_multiples,
    layerwise_top_k,
    within_bounds,
)
from jaxprune.types import (
    GLOBAL,
    Batches,
    Counts,
    Groups,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    RunState,
    Scores,
    StepHook,
    View,
    Weights,
)

#: What the last round removes: as many groups as were asked for, or those that are zero.
CUTS = ('target', 'zero')

#: What can be recorded of methods that change training, with what it is; by layer.
WATCHED = {
    'zero_groups': 'groups all of whose own weights are zero, or that are pruned',
    'penalised_groups': 'groups that the method pulls to zero',
    'projected_groups': 'groups that half-space projections have made zero so far',
}


class Asked(NamedTuple):
    """What is asked of a method that changes training.

    Attributes:
      groups: what is removed.
      fewest: layer -> groups that it keeps at least, in one ranking over all layers.
      events: where the clock stands in each of its rounds.
      multiple: layers keep a multiple of so many groups, all of them if they have fewer.
      cost: counts are shares of the network's 'params' or 'flops'; '' for numbers of groups.
      shared: one ranking over all layers; else each layer has a count of its own.
      most: layer -> groups that it keeps at most, in one ranking over all layers.
      gradient: `(key, view, batches) -> gradient` of the loss by all prunable weights, pruned ones
        included, at the masked network.
    """

    groups: Groups
    fewest: Counts | None
    events: tuple[int, ...]
    multiple: int = 1
    cost: str = ''
    shared: bool = True
    most: Counts | None = None
    gradient: Callable[[Key, View, Any], Weights] | None = None


class Lasting(NamedTuple):
    """What such a method carries from its first round to its last.

    Attributes:
      counts: of the last round, or before the first one those that keep everything.
      round: rounds so far, int32.
      own: of the method itself.
    """

    counts: Counts
    round: jax.Array
    own: PyTree


def lasting(
    asked: Asked,
    hook: StepHook,
    score: Callable[[PyTree, PyTree], Scores],
    *,
    begin: Callable[[], PyTree] = tuple,
    chosen: Callable[[PyTree], Masks] | None = None,
    cut: str = 'target',
    watch: Callable[[Lasting, PyTree], dict[str, PerGroup]] | None = None,
) -> Pruner:
    """A pruner whose hook works between its rounds; its state is `Lasting`.

    Args:
      asked: see `Asked`.
      hook: of the step.
      score: (the method's own state, all parameters) -> a score of each group; low = goes in the
        last round.
      begin: makes the state of its own.
      chosen: its own state -> the groups that the last round keeps, for a method that has chosen
        them itself; None for those with the best scores.
      cut: 'target' removes as many groups as the counts say. 'zero' removes those whose score is 0,
        but for one of each layer.
      watch: see `Pruner.watch`.

    Raises:
      PruneError: fewer than two rounds, or two of them at once; an unknown cut, or 'zero' with a
        multiple.
    """
    groups, events = asked.groups, asked.events
    least(1, multiple=asked.multiple)
    check_choice('cut', cut, CUTS)
    if cut == 'zero' and asked.multiple > 1:
        raise PruneError("cut = 'zero' removes what is zero, whatever number is left: multiple = 1")
    if len(events) < 2 or any(b <= a for a, b in itertools.pairwise(events)):
        raise PruneError(
            f'events must be the clock of two rounds or more, one after another, not {events}'
        )

    def init(key: Key, view: View) -> Lasting:
        del key, view
        return Lasting(_everything(asked), jnp.zeros((), jnp.int32), begin())

    def update(
        key: Key, state: Lasting, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Lasting, Masks, PruneInfo]:
        del key, batches
        scores = score(state.own, tree.put(view.params, view.weights))
        alive, last = groups.alive(view.masks), state.round == len(events) - 1
        ranked = among(scores, alive)
        kept = kept_groups(asked, ranked, counts)
        if cut == 'zero':
            best = layerwise_top_k(ranked, fewest_of(asked))
            kept = {name: alive[name] & ((leaf > 0) | best[name]) for name, leaf in scores.items()}
        if chosen is not None:
            own = chosen(state.own)
            kept = {name: jnp.where(last, alive[name] & own[name], m) for name, m in kept.items()}
        whole = groups.spread(kept)
        in_force = {path: m & (whole[path] | ~last) for path, m in view.masks.items()}
        nonfinite, nonzero = tallied(scores, alive)
        now = {name: jnp.asarray(n, state.counts[name].dtype) for name, n in counts.items()}
        state = Lasting(now, state.round + 1, state.own)
        return state, in_force, PruneInfo(count_kept(kept), nonfinite, nonzero)

    return Pruner(init, update, frozenset(), hook=hook, watch=watch)


def _everything(asked: Asked) -> Counts:
    """The counts that keep all groups."""
    sizes = {name: shape[0] for name, shape in asked.groups.shapes.items()}
    if asked.cost:
        return {asked.cost: jnp.ones((), jnp.float32)}
    kept = {GLOBAL: sum(sizes.values())} if asked.shared else sizes
    return {name: jnp.int32(n) for name, n in kept.items()}


def may_go(asked: Asked, counts: Counts) -> Counts:
    """Keep counts -> how many groups may go, by layer and in all.

    With a cost as the target the total is not limited; it is 0 at share 1.
    """
    sizes = {name: shape[0] for name, shape in asked.groups.shapes.items()}
    total = sum(sizes.values())
    if asked.cost or asked.shared:
        fewest = fewest_of(asked)
        most = {name: jnp.int32(n - fewest[name]) for name, n in sizes.items()}
        if asked.cost:
            return {**most, GLOBAL: jnp.where(counts[asked.cost] < 1, total, 0).astype(jnp.int32)}
        return {**most, GLOBAL: total - jnp.asarray(counts[GLOBAL], jnp.int32)}
    most = {name: n - jnp.asarray(counts[name], jnp.int32) for name, n in sizes.items()}
    return {**most, GLOBAL: sum(most.values())}


def fewest_of(asked: Asked) -> dict[str, int]:
    """How many groups each layer keeps in one ranking: at least one, or the network is cut."""
    given = asked.fewest or {}
    return {name: max(given.get(name, 0), 1) for name in asked.groups.shapes}


def kept_groups(asked: Asked, scores: Scores, counts: Counts) -> Masks:
    """The groups that counts, or a share of the cost, keep: at least one of each layer."""
    if not (asked.cost or asked.shared):
        return in_multiples(layerwise_top_k, asked.multiple)(scores, counts)
    fewest = fewest_of(asked)
    lifted = within_bounds(scores, fewest, asked.most)
    if asked.cost:
        return within_share(asked.groups, asked.cost, asked.multiple, fewest)(lifted, counts)
    return in_multiples(global_top_k, asked.multiple)(lifted, counts)


# --- for hooks ----------------------------------------------------------------------------------


def lowest(scores: Scores, candidates: Masks, room: Counts) -> Masks:
    """The candidates with the lowest scores, as many as there is room for.

    Args:
      scores: layer -> `(groups,)`.
      candidates: layer -> bool `(groups,)`.
      room: layer -> how many of it at most; '*' of all together. Less than 0 counts as 0.
    """
    ranked = {n: jnp.where(candidates[n], -leaf, -jnp.inf) for n, leaf in scores.items()}
    within = within_bounds(ranked, None, {name: room[name] for name in ranked})
    return global_top_k(within, {GLOBAL: room[GLOBAL]})


def room_left(most: Counts, gone: Masks) -> Counts:
    """How many more groups may go where some are gone."""
    lost = count_kept(gone)
    lost[GLOBAL] = sum(lost.values())
    return {name: n - lost[name] for name, n in most.items()}


def to_remove(asked: Asked, state: Lasting, scores: Scores, gone: Masks) -> Masks:
    """The groups with the lowest scores that have to go besides those that are gone."""
    ranked = {name: jnp.where(gone[name], -jnp.inf, leaf) for name, leaf in scores.items()}
    kept = kept_groups(asked, ranked, state.counts)
    return {name: ~(mask | gone[name]) for name, mask in kept.items()}


def reached(asked: Asked, state: Lasting, zero: Masks, more: int = 0) -> jax.Array:
    """Are as many groups zero as may go, and some more?"""
    if asked.cost:
        left = asked.groups.shares()({name: ~mask for name, mask in zero.items()})
        return left[asked.cost] <= state.counts[asked.cost]
    return sum(count_kept(zero).values()) >= may_go(asked, state.counts)[GLOBAL] + more


def norms(own: Vectors) -> Callable[[PyTree], PerGroup]:
    """`params -> the length of each group`."""
    return lambda params: {name: jnp.sqrt(leaf) for name, leaf in own.dot(params, params).items()}


def by_length(own: Vectors) -> Callable[[PyTree, PyTree], Scores]:
    """The length of each group as the score of the last round."""
    return lambda state, params: norms(own)(params)


def zero_groups(groups: Groups, params: PyTree) -> Masks:
    """The groups all of whose own weights are zero."""
    if not groups.own:
        leaves = dict(tree.paths(params))
        return {
            p: ~mask for p, mask in groups.alive({p: leaves[p] != 0 for p in groups.shapes}).items()
        }
    squares = vectors(groups, silent=False).dot(params, params)
    return {name: leaf == 0 for name, leaf in squares.items()}


def watched(groups: Groups, pruner: Pruner | None, state: RunState) -> dict[str, PerGroup]:
    """Quantities of `WATCHED` of a run, those that there are.

    Args:
      groups: what the method removes.
      pruner: the method, where it is at work.
      state: of the run.
    """
    alive, zero = groups.alive(state.masks), zero_groups(groups, state.params)
    gone = {name: mask | ~alive[name] for name, mask in zero.items()}
    found = {'zero_groups': count_kept(gone)}
    if pruner is not None and pruner.watch is not None:
        found |= pruner.watch(state.method_state, state.params)
    return found
