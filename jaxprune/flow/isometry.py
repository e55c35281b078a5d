"""Dynamical isometry: the singular values of the Jacobian from inputs to logits.

Saxe, McClelland & Ganguli, ICLR 2014, arXiv:1312.6120; of pruned networks: Lee et al., ICLR 2020,
arXiv:1906.06307; Wang et al., arXiv:2105.05916. Evaluation mode: with batch statistics an example
has no Jacobian of its own. Matrix products at full precision: seven in a row would lose the third
digit on hardware that rounds them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import linalg
from jaxprune.arguments import least
from jaxprune.flow.krylov import first, ritz
from jaxprune.flow.measure import MeasureFn
from jaxprune.rng import stream
from jaxprune.score.loss import examples
from jaxprune.tree import put
from jaxprune.types import Batches, Key, Problem, View, Weights


def jacobian(problem: Problem) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> (examples, classes, inputs)`: `∂ logits / ∂ x`, one per example."""

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        del key
        inputs = examples(batches, 'a Jacobian')
        with jax.default_matmul_precision('highest'):
            found = jax.vmap(jax.jacrev(_logits(problem, view)))(inputs)
        return found.reshape(inputs.shape[0], -1, inputs[0].size)

    return measure


def jacobian_singular_values(problem: Problem) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> (examples, min(classes, inputs))`, all of them, falling.

    One backward pass per class, and a decomposition per example. A masked network has the values of
    the network with the pruned units removed.
    """
    measured = jacobian(problem)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        return linalg.singular_values(measured(key, view, batches))

    return measure


def largest_jacobian_singular_values(
    problem: Problem, *, count: int = 1, steps: int = 20
) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> (examples, count)`, falling, for networks with many outputs.

    Lanczos on `J Jᵀ`, with products by J and Jᵀ only. It squares the values, so those below `1e-3`
    of the largest are lost in float32. A repeated value is found once, and missing ones are NaN:
    near isometry, where values are almost equal, take as many steps as there are outputs.

    Args:
      steps: products; from as many as there are outputs on, all values are computed exactly.
    """
    least(1, count=count, steps=steps)
    every = jacobian_singular_values(problem)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        f, inputs = _logits(problem, view), examples(batches, 'a Jacobian')
        if max(steps, count) >= jax.eval_shape(f, inputs[0]).size:
            return jax.vmap(lambda values: first(values, count))(every(key, view, batches))

        def one(x: jax.Array) -> jax.Array:
            logits, forward = jax.linearize(f, x)
            back = jax.linear_transpose(forward, x)

            def product(u: jax.Array) -> jax.Array:
                return forward(*back(u))

            start = jax.random.normal(stream(key, 'start'), logits.shape, logits.dtype)
            squares = first(ritz(product, start, max(steps, count)).values, count)
            return jnp.sqrt(jnp.maximum(squares, 0))

        with jax.default_matmul_precision('highest'):
            return jax.lax.map(one, inputs)

    return measure


class Isometry(NamedTuple):
    """Singular values of Jacobians in a few numbers, as Wang et al. log them.

    Attributes:
      mean: mean of all values of all examples (mean JSV); 1 under dynamical isometry.
      std: their standard deviation.
      largest: the largest of them.
      smallest: the smallest of them.
      condition: largest over smallest of each example, averaged; examples whose Jacobian is zero
        do not count. In float32 a lost direction leaves a value of about 1e-7 of the largest, so a
        condition above 1e6 only means that one is lost.
      deviation: the mean of `(s - 1)²`.
    """

    mean: jax.Array
    std: jax.Array
    largest: jax.Array
    smallest: jax.Array
    condition: jax.Array
    deviation: jax.Array


def isometry_of(values: jax.Array) -> Isometry:
    """Summarises singular values `(examples, n)`."""
    ratio = values.max(-1) / values.min(-1)
    return Isometry(
        mean=values.mean(),
        std=values.std(),
        largest=values.max(),
        smallest=values.min(),
        condition=jnp.nanmean(ratio),
        deviation=((values - 1) ** 2).mean(),
    )


def kernel_singular_values(view: View) -> Weights:
    """Path -> singular values `(min(inputs, outputs),)` of each masked kernel, falling.

    Kernels are flattened to `(everything else, outputs)`. For a dense layer these are the values of
    the layer's linear map; for a convolution they are not, see `conv_singular_values`.
    """
    return {
        path: linalg.singular_values(w.reshape(-1, w.shape[-1])) for path, w in view.weights.items()
    }


def _logits(problem: Problem, view: View) -> Callable[[jax.Array], jax.Array]:
    """`x -> logits` of one example."""
    params = put(view.params, view.weights)

    def f(x: jax.Array) -> jax.Array:
        logits, _ = problem.apply(params, view.model_state, x[None], train=False, key=None)
        return logits.reshape(-1)

    return f
