"""The loss as a function of the prunable weights, and its mean gradient over batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.tree import put
from jaxprune.types import Batch, Key, Problem, PyTree, View, Weights


def batch_loss(
    problem: Problem, view: View, key: Key, *, train: bool, temperature: float = 1.0
) -> Callable[[Weights, Batch], jax.Array]:
    """`(weights, batch) -> mean loss`; the logits are divided by `temperature`.

    Args:
      key: for dropout, which a train-mode forward pass may need; the same for every batch, so
        that a gradient and a Hessian speak of one function.
      train: True scores with the batch's own statistics, False with the running ones. The
        running statistics are never changed by a score.
    """

    def loss(weights: Weights, batch: Batch) -> jax.Array:
        logits, _ = problem.apply(
            put(view.frozen, weights),
            view.model_state,
            batch.x,
            train=train,
            key=key if train else None,
        )
        return problem.loss(logits / temperature, batch.y).mean()

    return loss


def mean_over_batches(fn: Callable[[Batch], PyTree], batches: Batch | None) -> PyTree:
    """The mean of `fn(batch)` over the leading axis of `batches`.

    Unrolled: a score sees few batches, and inside a `lax` loop a convolution is many times
    slower on the CPU (jax issue 12868). Compile time grows with the number of batches.
    """
    if batches is None:
        raise PruneError('this score needs data: pass batches with leaves (batches, batch, ...)')
    count = batches.x.shape[0]
    total = None
    for i in range(count):
        value = fn(jax.tree.map(lambda leaf: leaf[i], batches))  # noqa: B023 (used at once)
        total = value if total is None else jax.tree.map(jnp.add, total, value)
    return jax.tree.map(lambda leaf: leaf / count, total)
