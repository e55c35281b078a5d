"""The frame of methods that act from their first round to their last, and remove groups in it.

In the rounds before the last one such a method learns how many groups may go. Its hook then works
on the weights, step by step. The last round removes the groups that are left smallest: those that
the hook has made zero, if it made enough of them zero.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice
from jaxprune.method.own_slices import PerGroup, Vectors, vectors
from jaxprune.method.pruner import tallied
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
)

#: What the last round removes: as many groups as were asked for, or those that are zero.
CUTS = ('target', 'zero')

#: What can be recorded of methods that change training, with what it is; by layer.
WATCHED = {
    'zero_groups': 'groups all of whose own weights are zero',
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
    """

    groups: Groups
    fewest: Counts | None
    events: tuple[int, ...]
    multiple: int = 1


class Lasting(NamedTuple):
    """What such a method carries from its first round to its last.

    Attributes:
      most: layer -> how many of its groups may be gone by the next round, int32; '*' in all.
      round: rounds so far, int32.
      own: of the method itself.
    """

    most: Counts
    round: jax.Array
    own: PyTree


def lasting(
    asked: Asked,
    hook: StepHook,
    score: Callable[[PyTree], Scores],
    *,
    begin: Callable[[], PyTree] = tuple,
    cut: str = 'target',
    watch: Callable[[Lasting, PyTree], dict[str, PerGroup]] | None = None,
) -> Pruner:
    """A pruner whose hook works between its rounds; its state is `Lasting`.

    Args:
      asked: see `Asked`.
      hook: of the step.
      score: all parameters -> a score of each group, low = goes in the last round.
      begin: makes the state of its own.
      cut: 'target' removes as many groups as the counts say. 'zero' removes those whose score is 0.
      watch: see `Pruner.watch`.

    Raises:
      PruneError: fewer than two rounds, or two of them at once; an unknown cut.
    """
    groups, events = asked.groups, asked.events
    least(1, multiple=asked.multiple)
    check_choice('cut', cut, CUTS)
    if len(events) < 2 or any(b <= a for a, b in itertools.pairwise(events)):
        raise PruneError(
            f'events must be the clock of two rounds or more, one after another, not {events}'
        )

    def init(key: Key, view: View) -> Lasting:
        del key, view
        zero = jnp.zeros((), jnp.int32)
        return Lasting(dict.fromkeys((*groups.shapes, GLOBAL), zero), zero, begin())

    def update(
        key: Key, state: Lasting, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Lasting, Masks, PruneInfo]:
        del key, batches
        scores = score(tree.put(view.params, view.weights))
        alive, last = groups.alive(view.masks), state.round == len(events) - 1
        most = may_go(asked, counts)
        ranked = {name: jnp.where(alive[name], leaf, -jnp.inf) for name, leaf in scores.items()}
        if cut == 'zero':
            kept = {name: (leaf > 0) & alive[name] for name, leaf in scores.items()}
        else:
            kept = _kept(asked, ranked, counts)
        whole = groups.spread(kept)
        in_force = {path: m & (whole[path] | ~last) for path, m in view.masks.items()}
        nonfinite, nonzero = tallied(scores, alive)
        state = Lasting(most, state.round + 1, state.own)
        return state, in_force, PruneInfo(count_kept(kept), nonfinite, nonzero)

    return Pruner(init, update, frozenset(), hook=hook, watch=watch)


def may_go(asked: Asked, counts: Counts) -> Counts:
    """Keep counts -> how many groups may go, by layer and in all."""
    sizes = {name: shape[0] for name, shape in asked.groups.shapes.items()}
    if set(counts) == {GLOBAL}:
        fewest = asked.fewest or {}
        most = {name: jnp.int32(n - max(fewest.get(name, 0), 1)) for name, n in sizes.items()}
        return {**most, GLOBAL: sum(sizes.values()) - jnp.asarray(counts[GLOBAL], jnp.int32)}
    most = {name: n - jnp.asarray(counts[name], jnp.int32) for name, n in sizes.items()}
    return {**most, GLOBAL: sum(most.values())}


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


def _kept(asked: Asked, scores: Scores, counts: Counts) -> Masks:
    """The groups that the last round keeps."""
    if set(counts) == {GLOBAL}:
        fewest = {name: max((asked.fewest or {}).get(name, 0), 1) for name in scores}
        lifted = within_bounds(scores, fewest, None)
        return in_multiples(global_top_k, asked.multiple)(lifted, counts)
    return in_multiples(layerwise_top_k, asked.multiple)(scores, counts)


def norms(own: Vectors) -> Callable[[PyTree], Scores]:
    """The score of the last round: the length of each group."""
    return lambda params: {name: jnp.sqrt(leaf) for name, leaf in own.dot(params, params).items()}


def watched(groups: Groups, pruner: Pruner | None, state: RunState) -> dict[str, PerGroup]:
    """Quantities of `WATCHED` of a run, those that there are.

    Args:
      groups: what the method removes.
      pruner: the method, where it is at work.
      state: of the run.
    """
    squares = vectors(groups, silent=False).dot(state.params, state.params)
    found = {'zero_groups': count_kept({name: leaf == 0 for name, leaf in squares.items()})}
    if pruner is not None and pruner.watch is not None:
        found |= pruner.watch(state.method_state, state.params)
    return found
