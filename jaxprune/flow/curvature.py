"""Curvature of the loss: along the gradient, at the top of the spectrum, on average, as a density.

The Hessian is with respect to all parameters, without rows and columns of pruned weights. Its
products are forward over reverse and cost two to three gradients each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arguments import least
from jaxprune.flow.krylov import first, ritz
from jaxprune.flow.measure import MeasureFn
from jaxprune.rng import stream
from jaxprune.score.derivatives import derivatives, dot, moving, parameters
from jaxprune.score.group_sums import check_groups, grouped
from jaxprune.types import Batches, Key, Problem, View, Weights


def gradient_curvature(
    problem: Problem, *, by: str = 'network', train: bool = True, axis: int = -1
) -> MeasureFn[dict[str, jax.Array]]:
    """`(key, view, batches) -> gᵀHg`, the whole at the path '*', or the share of each group.

    Under gradient flow `d‖g‖²/dt = -2 gᵀHg` and `d²L/dt² = 2 gᵀHg`.
    """
    check_groups(by)

    def measure(key: Key, view: View, batches: Batches | None) -> dict[str, jax.Array]:
        at = derivatives(problem, key, view, batches, train=train)
        bent = at.product(at.gradient)
        return grouped({p: leaf * bent[p] for p, leaf in at.gradient.items()}, by, axis)

    return measure


def hessian_eigenvalues(
    problem: Problem, *, count: int = 1, steps: int = 20, train: bool = True
) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> (count,)`, the largest eigenvalues, falling.

    Lanczos: the outer eigenvalues converge first, from below. Multiple eigenvalues are found once;
    NaN where there are fewer distinct ones.

    Args:
      steps: Hessian products; as many copies of the parameters are held in memory.
    """
    least(1, steps=steps, count=count)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        at = derivatives(problem, key, view, batches, train=train)
        return first(ritz(at.product, _normal(key, view), max(steps, count)).values, count)

    return measure


def hessian_trace(
    problem: Problem, *, probes: int = 10, train: bool = True
) -> MeasureFn[jax.Array]:
    """`(key, view, batches) -> tr H`, a scalar, estimated by Hutchinson's `E vᵀHv`, v of signs.

    Unbiased, with a standard deviation of `sqrt(2 Σ_(i≠j) H_ij² / probes)`.
    """
    least(1, probes=probes)

    def measure(key: Key, view: View, batches: Batches | None) -> jax.Array:
        at = derivatives(problem, key, view, batches, train=train)

        def one(probe: Key) -> jax.Array:
            v = moving(view.masks, like(jax.random.rademacher, probe, at.params))
            return dot(v, at.product(v))

        return jax.lax.map(one, jax.random.split(stream(key, 'probe'), probes)).mean()

    return measure


class Density(NamedTuple):
    """A spectral density as weighted points.

    Attributes:
      values: eigenvalues `(probes, steps)`, NaN where the weight is zero.
      weights: `(probes, steps)`; they add up to 1.
    """

    values: jax.Array
    weights: jax.Array


def spectral_density(
    problem: Problem, *, steps: int = 40, probes: int = 4, train: bool = True
) -> MeasureFn[Density]:
    """`(key, view, batches) -> Density` of the Hessian: stochastic Lanczos quadrature.

    Its k-th moment estimates `tr Hᵏ / n` for k < 2 `steps`, n the number of unpruned parameters
    (Ghorbani, Krishnan & Xiao, ICML 2019, arXiv:1901.10159). Draw it with `smoothed`.
    """
    least(1, steps=steps, probes=probes)

    def measure(key: Key, view: View, batches: Batches | None) -> Density:
        at = derivatives(problem, key, view, batches, train=train)

        def one(probe: Key):
            return ritz(at.product, _normal(probe, view), steps)

        found = jax.lax.map(one, jax.random.split(stream(key, 'probe'), probes))
        return Density(found.values, found.weights / probes)

    return measure


def smoothed(density: Density, at: jax.Array, width: float) -> jax.Array:
    """The density at some eigenvalues: a sum of Gaussians, one per point, of this width."""
    values = jnp.where(density.weights > 0, density.values, 0).reshape(-1, 1)
    kernel = jnp.exp(-(((at - values) / width) ** 2) / 2) / (width * jnp.sqrt(2 * jnp.pi))
    return (density.weights.reshape(-1, 1) * kernel).sum(0)


def like(draw, key: Key, params: Weights) -> Weights:
    """A random vector shaped like the parameters, a key for each path."""
    keys = jax.random.split(key, len(params))
    return {
        path: draw(own, leaf.shape, leaf.dtype)
        for own, (path, leaf) in zip(keys, sorted(params.items()), strict=True)
    }


def _normal(key: Key, view: View) -> Weights:
    return moving(view.masks, like(jax.random.normal, stream(key, 'start'), parameters(view)))
