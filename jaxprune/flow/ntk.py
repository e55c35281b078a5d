"""The neural tangent kernel: how training on one output changes the others.

Jacot, Gabriel & Hongler, NeurIPS 2018, arXiv:1806.07572. `K = J Jᵀ` with the Jacobian of outputs
with respect to all unpruned parameters: of a masked network, `J(m Θ) diag(m)`. The network is in
evaluation mode; batch statistics would couple the examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import linalg
from jaxprune.arguments import least
from jaxprune.errors import check_choice
from jaxprune.flow.krylov import ritz
from jaxprune.flow.measure import MeasureFn
from jaxprune.rng import stream
from jaxprune.score.derivatives import moving, parameters
from jaxprune.score.loss import examples
from jaxprune.tree import put
from jaxprune.types import Batches, Key, Problem, View, Weights

OUTPUTS = ('logits', 'sum')
_WHAT = 'a tangent kernel'


def tangent_kernel(problem: Problem, *, outputs: str = 'logits') -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> K`, of all examples of all batches.

    Use it for few examples: it holds the Jacobian in memory, rows of K times parameters.

    Args:
      outputs: 'logits' gives `(examples * classes)²` entries, row `example * classes + class`;
        'sum' the kernel of the sum of the logits, `(examples, examples)`: cheap, and as informative
        where classes behave alike.
    """
    _check(outputs)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        del key
        params, inputs = parameters(view), examples(batches, _WHAT)

        def one(x: jax.Array) -> Weights:
            f = _outputs(problem, view, x[None], outputs)
            return moving(view.masks, jax.jacrev(f)(params))

        # One after another: under a further `vmap` over runs, convolutions would be grouped twice,
        # for which XLA has no rule under a mesh.
        jacobian = jax.lax.map(one, inputs)
        with jax.default_matmul_precision('highest'):
            rows = (leaf.reshape(-1, params[path].size) for path, leaf in jacobian.items())
            return sum(leaf @ leaf.T for leaf in rows)

    return measure


class KernelSpectrum(NamedTuple):
    """A summary of the eigenvalues of a kernel.

    Attributes:
      trace: the sum of the eigenvalues.
      largest: the largest.
      condition: largest over smallest; in float32 values above 1e6 are not meaningful.
      effective_rank: `(tr K)² / tr K²`, between 1 and the number of rows.
    """

    trace: jax.Array
    largest: jax.Array
    condition: jax.Array
    effective_rank: jax.Array


def kernel_spectrum(kernel: jax.Array) -> KernelSpectrum:
    """The summary of a symmetric matrix `(n, n)` without negative eigenvalues.

    A smallest eigenvalue that rounding made zero or negative gives an infinite condition.
    """
    values = linalg.eigenvalues(kernel)
    trace, smallest, largest = jnp.trace(kernel), values[0], values[-1]
    condition = jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf)
    return KernelSpectrum(trace, largest, condition, trace**2 / (kernel**2).sum())


def kernel_distance(one: jax.Array, other: jax.Array) -> jax.Array:
    """`1 - <K, K'> / (‖K‖ ‖K'‖)`: 0 for kernels that differ by a factor (Fort et al., NeurIPS
    2020, arXiv:2010.15110)."""
    scale = jnp.linalg.norm(one) * jnp.linalg.norm(other)
    # The halved squared difference of the normalised kernels: exact near zero.
    difference = one / jnp.linalg.norm(one) - other / jnp.linalg.norm(other)
    return jnp.where(scale > 0, (difference**2).sum() / 2, jnp.nan)


def ntk_largest(
    problem: Problem, *, steps: int = 20, outputs: str = 'logits'
) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> ` largest eigenvalue, by Lanczos on `u -> J (Jᵀ u)`.

    One vector-Jacobian and one Jacobian-vector product per step, and no Jacobian in memory.
    """
    _check(outputs)
    least(1, steps=steps)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        params, f = parameters(view), _outputs(problem, view, examples(batches, _WHAT), outputs)
        value, forward = jax.linearize(f, params)
        back = jax.linear_transpose(forward, params)

        def product(u: jax.Array) -> jax.Array:
            return forward(moving(view.masks, back(u)[0]))

        start = jax.random.normal(stream(key, 'start'), value.shape, value.dtype)
        return ritz(product, start, steps).values[0]

    return measure


def ntk_trace(
    problem: Problem, *, probes: int = 0, outputs: str = 'logits'
) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> tr K = ‖J‖²`, the sum of squared gradients of all outputs.

    Args:
      probes: 0 for the exact sum, one backward pass per class; else Hutchinson's estimate from this
        many random sign vectors, one backward pass each: `E ‖Jᵀ v‖²`.
    """
    _check(outputs)
    least(0, probes=probes)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        params, inputs = parameters(view), examples(batches, _WHAT)

        def squares(tree: Weights) -> jax.Array:
            return sum((leaf**2).sum() for leaf in moving(view.masks, tree).values())

        if not probes:

            def one(x: jax.Array) -> jax.Array:
                return squares(jax.jacrev(_outputs(problem, view, x[None], outputs))(params))

            return jax.lax.map(one, inputs, batch_size=16).sum()
        value, back = jax.vjp(_outputs(problem, view, inputs, outputs), params)
        draws = jax.random.split(stream(key, 'probe'), probes)

        def estimate(probe: Key) -> jax.Array:
            signs = jax.random.rademacher(probe, value.shape, value.dtype)
            return squares(back(signs)[0])

        return jax.lax.map(estimate, draws).mean()

    return measure


def _outputs(
    problem: Problem, view: View, x: jax.Array, outputs: str
) -> Callable[[Weights], jax.Array]:
    """`params -> ` all outputs at some inputs, flat."""

    def f(params: Weights) -> jax.Array:
        logits, _ = problem.apply(
            put(view.params, params), view.model_state, x, train=False, key=None
        )
        logits = logits.reshape(x.shape[0], -1)
        return (logits.sum(1) if outputs == 'sum' else logits).reshape(-1)

    return f


def _check(outputs: str) -> None:
    check_choice('outputs', outputs, OUTPUTS)
