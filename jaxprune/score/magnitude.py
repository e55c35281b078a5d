"""Magnitude: the absolute value of each weight. The smallest complete score, a template."""

import jax.numpy as jnp

from jaxprune.types import Batches, Key, ScoreFn, Scores, View


def magnitude() -> ScoreFn:
    """`|w|`. Global at initialisation it mostly compares the layers' initial scales."""

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key, batches
        return {path: jnp.abs(w) for path, w in view.weights.items()}

    return score
