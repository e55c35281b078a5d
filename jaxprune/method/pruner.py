"""The pruner every score-and-select method is made of."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.errors import PruneError
from jaxprune.select import count_kept, global_top_k, within_bounds
from jaxprune.structure import Ranking
from jaxprune.tree import check_same_paths
from jaxprune.types import (
    NEEDS,
    Batches,
    Counts,
    Groups,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    ScoreFn,
    Scores,
    SelectFn,
    View,
    Weights,
)

#: `(ranking, active) -> (masks, active weights found)`, see `structure.prune_to_active`.
FinalMasksFn = Callable[[Ranking, ArrayLike], tuple[Masks, jax.Array]]


class Memory(NamedTuple):
    """What a pruner that may bring weights back carries from round to round.

    Attributes:
      initial: the weights as they were before the first round.
      masks: the masks as they were then: what was pruned before never returns.
      round: rounds so far, int32.
      ranking: every weight's last score; None if the keep counts alone determine the masks.
      average: the average of scores over rounds; None if there is none.
    """

    initial: Weights
    masks: Masks
    round: jax.Array
    ranking: Ranking | None
    average: Scores | None = None


def pruner(
    score: ScoreFn,
    select: SelectFn = global_top_k,
    *,
    monotone: bool = True,
    needs: Iterable[str] = (),
    fewest: Counts | None = None,
    most: Counts | None = None,
    final_masks: FinalMasksFn | None = None,
    groups: Groups | None = None,
    by_group: bool = False,
    momentum: ArrayLike | None = None,
) -> Pruner:
    """Scores the weights, keeps the best.

    Args:
      score: high = keep.
      select: `global_top_k` or `layerwise_top_k`.
      monotone: pruned weights never return: their score is -inf. Otherwise the score sees the
        weights before the first round as `view.initial`, and a weight that returns has its
        initial value.
      needs: what the score reads, see `types.NEEDS`; nothing for scores of the weights alone.
      fewest: path -> how many weights a leaf keeps at least in a ranking over all leaves.
      most: path -> how many at most.
      final_masks: chooses the masks after the last round from the order of pruning: weights of an
        earlier round rank behind those of a later one, whatever their scores.
      groups: what competes, by the sum of its weights' scores; None for single weights. Counts
        and bounds are those of its layers.
      by_group: the score gives one number per group itself.
      momentum: m of `m average + (1 - m) score`, an average over rounds that takes the place of the
        score from the second round on, as Molchanov et al. (2019, arXiv:1906.10771) have it; what
        is pruned has the average 0. None to take each round's score.

    Returns:
      A `Pruner`; `update` may be called once (one-shot) or once per round with falling counts
      (iterative). A monotone pruner without `final_masks` carries nothing from round to round.
    """

    needs = frozenset(needs)
    if not needs <= NEEDS:
        raise PruneError(f'needs may hold {sorted(NEEDS)}, not {sorted(needs)}')
    returns = not monotone or final_masks is not None
    remembers = returns or momentum is not None

    def init(key: Key, view: View) -> tuple | Memory:
        del key
        if not remembers:
            return ()
        first = jnp.zeros((), jnp.int32)
        average = None if momentum is None else _no_average(view, groups)
        ranking = None if final_masks is None else _no_ranking(view)
        initial, masks = (view.weights, view.masks) if returns else ({}, {})
        return Memory(initial, masks, first, ranking, average)

    def update(key: Key, state, view: View, counts: Counts, batches: Batches | None):
        if returns:
            view = view._replace(initial=state.initial)
        scores = score(key, view, batches)
        in_force = view.masks if monotone else state.masks
        scores, in_play = _of_groups(groups, by_group, scores, in_force)
        nonfinite, nonzero = tallied(scores, in_play)
        if momentum is not None:
            scores = _averaged(state, scores, in_play, momentum)
            state = state._replace(average=scores)
        scores = among(scores, in_play)
        if groups is not None and groups.eligible is not None:
            scores = groups.eligible(scores)
        scores = within_bounds(scores, fewest, most)
        masks = select(scores, counts)
        kept = count_kept(masks)
        if groups is not None:
            masks = {path: m & in_force[path] for path, m in groups.spread(masks).items()}
        if remembers:
            state = state._replace(round=state.round + 1)
        if final_masks is not None:
            state = state._replace(ranking=_ranked(state, scores, in_play))
        return state, masks, PruneInfo(kept, nonfinite, nonzero)

    def regrown_values(state: Memory, view: View) -> Weights:
        # Only what returns: a weight that was kept all along may have been trained since.
        return {
            path: jnp.where(view.masks[path], w, state.initial[path])
            for path, w in view.weights.items()
        }

    def masks_at_the_end(state: Memory, active: ArrayLike) -> Masks:
        return final_masks(state.ranking, active)[0]

    return Pruner(
        init,
        update,
        needs,
        regrown_values if returns else None,
        masks_at_the_end if final_masks is not None else None,
    )


def _no_average(view: View, groups: Groups | None) -> Scores:
    """Zeros for each score."""
    shapes = jax.tree.map(jnp.shape, view.weights) if groups is None else groups.shapes
    dtype = jnp.result_type(*view.weights.values())
    return {layer: jnp.zeros(shape, dtype) for layer, shape in shapes.items()}


def _no_ranking(view: View) -> Ranking:
    """Before the first round; weights that are pruned already stay so."""
    never = {path: jnp.full(w.shape, -jnp.inf, w.dtype) for path, w in view.weights.items()}
    return Ranking({path: jnp.zeros(w.shape, jnp.int32) for path, w in view.weights.items()}, never)


def _ranked(state: Memory, scores: Scores, in_play: Masks) -> Ranking:
    """The ranking with this round's scores of what is in play."""
    before = state.ranking
    last = {p: jnp.where(in_play[p], state.round, n) for p, n in before.last.items()}
    latest = {
        p: jnp.where(in_play[p], scores[p], s).astype(s.dtype) for p, s in before.scores.items()
    }
    return Ranking(last, latest)


