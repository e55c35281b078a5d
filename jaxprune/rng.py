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
