"""The effect of each operation on paths: the rules by which `connectivity` reads a network.

The docstring of `structure.connectivity` describes it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from jaxprune.jaxpr import EquationRule, Unknown, bind
from jaxprune.structure import patterns
from jaxprune.structure.operations import (
    ARITHMETIC,
    CUMULATIVE,
    JOINS,
    MOVES,
    NARY,
    OF_STATISTICS,
    PASSED_ON,
    POSITIVE,
    REDUCTIONS,
    RUN_TIME,
    SAME,
    UNARY,
    WHOLE,
    WINDOWS,
)
from jaxprune.structure.patterns import low_of, open_where, shut_of
from jaxprune.structure.values import Const, Signal, Weight, named, numbers

#: Larger constants are not computed, to save memory; a causal mask of 8192 tokens is as large.
_LARGEST = 2**26


@jax.custom_vjp
def binarise(x: jax.Array) -> jax.Array:
    """1 where x > 0, else 0; backwards the same of the cotangent.

    Counts are whole numbers, and some devices round those of a convolution.
    """
    return (x > 0.5).astype(x.dtype)


binarise.defvjp(lambda x: (binarise(x), None), lambda _, ct: ((ct > 0.5).astype(ct.dtype),))


def liveness(roots: itertools.count) -> EquationRule:
    """The rule for `interpret` that carries `Const`, `Weight` and `Signal` values.

    Args:
      roots: gives every new tensor its number.
    """

    def rule(equation: JaxprEqn, given: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        signals = [v for v in given if isinstance(v, Signal)]
        weights = [v for v in given if isinstance(v, Weight)]
        if not signals and not weights:
            return _constants(equation, given)
        if name in RUN_TIME:
            raise Unknown(
                'what it does is known only when it runs; choose in Python, and write a loop of '
                'known length as a scan'
            )
        if name in PASSED_ON:
            return given
        if not equation.outvars:  # prints and the like
            return []
        if signals:
            _refuse_mixed(name, given)
        if name in ('dot_general', 'conv_general_dilated'):
            return [_product(equation, *given, roots)]
        if name == 'gather' and signals:
            return [_gather(equation, *given, roots)]
        if not signals:
            return _rearranged(equation, given, weights)
        if weights:
            return [_with_weight(equation, given, signals, weights, roots)]
        if name in UNARY or name in NARY:
            return [_elementwise(equation, given, signals, roots)]
        if name in MOVES:
            return _moved(equation, signals[0], roots)
        if name in JOINS:
            return [_joined(equation, given, roots)]
        if name in REDUCTIONS:
            return [_reduced(equation, signals[0], roots)]
        if name in CUMULATIVE:
            total = lax.cumsum(signals[0].live, equation.params['axis'], equation.params['reverse'])
            return [Signal(binarise(total), next(roots))]
        if name in WINDOWS and len(signals) == 1:
            return [_windowed(equation, signals[0], roots)]
        if name == 'select_n':
            return [_select(equation, given, roots)]
        if name in ('dynamic_slice', 'dynamic_update_slice'):
            return [_sliced(equation, given, roots)]
        raise Unknown('its effect on paths from input to output is not known')

    return rule


def _refuse_mixed(name: str, given: Sequence[Any]) -> None:
    """Weights that were first combined with other numbers are not weights of a path."""
    mixed = [leaf for v in given if isinstance(v, Const) for leaf in v.mixed]
    if mixed and name in ('dot_general', 'conv_general_dilated', 'mul', 'div', 'gather'):
        raise Unknown(
            f'{named(tuple(mixed))} is mixed with other numbers before it meets the input; leave '
            'it out of the prunable leaves'
        )


# --- constants and weights ----------------------------------------------------------------------


def _constants(equation: JaxprEqn, given: Sequence[Const]) -> list[Const]:
    """Values that depend on no input; computed where all arguments are known."""
    name, outs = equation.primitive.name, len(equation.outvars)
    size = sum(math.prod(getattr(v.aval, 'shape', ())) for v in equation.outvars)
    if all(v.value is not None for v in given) and size <= _LARGEST and not equation.effects:
        with patterns.at_trace(*[v.value for v in given]):
            return [Const(v) for v in bind(equation, *[v.value for v in given])]
    mixed = tuple(dict.fromkeys(leaf for v in given for leaf in v.mixed))
    shuts, lows = [None] * outs, [None] * outs
    avals = [x.aval for x in equation.invars]
    if name in MOVES:
        shuts = patterns.placed(equation, [given[0].shut], avals)
        lows = patterns.placed(equation, [given[0].low], avals)
    elif name in UNARY or name in NARY:
        shut, low = patterns.elementwise(equation, given)
        shuts, lows = [shut], [low]
    elif name == 'select_n':
        shut, low = _chosen(equation, given)
        shuts, lows = [shut], [low]
    source = given[0].source if name in MOVES and len(given) == 1 else None
    return [
        Const(source=source, mixed=mixed, shut=shut, low=low)
        for shut, low in zip(shuts, lows, strict=True)
    ]


def _fit(live: jax.Array, equation: JaxprEqn) -> jax.Array:
    return jnp.broadcast_to(live, equation.outvars[0].aval.shape)


def _factor(value: Any, aval: Any) -> jax.Array:
    """Where a value is not zero as a factor: 1 there, else 0."""
    if isinstance(value, Signal):
        return value.live
    if isinstance(value, Weight):
        return value.kept
    return open_where(shut_of(value, aval), jnp.ones(aval.shape, jnp.float32))


def _rearranged(equation: JaxprEqn, given: list[Any], weights: list[Weight]) -> list[Any]:
    """Weights among themselves and constants, before any input meets them."""
    name, first = equation.primitive.name, weights[0]
    constants = [v for v in given if isinstance(v, Const)]
    leaves = tuple(dict.fromkeys(leaf for w in weights for leaf in w.leaves))
    factors = [_factor(v, x.aval) for v, x in zip(given, equation.invars, strict=True)]
    if name in MOVES and len(given) == 1:
        return [Weight(kept, leaves) for kept in bind(equation, first.kept)]
    if name in SAME or name in ('neg', 'abs'):
        return [first]
    scaled = name == 'mul' or (name == 'div' and given[0] is first)
    if scaled and len(weights) == 1 and not constants[0].mixed:
        kept = math.prod(factors) if name == 'mul' else first.kept
        return [Weight(_fit(kept, equation), leaves)]
    if name in ('dynamic_slice', 'gather') and all(v.value is not None for v in constants):
        (kept,) = bind(equation, first.kept, *[v.value for v in constants])
        return [Weight(kept, leaves)]
    if name in JOINS:
        return [Weight(kept, leaves) for kept in bind(equation, *factors)]
    if name == 'select_n' and isinstance(given[0], Const) and given[0].value is not None:
        (kept,) = bind(equation, given[0].value, *factors[1:])
        return [Weight(kept, leaves)]
    raise Unknown(
        f'paths through {named(leaves)} after it are not known; leave it out of the prunable leaves'
    )


def _with_weight(
    equation: JaxprEqn,
    given: list[Any],
    signals: list[Signal],
    weights: list[Weight],
    roots: itertools.count,
) -> Signal:
    """A signal and a weight meet entry by entry."""
    if equation.primitive.name == 'mul':
        return Signal(binarise(_fit(signals[0].live * weights[0].kept, equation)), next(roots))
    raise Unknown(
        f'{named(weights[0].leaves)} is not multiplied with the input, so no path runs through it; '
        'leave it out of the prunable leaves',
    )


# --- products -----------------------------------------------------------------------------------


def _product(equation: JaxprEqn, a: Any, b: Any, roots: itertools.count) -> Any:
    """A matrix product or a convolution: live where some pair of live factors meets."""
    pair = (a, b)
    signals = [v for v in pair if isinstance(v, Signal)]
    if not signals:
        weights = [v for v in pair if isinstance(v, Weight)]
        if len(weights) == 2:
            both = ' and '.join(named(w.leaves) for w in weights)
            raise Unknown(
                f'the prunable leaves {both} are multiplied with each other: which is a path?'
            )
        other = next(v for v in pair if isinstance(v, Const))
        if (first := numbers(other)) is not None and not np.asarray(first).any():
            out = equation.outvars[0].aval  # such as the first state of a recurrent network
            return Const(np.zeros(out.shape, out.dtype))
        # No input reaches it, so no path is lost yet; as a factor of a signal it is refused.
        return Const(mixed=(*weights[0].leaves, *other.mixed))
    params = {**equation.params, 'preferred_element_type': None}

    def product(left, right):
        return equation.primitive.bind(left, right, **params)

    left, right = (_factor(v, x.aval) for v, x in zip(pair, equation.invars, strict=True))
    if len(signals) < 2:
        live = product(left, right)
    elif a.open != b.open:  # attention: the mixing is open, what it mixes need not be
        live = product(_opened(a), right) if a.open else product(left, _opened(b))
    else:
        live = product(left, open_where(b.shut, right)) + product(open_where(a.shut, left), right)
    return Signal(binarise(live), next(roots))


def _opened(signal: Signal) -> jax.Array:
    """1 where an open factor is not shut; backwards the cotangent itself, for it may matter."""
    return lax.stop_gradient(open_where(signal.shut, signal.live) - signal.live) + signal.live


# --- elementwise functions ----------------------------------------------------------------------


def _elementwise(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> Signal:
    """Functions of one or several arguments, entry by entry."""
    name = equation.primitive.name
    if len(signals) == 2 and (normalised := _normalised(equation, *signals)) is not None:
        return normalised
    shut, low = patterns.elementwise(equation, given)
    live = _live(equation, given)
    return Signal(
        live if len(signals) == 1 else binarise(live),
        _root(equation, given, signals, roots),
        of=_of(name, signals),
        inverse=_inverse(equation, given),
        open=_open(name, given, signals),
        shut=shut,
        low=low,
    )


def _live(equation: JaxprEqn, given: list[Any]) -> jax.Array:
    """The sum of the liveness of the arguments, each where the others do not close it."""
    name = equation.primitive.name
    avals = [x.aval for x in equation.invars]
    parts = []
    for i, value in enumerate(given):
        if not isinstance(value, Signal):
            continue
        live = _fit(value.live, equation)
        closing = []  # patterns of the other argument under which this one does not matter
        if name in ('mul', 'and') or (name == 'div' and i == 1):
            closing = [shut_of(given[1 - i], avals[1 - i])]
        elif name in POSITIVE:
            closing = [value.low]
        elif name == 'max' and value.low is not None:
            other = low_of(given[1 - i], avals[1 - i])
            closing = [patterns.without(value.low, other, live.shape)]
        closed = patterns.some(closing, live.shape)
        parts.append(live if closed is None else live * open_where(closed, live))
    return sum(parts)


def _normalised(equation: JaxprEqn, a: Signal, b: Signal) -> Signal | None:
    """A tensor minus, divided by, or times the inverse of, a statistic of its own."""
    name = equation.primitive.name
    for whole, statistic in ((a, b), (b, a)):
        minus = name == 'sub' and statistic is b
        over = name == 'div' and statistic is b and not statistic.inverse
        if whole.root in statistic.of and (minus or over or (name == 'mul' and statistic.inverse)):
            shut, low = patterns.elementwise(equation, [a, b])
            live = _fit(whole.live, equation)
            kept = whole.open and statistic.open and not minus
            return whole._replace(live=live, open=kept, shut=shut, low=low)
    return None


def _root(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> int:
    """The number of the tensor; a new one where other entries are live than before."""
    first = signals[0]
    if any(signal is not first for signal in signals):
        return next(roots)
    if equation.primitive.name in ('mul', 'and'):
        constants = [
            shut_of(v, x.aval)
            for v, x in zip(given, equation.invars, strict=True)
            if isinstance(v, Const)
        ]
        if any(shut is not None for shut in constants):
            return next(roots)
    # What `exp` loses of a masked tensor is masked in its statistics as well.
    return first.root


def _of(name: str, signals: list[Signal]) -> frozenset[int]:
    if name not in OF_STATISTICS and name not in ARITHMETIC:
        return frozenset()
    return signals[0].of if len({s.of for s in signals}) == 1 else frozenset()


def _inverse(equation: JaxprEqn, given: list[Any]) -> bool:
    """Is a statistic now one to scale by? See `Signal.inverse`."""
    name, first = equation.primitive.name, given[0]
    before = [v.inverse for v in given if isinstance(v, Signal)]
    if len(before) > 1:
        return name == 'mul' and all(before)
    turned = (
        name == 'rsqrt'
        or (name == 'integer_pow' and equation.params['y'] < 0)
        or (name == 'div' and isinstance(first, Const))
        or (name == 'pow' and isinstance(first, Signal) and _negative(given[1]))
    )
    return before[0] != turned


def _negative(value: Any) -> bool:
    return (power := numbers(value)) is not None and bool((np.asarray(power) < 0).all())


def _open(name: str, given: list[Any], signals: list[Signal]) -> bool:
    if name in POSITIVE:
        return True
    if len(given) == 1:
        return signals[0].open and name in SAME
    if not all(signal.open for signal in signals):
        return False
    if len(signals) == 1:
        return name in ('mul', 'div')
    return name in ('add', 'mul', 'div', 'max', 'min')


# --- everything else ----------------------------------------------------------------------------


def _moved(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> list[Signal]:
    outs = bind(equation, signal.live)
    avals = [equation.invars[0].aval]
    shuts = patterns.placed(equation, [signal.shut], avals)
    lows = patterns.placed(equation, [signal.low], avals)
    if equation.primitive.name in WHOLE:
        return [signal._replace(live=outs[0], shut=shuts[0], low=lows[0])]
    return [
        # Turned about, a statistic is still one of the same tensor.
        Signal(
            live,
            next(roots),
            signal.of,
            signal.inverse,
            open=signal.open,
            shut=shut,
            low=low,
        )
        for live, shut, low in zip(outs, shuts, lows, strict=True)
    ]


def _live_or_dead(value: Any, aval: Any) -> jax.Array:
    return value.live if isinstance(value, Signal) else jnp.zeros(aval.shape, jnp.float32)


def _joined(equation: JaxprEqn, given: list[Any], roots: itertools.count) -> Signal:
    avals = [x.aval for x in equation.invars]
    pairs = list(zip(given, avals, strict=True))
    (live,) = bind(equation, *[_live_or_dead(v, aval) for v, aval in pairs])
    shut = patterns.placed(equation, [shut_of(v, aval) for v, aval in pairs], avals)[0]
    low = patterns.placed(equation, [low_of(v, aval) for v, aval in pairs], avals)[0]
    return Signal(live, next(roots), shut=shut, low=low)


def _reduced(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> Signal:
    axes = tuple(equation.params['axes'])
    # Of these a slice is zero, or low, if all of it is.
    sums = equation.primitive.name in ('reduce_sum', 'reduce_max', 'reduce_min')
    return Signal(
        binarise(signal.live.sum(axis=axes)),
        next(roots),
        of=signal.of | {signal.root},
        open=signal.open and sums,
        shut=patterns.reduced(signal.shut, axes) if sums else None,
        low=patterns.reduced(signal.low, axes) if sums else None,
    )


def _windowed(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> Signal:
    names = ('window_dimensions', 'window_strides', 'padding', 'base_dilation', 'window_dilation')
    windows = {name: tuple(equation.params[name]) for name in names}
    return Signal(binarise(lax.reduce_window_sum_p.bind(signal.live, **windows)), next(roots))


def _sliced(equation: JaxprEqn, given: list[Any], roots: itertools.count) -> Signal:
    arrays = 1 if equation.primitive.name == 'dynamic_slice' else 2
    starts = given[arrays:]
    if not all(isinstance(v, Const) and v.value is not None for v in starts):
        raise Unknown('its position is known only when it runs')
    parts = [
        _live_or_dead(v, x.aval) for v, x in zip(given[:arrays], equation.invars, strict=False)
    ]
    (live,) = bind(equation, *parts, *[v.value for v in starts])
    return Signal(live, next(roots))


def _chosen(equation: JaxprEqn, given: Sequence[Any]) -> tuple[Any, Any]:
    """`(shut, low)` of a choice."""
    choice, cases = given[0], given[1:]
    avals = [x.aval for x in equation.invars[1:]]
    shape = equation.outvars[0].aval.shape
    found = []
    for where in (shut_of, low_of):
        each = [where(v, aval) for v, aval in zip(cases, avals, strict=True)]
        if isinstance(choice, Const) and choice.value is not None:
            found.append(patterns.placed(equation, each, avals, choice.value)[0])
            continue
        first = patterns.every([choice.shut, each[0]], shape)  # where the choice is known
        found.append(patterns.some([first, patterns.every(each, shape)], shape))
    return found[0], found[1]


def _select(equation: JaxprEqn, given: list[Any], roots: itertools.count) -> Signal:
    choice, cases = given[0], given[1:]
    avals = [x.aval for x in equation.invars[1:]]
    lives = [_fit(_live_or_dead(v, a), equation) for v, a in zip(cases, avals, strict=True)]
    signals = [v for v in cases if isinstance(v, Signal)]
    positive = bool(signals) and all(v.open for v in signals)
    shut, low = _chosen(equation, given)
    if isinstance(choice, Const) and choice.value is not None:
        only = _same_everywhere(choice)
        if only is not None and isinstance(cases[only], Signal):
            return cases[only]
        (live,) = bind(equation, choice.value, *lives)
        return Signal(live, next(roots), open=positive, shut=shut, low=low)
    live = sum(lives)
    if isinstance(choice, Signal):
        live = live + _fit(choice.live, equation)
    if choice.shut is not None:  # the first case, for sure
        unknown = open_where(choice.shut, live)
        live = lives[0] * (1 - unknown) + live * unknown
    of = signals[0].of if len({s.of for s in signals}) == 1 else frozenset()
    return Signal(binarise(live), next(roots), of, open=positive, shut=shut, low=low)


def _same_everywhere(choice: Const) -> int | None:
    """The one case that a known choice takes, if it is one everywhere."""
    array = numbers(choice)
    found = () if array is None else np.unique(array)
    return int(found[0]) if len(found) == 1 else None


def _gather(equation: JaxprEqn, operand: Any, indices: Any, roots: itertools.count) -> Any:
    """Indexing: by known places, or an embedding looked up by the input."""
    params = equation.params
    if isinstance(indices, Const) and indices.value is not None and isinstance(operand, Signal):
        filled = {**params, 'fill_value': 0}
        return Signal(equation.primitive.bind(operand.live, indices.value, **filled), next(roots))
    if isinstance(indices, Signal) and isinstance(operand, Const):
        reached = binarise(indices.live.sum())  # a table of constants, indexed by the input
        return Signal(jnp.broadcast_to(reached, equation.outvars[0].aval.shape), next(roots))
    if isinstance(indices, Signal) and isinstance(operand, Weight):
        dims, table = params['dimension_numbers'], operand.kept
        rows_of_axis_0 = (
            tuple(dims.start_index_map) == (0,)
            and tuple(dims.collapsed_slice_dims) == (0,)
            and tuple(params['slice_sizes'])[1:] == table.shape[1:]
        )
        if rows_of_axis_0:
            # Any row may be asked for: an entry of the embedding is live if some row keeps it.
            any_row = binarise(table.sum(axis=0)) * binarise(indices.live.sum())
            shape = equation.outvars[0].aval.shape
            return Signal(
                binarise(lax.broadcast_in_dim(any_row, shape, tuple(dims.offset_dims))),
                next(roots),
            )
    raise Unknown('only indexing by known places and embedding look-ups are supported')
