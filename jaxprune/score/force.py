"""FORCE: foresight connection sensitivity (de Jorge et al., ICLR 2021, arXiv:2006.09081)."""

import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.score.loss import mean_gradient
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def force(problem: Problem, *, train: bool) -> ScoreFn:
    """`|θ0 * dL/dw|` at the pruned network `w = m θ0`, for every entry of the dense `θ0`.

    The gradient is taken where the network is now and is not masked, so a pruned weight has a
    score and can come back: select with `monotone=False`. In the first round, at `w = θ0`, it is
    SNIP. Code that differentiates SNIP with respect to the mask (Synaptic-Flow) iterates this
    score too.

    Args:
      train: batch normalisation by the batch (True: the original code, which never leaves the
        training mode) or by running statistics.

    Raises:
      PruneError: when scoring, where the view holds no initial weights.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        if view.initial is None:
            raise PruneError(
                'FORCE scores the dense initial weights: the pruner must keep them (view.initial)'
            )
        mean = mean_gradient(problem, view, key, batches, train=train)
        return {path: jnp.abs(w * mean[path]) for path, w in view.initial.items()}

    return score
