"""The squared gradient: GraSP-It, a greedy proxy of GraSP (arXiv:2006.09081, appendix)."""

from jaxprune.score.loss import mean_gradient
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def gradient_norm(problem: Problem, *, train: bool) -> ScoreFn:
    """`(dL/dw)^2`: keeps the entries that make up most of `‖g‖²`, without a Hessian.

    The gradient is averaged over all scoring data before it is squared. Pruned weights have a
    score as well; a monotone pruner, as published, never takes them back. Unlike `|w g|` the
    score changes when a layer is rescaled: a smaller scale has the larger gradient.

    Args:
      train: batch normalisation by the batch (True: the original code, which never leaves the
        training mode) or by running statistics.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        mean = mean_gradient(problem, view, key, batches, train=train)
        return {path: mean[path] ** 2 for path in view.weights}

    return score
