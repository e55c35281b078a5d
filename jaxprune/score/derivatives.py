"""The gradient and the Hessian of the loss with respect to all unpruned parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arguments import positive
from jaxprune.score.loss import mean_loss, mean_over_batches
from jaxprune.tree import paths, put
from jaxprune.types import Batch, Batches, Key, Masks, Problem, View, Weights


class Derivatives(NamedTuple):
    """The parameters of a network, and the derivatives of its loss.

    Attributes:
      params: path -> value of every floating-point parameter, zero where pruned.
      gradient: path -> g, the gradient of the mean loss, zero where pruned.
      product: `vector -> H vector`, H without the rows and columns of pruned weights; vectors are
        shaped like `params`.
    """

    params: Weights
    gradient: Weights
    product: Callable[[Weights], Weights]


def parameters(view: View) -> Weights:
    """Path -> value of every floating-point parameter, prunable or not; zero where pruned."""
    found = {p: leaf for p, leaf in paths(view.params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return dict(sorted({**found, **view.weights}.items()))


def moving(masks: Masks, tree: Weights) -> Weights:
    """The tree with pruned entries set to zero; leaves without a mask are unchanged.

    Leaves may have leading axes of their own, such as the rows of a Jacobian.
    """
    return {
        path: jnp.where(masks[path], leaf, 0) if path in masks else leaf
        for path, leaf in tree.items()
    }


def dot(one: Weights, other: Weights) -> jax.Array:
    """The inner product of two vectors shaped like the parameters."""
    return sum((leaf * other[path]).sum() for path, leaf in one.items())


def derivatives(
    problem: Problem,
    key: Key,
    view: View,
    batches: Batches | None,
    *,
    train: bool,
    temperature: float = 1.0,
    weight_decay: float = 0.0,
) -> Derivatives:
    """First and second derivatives of the loss at a network.

    Both are averaged over all batches, the gradient before it enters a Hessian product, and taken
    with respect to all parameters: biases and normalisation count as well, so they have their share
    in every Hessian product (Lubana & Dick, ICLR 2021, arXiv:2009.11839, as in their code).

    Args:
      train: batch statistics, or running ones.
      temperature: the logits are divided by it.
      weight_decay: λ of an L2 term `λ/2 ‖Θ‖²` of all parameters, added to the loss.

    Raises:
      PruneError: no batches, or a temperature that is not above 0.
    """
    positive('temperature', temperature)
    loss = mean_loss(problem, view, key, train=train, temperature=temperature)
    params = parameters(view)

    def gradient(values: Weights, batch: Batch) -> Weights:
        return jax.grad(lambda v: loss(put(view.params, v), batch))(values)

    def decayed(mean: Weights, values: Weights) -> Weights:
        total = {path: leaf + weight_decay * values[path] for path, leaf in mean.items()}
        return moving(view.masks, total)

    def product(vector: Weights) -> Weights:
        vector = moving(view.masks, vector)

        def one(batch: Batch) -> Weights:
            # Forward over reverse: one product costs two to three gradients.
            return jax.jvp(lambda v: gradient(v, batch), (params,), (vector,))[1]

        return decayed(mean_over_batches(one, batches), vector)

    mean = mean_over_batches(lambda batch: gradient(params, batch), batches)
    return Derivatives(params, decayed(mean, params), product)
