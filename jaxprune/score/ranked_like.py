"""One score's layer allocations with another score's choice inside each layer.

The control of Su et al. (2020, arXiv:2009.11094) and Vysogorets & Kempe (arXiv:2107.02306): does
a method choose weights well, or only how many to keep in each layer?
"""

import jax
import jax.numpy as jnp

from jaxprune.types import Batches, Key, ScoreFn, Scores, View


def ranked_like(inner: ScoreFn, outer: ScoreFn) -> ScoreFn:
    """The values of `outer` in the order of `inner`, within each leaf.

    The best weight of a leaf by `inner` gets the largest value that `outer` gave in that leaf, and
    so on. So one ranking over all leaves keeps as many weights of each as `outer` would, but those
    that `inner` likes. With `random` inside these are random masks with the allocations of `outer`.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        inside, outside = inner(key, view, batches), outer(key, view, batches)

        def arrange(path: str) -> jax.Array:
            in_play = view.masks[path].reshape(-1)
            # Pruned weights must not take a value that belongs to one still in play.
            ours = jnp.where(in_play, inside[path].reshape(-1), -jnp.inf)
            values = jnp.where(in_play, outside[path].reshape(-1), -jnp.inf)
            best_first = jnp.argsort(ours, descending=True, stable=True)
            ordered = jnp.zeros_like(values).at[best_first].set(jnp.sort(values, descending=True))
            # A broken score must stay visible: it is counted and reported.
            broken = jnp.isnan(inside[path]).reshape(-1)
            return jnp.where(broken, jnp.nan, ordered).reshape(inside[path].shape)

        return {path: arrange(path) for path in inside}

    return score
