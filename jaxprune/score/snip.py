"""SNIP: connection sensitivity (Lee, Ajanthan & Torr, ICLR 2019, arXiv:1810.02340)."""

import jax.numpy as jnp

from jaxprune.score.loss import mean_gradient
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def snip(problem: Problem, *, train: bool) -> ScoreFn:
    """`|w * dL/dw|`, the effect of each mask entry on the loss (eq. 6).

    The gradient is averaged over all scoring data before the absolute value is taken, as in
    every published implementation; the common normaliser is left out, it changes no ranking.
    Pruned weights score 0; repeated over rounds this is Iter-SNIP (de Jorge et al., ICLR 2021,
    arXiv:2006.09081).

    Args:
      train: batch normalisation by the batch (True) or by running statistics (False: the
        original, which at initialisation means no normalisation).
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        mean = mean_gradient(problem, view, key, batches, train=train)
        return {path: jnp.abs(w * mean[path]) for path, w in view.weights.items()}

    return score
