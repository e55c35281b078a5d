"""Random: independent uniform scores, the baseline every method must beat."""

import jax

from jaxprune.rng import stream
from jaxprune.types import Batches, Key, ScoreFn, Scores, View


def random() -> ScoreFn:
    """`u ~ U[0, 1)` per weight; each leaf draws from its own key, so other leaves don't matter."""

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del batches
        return {
            path: jax.random.uniform(stream(key, path), w.shape, w.dtype)
            for path, w in view.weights.items()
        }

    return score
