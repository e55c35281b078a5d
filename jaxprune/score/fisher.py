"""Fisher: optimal brain damage with a diagonal Fisher (LeCun et al., 1990; Theis et al., 2018)."""

import jax

from jaxprune.errors import PruneError, check_choice
from jaxprune.score.loss import batch_loss, mean_over_batches, split
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Key, Problem, ScoreFn, Scores, View

LABELS = ('data', 'model')


def fisher(problem: Problem, *, train: bool = False, labels: str = 'data') -> ScoreFn:
    """`F w² / 2`: the loss increase by removal at a minimum, F for the Hessian's diagonal.

    F is the mean over examples of the squared gradient of each example's own loss; the square of
    a batch's mean gradient would be another quantity, mostly noise near a minimum (Theis et al.,
    2018, arXiv:1801.05787, eq. 6; LeCun, Denker & Solla, 1990).

    One batch holds the gradients of all its examples in memory: examples times weights. Many
    small batches score the same as few large ones, and convolutions run grouped by example.

    Args:
      train: must be False: the batch statistics of one example are meaningless.
      labels: 'data' for the labels given (the empirical Fisher), 'model' for labels drawn from
        the network's own softmax, one per example (an estimate of the true Fisher of a
        cross-entropy).

    Raises:
      PruneError: train mode, or other labels.
    """
    if train:
        raise PruneError(
            'fisher takes the gradient of single examples, whose batch statistics mean nothing: '
            'score with train=False'
        )
    check_choice('labels', labels, LABELS)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        gradient = jax.grad(batch_loss(problem, view, key, train=False))

        def squares(batch: Batch) -> Scores:
            singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
            per_example = jax.vmap(gradient, in_axes=(None, 0))(view.weights, singles)
            return {path: (g**2).mean(0) for path, g in per_example.items()}

        if labels == 'model':
            batches = _own_labels(problem, view, key, batches)
        mean = mean_over_batches(squares, batches)
        return {path: mean[path] * w**2 / 2 for path, w in view.weights.items()}

    return score


def _own_labels(problem: Problem, view: View, key: Key, batches: Batches | None) -> list[Batch]:
    """The same inputs with labels drawn from the network's softmax."""
    params = put(view.params, view.weights)
    drawn: list[Batch] = []
    for i, batch in enumerate(split(batches)):
        logits, _ = problem.apply(params, view.model_state, batch.x, train=False, key=None)
        labels = jax.random.categorical(jax.random.fold_in(key, i), logits)
        drawn.append(batch._replace(y=labels))
    return drawn
