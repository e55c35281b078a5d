"""Spectra of matrices of which only products with vectors are available: Lanczos by matfree."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from matfree import decomp

from jaxprune import linalg
from jaxprune.types import PyTree


class Ritz(NamedTuple):
    """Approximate eigenvalues of a symmetric matrix, from a Krylov space of one start vector.

    Attributes:
      values: `(steps,)`, falling; the outermost approximate eigenvalues. NaN, at the end, where the
        space was exhausted before: the start has no part in further eigenvectors.
      weights: `(steps,)`, the squared part of the start along each: with `values`, weights and
        nodes of a quadrature of the spectral density; they add up to 1.
    """

    values: jax.Array
    weights: jax.Array


def ritz(product: Callable[[PyTree], PyTree], start: PyTree, steps: int) -> Ritz:
    """Lanczos with full reorthogonalisation, which holds `steps` vectors like `start` in memory.

    Args:
      product: `v -> A v`, A symmetric.
      start: any vector; eigenvectors orthogonal to it are never found, such as those of pruned
        weights where it is zero.
      steps: number of products; at most the number of entries.
    """
    steps = min(steps, sum(leaf.size for leaf in jax.tree.leaves(start)))
    flat, shaped = ravel_pytree(start)
    # Hessenberg rather than tridiagonal: only its subdiagonal shows when the space is exhausted.
    matrix = decomp.hessenberg(steps, reortho='full', custom_vjp=False)
    found = matrix(lambda v: ravel_pytree(product(shaped(v)))[0], flat)
    diagonal, off = jnp.diagonal(found.J_small), jnp.diagonal(found.J_small, -1)
    # Once the space is exhausted, the next vector is rounding errors, or NaN: it is cut off.
    largest = jax.lax.cummax(jnp.maximum(jnp.abs(diagonal[:-1]), jnp.abs(off)))
    before = jnp.concatenate([jnp.zeros(1, largest.dtype), largest[:-1]])
    size = jnp.maximum(jnp.abs(diagonal[:-1]), before)
    goes_on = jnp.abs(off) > size * jnp.finfo(flat.dtype).eps * 10 * max(steps, 10)
    alive = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on) > 0])
    off = jnp.where(alive[1:], off, 0)
    diagonal = jnp.where(alive, diagonal, 0)
    values, vectors = linalg.eigh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    inside = (vectors**2 * alive[:, None]).sum(0) > 0.5
    values = jnp.where(inside, values, jnp.nan)
    order = jnp.argsort(-values)  # NaN last
    return Ritz(values[order], jnp.where(inside, vectors[0] ** 2, 0)[order])


def first(values: jax.Array, count: int) -> jax.Array:
    """The first `count` entries, NaN where there are fewer."""
    missing = max(count - values.shape[0], 0)
    return jnp.concatenate([values[:count], jnp.full(missing, jnp.nan, values.dtype)])
