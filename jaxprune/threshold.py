"""Finds thresholds by counting: exactly k integers lie at or above each. All searches share a loop.

Each pass counts the values at or above a guess. Sizes of weights take some ten to twenty passes.
Ties and negative scores can take more, at most `_GUESSES` and the bits of a float. Under `vmap`
each pass is one reduction over all runs. A GPU has another way, see `threshold_on_gpu`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Bracket(NamedTuple):
    """Two thresholds with the wanted one between them.

    Attributes:
      low, high: integers of one type; low < high, or equal where the threshold is found.
      above_low: how many values are at least `low`: as many as wanted, or more.
      above_high: how many are at least `high`: fewer than wanted, or as many.
    """

    low: jax.Array
    high: jax.Array
    above_low: jax.Array
    above_high: jax.Array


class Search(NamedTuple):
    """What is searched.

    Attributes:
      values: padded integers, see `padded`.
      k: how many are wanted above the threshold, int32.
      bracket: what is known.
    """

    values: jax.Array
    k: jax.Array
    bracket: Bracket


def ordered(floats: jax.Array) -> jax.Array:
    """Signed integers in the order of the floats, single or double; -0.0 equals +0.0."""
    signed = jnp.dtype(f'int{floats.dtype.itemsize * 8}')
    bits = jax.lax.bitcast_convert_type(floats, signed)
    return jnp.where(bits < 0, -(bits & np.iinfo(signed).max), bits)


def lowest(values: jax.Array) -> int:
    """An integer below `ordered` of every float of this width."""
    return int(np.iinfo(f'int{values.dtype.itemsize * 8}').min)


#: Values that are counted together in one byte: several times as fast on a CPU.
_TOGETHER = 16


def padded(values: jax.Array, value: int) -> jax.Array:
    """Pads the values to a multiple of `_TOGETHER`, unless there are no more than that."""
    missing = -values.size % _TOGETHER if values.size > _TOGETHER else 0
    return jnp.pad(values, (0, missing), constant_values=value)


def _by_few(values: jax.Array) -> jax.Array:
    """Padded values in rows that are counted together."""
    return values.reshape(-1, min(values.size, _TOGETHER) or 1)


def _count_from(values: jax.Array, threshold: ArrayLike) -> jax.Array:
    """How many of padded values are at least the threshold."""
    return (_by_few(values) >= threshold).sum(1, dtype=jnp.int8).sum(dtype=jnp.int32)


def around(values: jax.Array, k: jax.Array) -> Search:
    """A search that begins at 0, as scores are rarely negative.

    k is lowered to the number of values above the lowest of their type.

    Args:
      values: padded; the lowest of their type is below every threshold.
      k: int32.
    """
    least = lowest(values)
    above, positive = _count_from(values, least + 1), _count_from(values, 0)
    k = jnp.minimum(k, above)
    # In two steps, which is faster on a CPU.
    largest = _by_few(values).max(1).max(initial=least)
    rarely = positive < k
    bracket = Bracket(
        jnp.where(rarely, least + 1, 0).astype(values.dtype),
        jnp.where(rarely, 0, jnp.maximum(largest, 0) + 1).astype(values.dtype),
        jnp.where(rarely, above, positive),
        # 0, made of the arguments: inside `shard_map` a constant carry has another type.
        jnp.where(rarely, positive, k - k),
    )
    return Search(values, k, bracket)


#: Passes that interpolate. Later ones halve the bracket, so that a search always ends.
_GUESSES = 16


class _Way(NamedTuple):
    """A search under way.

    Attributes:
      bracket: so far.
      over, under: how far the ends are from k, float32; an end that stays for a second pass counts
        half as far.
      side: which end moved last, 1 for the low one, -1 for the high one.
      passes: so far; each search has its own, as inside `shard_map` they may differ in type.
    """

    bracket: Bracket
    over: jax.Array
    under: jax.Array
    side: jax.Array
    passes: jax.Array


def narrowed(searches: Mapping[str, Search]) -> dict[str, Bracket]:
    """The brackets at the end: both ends are one threshold with exactly k values at or above it.

    Where ties rule that out, the bracket has length 1, with more than k values at or above its low
    end and fewer at or above its high end.

    The Illinois method (Dowell & Jarratt 1971): the next guess is where a straight line between
    both ends says k.
    """

    def begun(search: Search) -> _Way:
        b, k = search.bracket, search.k
        over, under = (n.astype(jnp.float32) for n in (b.above_low - k, k - b.above_high))
        return _Way(b, over, under, k - k, k - k)

    def go_on(ways: dict[str, _Way]) -> jax.Array:
        return jnp.stack([is_open(searches[n], way.bracket) for n, way in ways.items()]).any()

    def refine(ways: dict[str, _Way]) -> dict[str, _Way]:
        return {name: _pass(searches[name], way) for name, way in ways.items()}

    start = {name: begun(search) for name, search in searches.items()}
    ways = jax.lax.while_loop(go_on, refine, start)
    return {name: closed(way.bracket, searches[name].k) for name, way in ways.items()}


def _length(bracket: Bracket) -> jax.Array:
    unsigned = f'uint{bracket.low.dtype.itemsize * 8}'
    # The subtraction may wrap; the cast to unsigned undoes it.
    return (bracket.high - bracket.low).astype(unsigned)


def is_open(search: Search, b: Bracket) -> jax.Array:
    """Has the search not ended?"""
    return (b.above_low != search.k) & (b.above_high != search.k) & (_length(b) > 1)


def _pass(search: Search, way: _Way) -> _Way:
    """A search after one more pass; one that has ended stays."""
    b, over, under, side, passes = way
    going = is_open(search, b)
    length = _length(b)
    guess = (length.astype(jnp.float32) * (over / (over + under))).astype(length.dtype)
    guess = jnp.where(passes < _GUESSES, guess, length // 2)
    guess = b.low + jnp.clip(guess, 1, length - 1).astype(b.low.dtype)
    count = _count_from(search.values, guess)
    more = count >= search.k
    off = jnp.abs(count - search.k).astype(jnp.float32)
    new = _Way(
        Bracket(
            jnp.where(more, guess, b.low),
            jnp.where(more, b.high, guess),
            jnp.where(more, count, b.above_low),
            jnp.where(more, b.above_high, count),
        ),
        jnp.where(more, off, jnp.where(side < 0, over / 2, over)),
        jnp.where(more, jnp.where(side > 0, under / 2, under), off),
        jnp.where(more, 1, -1).astype(side.dtype),
        passes + 1,
    )
    return jax.tree.map(lambda n, o: jnp.where(going, n, o), new, way)


def closed(b: Bracket, k: jax.Array) -> Bracket:
    """Both ends at the one that has exactly k at or above it, if one has."""
    at_low, at_high = b.above_low == k, b.above_high == k
    return Bracket(
        jnp.where(at_high & ~at_low, b.high, b.low),
        jnp.where(at_low & ~at_high, b.low, b.high),
        jnp.where(at_high, k, b.above_low),
        jnp.where(at_low, k, b.above_high),
    )
