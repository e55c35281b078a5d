"""Finds the thresholds of `threshold` on a GPU, four bits in a pass; elsewhere as described there.

On a GPU, a pass over a small network takes the time of its launches, however many guesses it counts
at. And the host waits in each pass of a loop whose end only the device knows. So each pass counts
at fifteen guesses, and the number of passes is fixed: eight for single precision, sixteen for
double.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.threshold import Bracket, Search, closed, is_open, lowest, narrowed

#: Bits of a threshold that a pass finds.
_BITS = 4


def thresholds(searches: Mapping[str, Search]) -> dict[str, Bracket]:
    """The brackets that `narrowed` finds."""

    def by_digits(searches: dict[str, Search]) -> dict[str, Bracket]:
        found = {}
        for name, low in _digits(searches).items():
            values, k, _ = searches[name]
            counts = _counts_from(values, jnp.stack([low, low + 1]))
            found[name] = closed(Bracket(low, low + 1, *counts), k)
        return found

    return _on_gpu(by_digits, narrowed, searches)


def low_ends(searches: Mapping[str, Search]) -> dict[str, jax.Array]:
    """The low ends that `narrowed` finds; for searches that mostly end before they begin."""

    def by_digits(searches: dict[str, Search]) -> dict[str, jax.Array]:
        lows = _digits(searches, rare=True)
        return {
            name: jnp.where(is_open(s, s.bracket), lows[name], closed(s.bracket, s.k).low)
            for name, s in searches.items()
        }

    def by_guesses(searches: dict[str, Search]) -> dict[str, jax.Array]:
        return {name: bracket.low for name, bracket in narrowed(searches).items()}

    return _on_gpu(by_digits, by_guesses, searches)


def _on_gpu(fn: Callable, elsewhere: Callable, searches: Mapping[str, Search]) -> Any:
    """What a function makes of searches on a GPU, and another one elsewhere."""
    if not searches:
        return {}
    return jax.lax.platform_dependent(dict(searches), cuda=fn, rocm=fn, default=elsewhere)


def _digits(searches: Mapping[str, Search], rare: bool = False) -> dict[str, jax.Array]:
    """The largest integer of each search that has k values at or above it, or one where k is 0.

    Args:
      rare: no pass is made where no bracket is open; the integers then say nothing.
    """
    # Made of the arguments, see `around`.
    starts = {n: s.bracket.low * 0 + lowest(s.values) for n, s in searches.items()}
    # Searches of one type share their arrays, which saves launches.
    alike: dict[Any, list[str]] = {}
    for name, start in starts.items():
        alike.setdefault(jax.typeof(start), []).append(name)
    found = {}
    for names in alike.values():
        own = [searches[name] for name in names]
        lows = _digits_of_a_type(own, jnp.stack([starts[name] for name in names]), rare)
        found.update(zip(names, lows, strict=True))
    return found


def _digits_of_a_type(searches: Sequence[Search], start: jax.Array, rare: bool) -> jax.Array:
    """`_digits` of searches of one type, from `start` on, an integer each."""
    k = jnp.stack([search.k for search in searches])
    passes = 8 * start.dtype.itemsize // _BITS

    def refine(number: jax.Array, low: jax.Array) -> jax.Array:
        shift = (_BITS * (passes - 1 - number)).astype(low.dtype)
        guesses = low[:, None] + (jnp.arange(1, 2**_BITS, dtype=low.dtype) << shift)
        rows = zip(searches, guesses, strict=True)
        count = jnp.stack([_counts_from(search.values, row) for search, row in rows])
        enough = count >= jnp.maximum(k, 1)[:, None]
        return low + (enough.sum(1, dtype=low.dtype) << shift)

    going = jnp.stack([is_open(search, search.bracket) for search in searches]).any()
    first = jnp.where(going, 0, passes) if rare else 0
    return jax.lax.fori_loop(first, passes, refine, start)


def _counts_from(values: jax.Array, guesses: jax.Array) -> jax.Array:
    """How many of the values are at least each guess."""
    # XLA fuses this on a GPU: it reads each value once, and stores no comparisons.
    return (values[:, None] >= guesses).sum(0, dtype=jnp.int32)
