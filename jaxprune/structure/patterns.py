"""Where constants make a value zero, or very negative, whatever the weights and the input.

Causal masks need this: a score of minus infinity is an attention of zero. Patterns are arrays
computed while tracing, and None where nothing is known. Only inside a loop are they traced: there
they may differ from step to step.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from jaxprune.jaxpr import bind
from jaxprune.structure.operations import KEEPS_LOW, POSITIVE
from jaxprune.structure.values import Pattern, array_of, numbers

#: Masks of attention are minus infinity, the smallest number, -1e9 or -1e4 where they shut.
LOW = -1e4
#: Scores are scaled by numbers above this; low values stay low.
_SCALE = 1e-2


def open_where(pattern: Pattern, like: jax.Array) -> jax.Array:
    """1 where a pattern is False; ones where there is none."""
    return jnp.ones_like(like) if pattern is None else 1 - jnp.asarray(pattern, like.dtype)


def at_trace(*arrays: Any) -> contextlib.AbstractContextManager:
    """Has arrays computed with at once, also while something is traced, if all have numbers."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return contextlib.nullcontext()
    return jax.ensure_compile_time_eval()


def some(patterns: Sequence[Pattern], shape, combine=jnp.logical_or) -> Pattern:
    """Patterns broadcast and combined; None is False everywhere."""
    if all(p is None for p in patterns):
        return None
    with at_trace(*patterns):
        each = [jnp.broadcast_to(False if p is None else p, shape) for p in patterns]
        return known(functools.reduce(combine, each))


def every(patterns: Sequence[Pattern], shape) -> Pattern:
    """True where all patterns are."""
    return None if any(p is None for p in patterns) else some(patterns, shape, jnp.logical_and)


def without(pattern: Pattern, other: Pattern, shape) -> Pattern:
    """True where the first pattern is and the second is not."""
    if pattern is None or other is None:
        return some([pattern], shape)
    return some([pattern, other], shape, lambda a, b: a & ~b)


def known(found: jax.Array) -> Pattern:
    """None for a pattern that is False everywhere."""
    return found if isinstance(found, jax.core.Tracer) or bool(found.any()) else None


def shut_of(value: Any, aval: Any) -> Pattern:
    """Where a value, a constant or not, is zero."""
    return _pattern(value, aval, value.shut, lambda numbers: numbers == 0)


def low_of(value: Any, aval: Any) -> Pattern:
    """Where a value is very negative."""
    return _pattern(value, aval, value.low, lambda n: n <= LOW)


def _pattern(value: Any, aval: Any, pattern: Pattern, test: Callable) -> Pattern:
    """Where a constant passes a test, or the pattern given if the numbers are not known."""
    array = array_of(value)
    if array is None:
        return pattern
    if not (jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == np.bool_):
        return None
    with at_trace(array):
        return known(jnp.asarray(test(jnp.asarray(array))))


def placed(equation: JaxprEqn, patterns: Sequence[Pattern], avals, *leading: Any) -> list[Pattern]:
    """Patterns moved by an equation that only picks among its arguments.

    Args:
      leading: arguments before those with patterns: the known choice between them.
    """
    if all(p is None for p in patterns):
        return [None] * len(equation.outvars)
    with at_trace(*patterns, *leading):
        each = [
            jnp.broadcast_to(False if p is None else p, aval.shape)
            for p, aval in zip(patterns, avals, strict=True)
        ]
        return [known(p) for p in bind(equation, *leading, *each)]


def reduced(pattern: Pattern, axes: tuple[int, ...]) -> Pattern:
    """True where a whole slice of the pattern is."""
    if pattern is None:
        return None
    with at_trace(pattern):
        return known(pattern.all(axes))


def elementwise(equation: JaxprEqn, given: Sequence[Any]) -> tuple[Pattern, Pattern]:
    """`(shut, low)` of an elementwise function."""
    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    avals = [x.aval for x in equation.invars]
    shuts = [shut_of(v, aval) for v, aval in zip(given, avals, strict=True)]
    lows = [low_of(v, aval) for v, aval in zip(given, avals, strict=True)]
    if name in POSITIVE:
        return some(lows, shape), None
    if name == 'mul':
        low = [_scaled(lows[i], given[1 - i]) for i in (0, 1)]
        return some(shuts, shape), some(low, shape)
    if name == 'and':
        return some(shuts, shape), None
    if name == 'div':
        return some(shuts[:1], shape), some([_scaled(lows[0], given[1])], shape)
    if name in ('add', 'add_any', 'sub'):
        return every(shuts, shape), _low_sum(name, given, avals, shape)
    if name == 'max':
        # The larger of something low and of zero is zero.
        zero = [every([lows[i], shuts[1 - i]], shape) for i in (0, 1)]
        return some([every(shuts, shape), *zero], shape), every(lows, shape)
    if name == 'min':
        return every(shuts, shape), some(lows, shape)
    low = some(lows, shape) if name in KEEPS_LOW else None
    unsure = [shut for v, shut in zip(given, shuts, strict=True) if numbers(v) is None]
    shut = every(unsure, shape)
    if shut is not None:
        shut = every([shut, zero_stays(equation, given)], shape)
    return shut, low


def _low_sum(name: str, given: Sequence[Any], avals, shape) -> Pattern:
    """Where a sum or a difference of two is low."""
    lows, lifts = [], []
    for i, (value, aval) in enumerate(zip(given, avals, strict=True)):
        sign = -1 if name == 'sub' and i else 1
        if array_of(value) is not None and _signed(aval):
            # A number added everywhere is a shift, not a mask.
            down = _pattern(
                value, aval, None, lambda n, s=sign: (s * n <= LOW) & (s * n > LOW).any()
            )
            lows.append(down)
            lifts.append(_pattern(value, aval, None, lambda n, s=sign: s * n >= -LOW))
        elif sign > 0:
            lows.append(value.low)
        else:
            lifts.append(value.low)  # in a row that is low as a whole no entry is below the rest
    return without(some(lows, shape), some(lifts, shape), shape)


def _scaled(low: Pattern, factor: Any) -> Pattern:
    """What is low stays so after scaling by a known positive number that is not tiny."""
    factor = numbers(factor)
    return low if factor is not None and bool((np.asarray(factor) >= _SCALE).all()) else None


def _signed(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating) or jnp.issubdtype(aval.dtype, jnp.signedinteger)


def zero_stays(equation: JaxprEqn, given: Sequence[Any]) -> jax.Array | bool:
    """Where a function of values that are zero, and of known constants, is zero."""
    if not all(numbers(v) is not None or v.shut is not None for v in given):
        return False
    with jax.ensure_compile_time_eval():
        zeros = [
            v.value if numbers(v) is not None else jnp.zeros(x.aval.shape, x.aval.dtype)
            for v, x in zip(given, equation.invars, strict=True)
        ]
        return bind(equation, *zeros)[0] == 0
