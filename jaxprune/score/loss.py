"""The loss as a function of the weights, and its mean gradient over batches."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Key, Problem, PyTree, View, Weights


class ParamsLossFn(Protocol):
    def __call__(self, params: PyTree, batch: Batch) -> jax.Array:
        """Computes the mean loss of a batch, a scalar, from all parameters."""


class WeightsLossFn(Protocol):
    def __call__(self, weights: Weights, batch: Batch) -> jax.Array:
        """Computes the mean loss of a batch, a scalar, from the prunable weights."""


def mean_loss(
    problem: Problem, view: View, key: Key, *, train: bool, temperature: float = 1.0
) -> ParamsLossFn:
    """`(params, batch) -> mean loss` of all parameters; see `batch_loss`."""

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        logits, _ = problem.apply(
            params, view.model_state, batch.x, train=train, key=key if train else None
        )
        return problem.loss(logits / temperature, batch.y).mean()

    return loss


def batch_loss(
    problem: Problem, view: View, key: Key, *, train: bool, temperature: float = 1.0
) -> WeightsLossFn:
    """`(weights, batch) -> mean loss`; the logits are divided by `temperature`.

    Args:
      key: for dropout, which a train-mode forward pass may need; the same for every batch, so
        that a gradient and a Hessian are those of the same function.
      train: True scores with the batch's own statistics, False with the running ones. The
        running statistics are never changed by a score.
    """
    loss = mean_loss(problem, view, key, train=train, temperature=temperature)
    return lambda weights, batch: loss(put(view.params, weights), batch)


def mean_gradient(
    problem: Problem, view: View, key: Key, batches: Batches | None, *, train: bool
) -> Weights:
    """The gradient of the loss with respect to the masked weights, averaged over all batches.

    It is dense: where the mask is False, it is the slope of the loss if the weight came back.
    """
    gradient = jax.grad(batch_loss(problem, view, key, train=train))
    return mean_over_batches(lambda batch: gradient(view.weights, batch), batches)


def mean_over_batches(fn: Callable[[Batch], PyTree], batches: Batches | None) -> PyTree:
    """The mean of `fn(batch)` over batches, each weighted by its number of examples.

    Unrolled: a score sees few batches, and inside a `lax` loop a convolution is many times
    slower on the CPU (jax issue 12868). Compile time grows with the number of batches.
    """
    separate = split(batches)
    sizes = [batch.x.shape[0] for batch in separate]
    unequal = len(set(sizes)) > 1
    if len(separate) > 1 and isinstance(separate[0].x, jax.core.Tracer):
        fn = jax.jit(fn)  # within a trace: traced once for all batches of a size
    total = None
    for batch, size in zip(separate, sizes, strict=True):
        value = fn(batch)
        if unequal:
            value = jax.tree.map(lambda leaf, size=size: leaf * size, value)
        total = value if total is None else jax.tree.map(jnp.add, total, value)
    count = sum(sizes) if unequal else len(sizes)
    return jax.tree.map(lambda leaf: leaf / count, total)


def one_input(batches: Batches | None, what: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example, without a batch axis.

    Raises:
      PruneError: there are no batches; the message begins with `what`.
    """
    if batches is None:
        raise PruneError(f'{what} needs the shape of an input: pass batches (values unused)')
    if isinstance(batches, Batch):  # nothing is cut out only to look at its shape
        return jax.ShapeDtypeStruct(batches.x.shape[2:], batches.x.dtype)
    x = split(batches)[0].x
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def examples(batches: Batches | None, what: str) -> jax.Array:
    """Inputs of all batches, `(examples, ...)`, for measures of single examples.

    Raises:
      PruneError: there are none; the message begins with `what`.
    """
    if batches is None:
        raise PruneError(f'{what} needs data: {_PASS}')
    return jnp.concatenate([batch.x for batch in split(batches)])


def split(batches: Batches | None) -> list[Batch]:
    """The batches one by one, leaves `(batch, ...)`.

    Raises:
      PruneError: there are none.
    """
    if batches is None:
        raise PruneError(f'this needs data: {_PASS}')
    if not isinstance(batches, Batch):
        if not batches or not all(isinstance(batch, Batch) for batch in batches):
            raise PruneError('a list of batches holds a Batch for each, leaves (batch, ...)')
        return list(batches)
    return [jax.tree.map(lambda a: a[i], batches) for i in range(batches.x.shape[0])]  # noqa: B023


_PASS = 'pass batches with leaves (batches, batch, ...), or a list of batches'
