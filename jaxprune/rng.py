"""Keys by purpose: what a run draws depends on who it is, never on where it sits in a chunk."""

import zlib

import jax

from jaxprune.types import Key


def run_key(seed: int) -> Key:
    """The root key of a run. Runs with equal seeds share initialisation and data order."""
    return jax.random.key(seed)


def stream(key: Key, purpose: str) -> Key:
    """An independent key for one purpose ('init', 'data', 'augment', 'score', 'prune', ...).

    Fold an epoch or step into the result where the purpose recurs.
    """
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)


def words(key: Key) -> jax.Array:
    """A key as numbers that a state can hold; `jax.random.wrap_key_data` makes a key of them.

    A key of another generator than JAX's default one becomes one of the default.
    """
    default = jax.random.key(0)
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):  # as `jax.random.PRNGKey` makes
        key = jax.random.wrap_key_data(key)
    if key.dtype != default.dtype:
        key = jax.random.key(jax.random.bits(key))
    return jax.random.key_data(key)
