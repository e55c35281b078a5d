"""Taylor: first-order importance (Molchanov et al., CVPR 2019, arXiv:1906.10771)."""

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.score.loss import batch_loss, mean_over_batches
from jaxprune.types import Batch, Batches, Key, Problem, ScoreFn, Scores, View


def taylor(problem: Problem, *, train: bool, power: int = 1) -> ScoreFn:
    """The mean over minibatches of `|w * dL_b/dw|**power`.

    To first order the change of each minibatch's loss when the weight is removed. What one batch
    gains and the next loses counts twice here and cancels in `snip`; for one batch and `power` 1
    the two agree.

    Args:
      train: batch normalisation by the batch (True) or by running statistics.
      power: 1, or 2 for the squared change of the paper (eq. 8, per weight).

    Raises:
      PruneError: another power.
    """
    if power not in (1, 2):
        raise PruneError(f'taylor takes the power 1 or 2, not {power}')

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        gradient = jax.grad(batch_loss(problem, view, key, train=train))

        def change(batch: Batch) -> Scores:
            g = gradient(view.weights, batch)
            return {path: jnp.abs(w * g[path]) ** power for path, w in view.weights.items()}

        return mean_over_batches(change, batches)

    return score