def _averaged(state: Memory, scores: Scores, in_play: Masks, momentum: ArrayLike) -> Scores:
    """The scores of this round, averaged with those of the rounds before."""

    def one(layer: str, score: jax.Array) -> jax.Array:
        before = state.average[layer]
        share = jnp.where(state.round > 0, momentum, 0).astype(score.dtype)
        return jnp.where(in_play[layer], share * before + (1 - share) * score, 0)

    return {layer: one(layer, score) for layer, score in scores.items()}


def among(scores: Scores, in_play: Masks) -> Scores:
    """Scores of what is still in play; -inf elsewhere, which no selection keeps."""
    return {path: jnp.where(in_play[path], leaf, -jnp.inf) for path, leaf in scores.items()}


def tallied(scores: Scores, in_play: Masks) -> tuple[jax.Array, jax.Array]:
    """How many scores of what is still in play are not finite, and how many are not zero."""
    nonfinite = ((~jnp.isfinite(leaf) & in_play[path]) for path, leaf in scores.items())
    nonzero = (((leaf != 0) & in_play[path]) for path, leaf in scores.items())
    return tuple(sum(leaf.sum(dtype=jnp.int32) for leaf in each) for each in (nonfinite, nonzero))


def _of_groups(
    groups: Groups | None, by_group: bool, scores: Scores, masks: Masks
) -> tuple[Scores, Masks]:
    """The scores of what competes, and what of it is still there."""
    if groups is None:
        check_same_paths('scores', scores, masks)
        return scores, masks
    if not by_group:
        check_same_paths('scores', scores, masks)
        scores = groups.gather({p: jnp.where(masks[p], s, 0) for p, s in scores.items()})
    check_same_paths('scores of groups', scores, groups.shapes)
    return scores, groups.alive(masks)
