"""Decompositions of matrices, one after another on the CPU.

XLA's CPU client splits a batch of decompositions over the thread pool that runs the program, and
waits for it: with several devices (`jax_num_cpu_devices`) all threads may end up waiting, and the
program never ends (observed with jaxlib 0.10.2, from eight 100x100 QRs on). Single matrices are not
split. So here a batch, `vmap`'s included, is a loop on the CPU; elsewhere it stays a batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from jaxprune.types import PyTree


def one_by_one(
    fn: Callable[[jax.Array], PyTree], elsewhere: Callable[[jax.Array], PyTree] | None = None
) -> Callable[[jax.Array], PyTree]:
    """A function of one array that `vmap` turns into a loop on the CPU.

    Args:
      elsewhere: the same by other means, for other devices.
    """
    single = sequential_vmap(fn)

    @jax.custom_jvp
    def call(x: jax.Array) -> PyTree:
        return jax.lax.platform_dependent(x, cpu=single, default=elsewhere or fn)

    @call.defjvp
    def tangents(primals, directions):
        # The loop has no reverse mode; derivatives are those of the function itself.
        return jax.jvp(fn, primals, directions)

    return call


def _batched(
    fn: Callable[[jax.Array], PyTree], elsewhere: Callable[[jax.Array], PyTree] | None = None
) -> Callable[[jax.Array], PyTree]:
    """A function of one matrix `(m, n)` made one of `(..., m, n)`; see `one_by_one`."""
    single = one_by_one(fn, elsewhere)

    def call(matrices: jax.Array) -> PyTree:
        # There are none for half precision.
        matrices = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
        batch = matrices.shape[:-2]
        if not batch:
            return single(matrices)
        found = jax.vmap(single)(matrices.reshape(-1, *matrices.shape[-2:]))
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), found)

    return call


def _values_of_factor(a: jax.Array) -> jax.Array:
    """Singular values `(min(m, n),)` of `(m, n)`, by way of R where it is far from square.

    LAPACK does so itself. GPUs do not: a hundred matrices of 10 x 784 took them 80 times as long as
    32 steps of training. R is small, and small matrices are decomposed all at once.
    """
    tall = a if a.shape[0] >= a.shape[1] else a.T
    if tall.shape[0] >= 2 * tall.shape[1]:
        tall = jnp.linalg.qr(tall, mode='r')
    return jnp.linalg.svd(tall, compute_uv=False)


#: `(..., m, n) -> (..., min(m, n))`, falling.
singular_values = _batched(lambda a: jnp.linalg.svd(a, compute_uv=False), _values_of_factor)
#: `(..., m, n) -> (u, s, vᵀ)`, thin.
svd = _batched(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))
#: `(..., m, n) -> (q, r)`, thin.
qr = _batched(lambda a: tuple(jnp.linalg.qr(a)))
#: Symmetric `(..., n, n) -> (values, vectors)`, rising.
eigh = _batched(lambda a: tuple(jnp.linalg.eigh(a)))
#: Symmetric `(..., n, n) -> (..., n)`, rising.
eigenvalues = _batched(lambda a: jnp.linalg.eigvalsh(a))
