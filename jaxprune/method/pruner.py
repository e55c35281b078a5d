"""The pruner every score-and-select method is made of."""

from collections.abc import Iterable

import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.select import global_top_k, kept
from jaxprune.tree import check_same_paths
from jaxprune.types import Batch, Counts, Key, PruneInfo, Pruner, ScoreFn, SelectFn, View


def pruner(
    score: ScoreFn,
    select: SelectFn = global_top_k,
    *,
    monotone: bool = True,
    needs: Iterable[str] = (),
) -> Pruner:
    """Scores the weights, keeps the best.

    Args:
      score: high = keep.
      select: `global_top_k` or `layerwise_top_k`.
      monotone: pruned weights never return: their score is -inf.
      needs: what the score reads from an event's batches: 'data' (inputs and labels) or 'shape'
        (the shape of an input only); nothing for scores of the weights alone.

    Returns:
      A `Pruner` without state; `update` may be called once (one-shot) or once per round with
      falling counts (iterative).
    """

    needs = frozenset(needs)
    if not needs <= {'data', 'shape'}:
        raise PruneError(f"needs may hold 'data' and 'shape', not {sorted(needs)}")

    def init(key: Key, view: View) -> tuple:
        del key, view
        return ()

    def update(key: Key, state: tuple, view: View, counts: Counts, batches: Batch | None):
        scores = score(key, view, batches)
        check_same_paths('scores', scores, view.weights)
        nonfinite = sum(
            (~jnp.isfinite(leaf) & view.masks[path]).sum(dtype=jnp.int32)
            for path, leaf in scores.items()
        )
        if monotone:
            scores = {
                path: jnp.where(view.masks[path], leaf, -jnp.inf) for path, leaf in scores.items()
            }
        masks = select(scores, counts)
        return state, masks, PruneInfo(kept=kept(masks), nonfinite=nonfinite)

    return Pruner(init, update, needs)
