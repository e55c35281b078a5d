"""GraSP: keep the gradient flow (Wang, Zhang & Grosse, ICLR 2020, arXiv:2002.07376)."""

import jax

from jaxprune.arguments import positive
from jaxprune.score.derivatives import moving
from jaxprune.score.loss import batch_loss, mean_over_batches
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def grasp(problem: Problem, *, train: bool, temperature: float = 200.0) -> ScoreFn:
    """`w * (H g)`, signed, high = keep: removing w changes ‖g‖²/2 by `-w (H g)` to first order.

    The paper's own score is the negative of this, and it removes the largest. Gradient and
    Hessian are those of the loss of `logits / temperature` with respect to the prunable
    weights in force only: what is pruned has no gradient. The gradient is averaged over all
    batches before the Hessian product: mean(H_b g_b) would be another quantity.

    Args:
      train: batch normalisation by the batch (True, the original) or by running statistics.
      temperature: 200 as published; 1 for the plain loss.

    Raises:
      PruneError: a temperature that is not above 0.
    """
    positive('temperature of grasp', temperature)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        loss = batch_loss(problem, view, key, train=train, temperature=temperature)

        def gradient(weights, batch):
            return jax.grad(loss)(weights, batch)

        mean = mean_over_batches(lambda batch: gradient(view.weights, batch), batches)
        mean = moving(view.masks, mean)

        def hessian_gradient(batch):
            # Forward over reverse: one product costs two to three gradients.
            return jax.jvp(lambda w: gradient(w, batch), (view.weights,), (mean,))[1]

        product = mean_over_batches(hessian_gradient, batches)
        return {path: w * product[path] for path, w in view.weights.items()}

    return score
