"""What operations do to axes: which indices of the results belong to which of the operands.

Products and indexing are in `axis_products`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from jaxprune.jaxpr import EquationRule, Unknown, bind
from jaxprune.structure import axis_products
from jaxprune.structure.labelled import (
    NONE,
    Labelled,
    Part,
    Reading,
    made_of,
    movable,
    note_role,
    opened,
    part,
    parts,
    place,
)
from jaxprune.structure.operations import (
    CUMULATIVE,
    MADE,
    NARY,
    ODD,
    PASSED_ON,
    REDUCTIONS,
    UNARY,
    WINDOWS,
)
from jaxprune.structure.units import Axis, divided, fix, fixed, found, merged, picked, unite

Handler = Callable[[Reading, JaxprEqn, list[Labelled]], list[Labelled]]
#: Known arrays that are larger are not computed.
LARGEST = 2**14


def axis_rule(reading: Reading) -> EquationRule:
    """The rule for `interpret` that carries a `Labelled` for every array."""

    def rule(equation: JaxprEqn, values: list[Labelled]) -> Sequence[Labelled]:
        name = equation.primitive.name
        if name in PASSED_ON:
            return values
        for names, handler in HANDLERS:
            if name in names:
                out = handler(reading, equation, values)
                known = _computed(equation, values)
                if known is None:
                    return out
                return [v._replace(number=k) for v, k in zip(out, known, strict=True)]
        raise Unknown('which indices it keeps together is not known')

    return rule


def _computed(equation: JaxprEqn, values: Sequence[Labelled]) -> list[np.ndarray] | None:
    """The results of an operation on known numbers: indices that a function computes."""
    if any(v.number is None for v in values) or equation.primitive.name == 'dim_as_value':
        return None
    outs = [var.aval for var in equation.outvars]
    if not all(_small(aval.shape) for aval in outs):
        return None
    if any(jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended) for aval in outs):
        return None
    if any(aval.shape and aval.dtype.kind not in 'iub' for aval in outs):
        return None  # numbers with a fraction index nothing
    with jax.ensure_compile_time_eval():
        return [np.asarray(o) for o in bind(equation, *(v.number for v in values))]


def _small(shape: Sequence[Any]) -> bool:
    """Has an array few numbers? Unknown where `jax.export` leaves a size open."""
    return all(isinstance(n, int) for n in shape) and math.prod(shape) <= LARGEST


def _given(values: Sequence[Labelled]) -> bool:
    return all(v.given for v in values)


# --- elementwise --------------------------------------------------------------------------------


def _stays_zero(equation: JaxprEqn, values: Sequence[Labelled], zeros: Sequence[bool]) -> bool:
    """Is the result zero where these operands are, whatever the others are?"""
    name = equation.primitive.name
    numbers = [
        float(v.number)
        if v.number is not None and np.isrealobj(v.number) and not v.number.ndim
        else None
        for v in values
    ]
    if name in ('mul', 'and'):
        return any(zeros)
    if name in ('div', 'rem'):
        return zeros[0]
    if name in ('add', 'sub', 'add_any', 'or', 'xor', 'complex'):
        return all(zeros)
    if name in ('max', 'min'):
        sign = 1 if name == 'max' else -1
        others = [
            z or (n is not None and sign * n <= 0) for z, n in zip(zeros, numbers, strict=True)
        ]
        return any(zeros) and all(others)
    if name == 'pow':
        return zeros[0] and numbers[1] is not None and numbers[1] > 0
    if name == 'select_n':
        return all(zeros[1:])
    if name == 'clamp':
        low, _, high = numbers
        return zeros[1] and low is not None and high is not None and low <= 0 <= high
    if name == 'integer_pow':
        return zeros[0] and equation.params['y'] > 0
    return name in ODD | {'conj'} and zeros[0]


def _all_zero(value: Labelled) -> bool:
    return value.number is not None and not value.number.any()


def _elementwise(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    shape, given = equation.outvars[0].aval.shape, _given(values)
    whole = [v for v in values if len(v.axes) == len(shape)]  # the others are scalars
    if not shape or not whole:
        return [opened(shape, given) for _ in equation.outvars]
    made, reason = [], place(equation)
    for i, size in enumerate(shape):
        # An axis of length 1 is repeated along the others.
        axes = [v.axes[i] for v in whole if v.axes[i].size == size]
        for value in whole:
            if value.axes[i].size != size:
                fix(reading.units, value.axes[i], f'repeated by {reason}')
        axis = functools.reduce(lambda a, b: unite(reading.units, a, b, reason), axes)
        zeros = [len(v.axes) == len(shape) and v.axes[i].size == size and v.zero[i] for v in values]
        zeros = [z or _all_zero(v) for z, v in zip(zeros, values, strict=True)]
        sources = frozenset().union(*(v.sources[i] for v in whole if v.axes[i].size == size))
        if not given:
            note_role(reading, sources, 'along')
        made.append((axis, _stays_zero(equation, values, zeros), sources if given else NONE))
    still = len(values) == 1 and equation.primitive.name in ('convert_element_type', 'copy')
    summed = values[0].summed if still else ()
    return [made_of(made, given)._replace(summed=summed) for _ in equation.outvars]


# --- moving -------------------------------------------------------------------------------------


def _broadcast(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    value, shape = values[0], equation.outvars[0].aval.shape
    made: list[Part] = [(Axis(n), _all_zero(value), NONE) for n in shape]
    for i, dim in enumerate(equation.params['broadcast_dimensions']):
        if value.axes[i].size == shape[dim]:
            made[dim] = part(value, i)
        else:
            fix(reading.units, value.axes[i], f'repeated by {place(equation)}')
    return [made_of(made, value.given)._replace(summed=value.summed)]


def _transpose(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value] = values
    return [made_of([part(value, i) for i in equation.params['permutation']], value.given)]


def _squeeze(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value] = values
    gone = {d % len(value.axes) for d in equation.params['dimensions']}
    for i in gone:
        fix(reading.units, value.axes[i], f'a single index, taken by {place(equation)}')
    return [made_of([p for i, p in enumerate(parts(value)) if i not in gone], value.given)]


def _rev(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    made = parts(values[0])
    for i in equation.params['dimensions']:
        axis, *rest = made[i]
        made[i] = (picked(reading.units, axis, slice(None, None, -1)), *rest)
    return [made_of(made, values[0].given)]


def _slice(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value], params = values, equation.params
    steps = params['strides'] or (1,) * len(value.axes)
    made = parts(value)
    bounds = zip(params['start_indices'], params['limit_indices'], steps, strict=True)
    for i, (start, limit, step) in enumerate(bounds):
        axis, *rest = made[i]
        if (start, limit, step) != (0, axis.size, 1):
            made[i] = (picked(reading.units, axis, slice(start, limit, step)), *rest)
    return [made_of(made, value.given)]


def _split(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value], dim, out, start = values, equation.params['axis'], [], 0
    for size in equation.params['sizes']:
        made = parts(value)
        axis, *rest = made[dim]
        made[dim] = (picked(reading.units, axis, slice(start, start + size)), *rest)
        out.append(made_of(made, value.given))
        start += size
    return out


def _concatenate(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    dim, reason, made = equation.params['dimension'], place(equation), []
    for i in range(len(values[0].axes)):
        zero = all(v.zero[i] for v in values)
        sources = frozenset().union(*(v.sources[i] for v in values))
        axes = [v.axes[i] for v in values]
        if i == dim:
            axis = _joined(reading, axes)
        else:
            axis = functools.reduce(lambda a, b: unite(reading.units, a, b, reason), axes)
        made.append((axis, zero, sources))
    return [made_of(made, _given(values))]


def _stack(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    dim, reason, made = equation.params['axis'], place(equation), []
    for i in range(len(values[0].axes)):
        axes = [v.axes[i] for v in values]
        axis = functools.reduce(lambda a, b: unite(reading.units, a, b, reason), axes)
        sources = frozenset().union(*(v.sources[i] for v in values))
        made.append((axis, all(v.zero[i] for v in values), sources))
    made.insert(dim, (Axis(len(values)), False, NONE))
    return [made_of(made, _given(values))]


def _unstack(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value], dim = values, equation.params['axis']
    fix(reading.units, value.axes[dim], f'taken apart by {place(equation)}')
    rest = [p for i, p in enumerate(parts(value)) if i != dim]
    return [made_of(rest, value.given) for _ in equation.outvars]


def _tile(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    made = parts(values[0])
    for i, times in enumerate(equation.params['reps']):
        axis, *rest = made[i]
        if times != 1:
            made[i] = (picked(reading.units, axis, np.tile(np.arange(axis.size), times)), *rest)
    return [made_of(made, values[0].given)]


def _joined(reading: Reading, axes: Sequence[Axis]) -> Axis:
    """Axes one after the other."""
    axes = [found(a) for a in axes]
    if all(a.fixed for a in axes):
        return fixed(sum(a.size for a in axes), axes[0].fixed)
    units = np.concatenate([movable(reading, a) for a in axes])
    return Axis(len(units), units)


def _pad(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    value, filler = values
    zero = filler.number is not None and not filler.number.any()
    made = []
    for i, (low, high, inside) in enumerate(equation.params['padding_config']):
        axis, was, sources = part(value, i)
        axis = found(axis)
        if (low, high, inside) != (0, 0, 0):
            size = equation.outvars[0].aval.shape[i]
            if axis.fixed or inside or low < 0 or high < 0:
                reason = f'padded by {place(equation)}'
                fix(reading.units, axis, reason)
                axis = fixed(size, axis.fixed or reason)
            else:
                # What is added is constant: it may go with whatever it meets.
                new, middle = reading.units.new, movable(reading, axis)
                axis = Axis(size, np.concatenate([new(low), middle, new(high)]))
            sources = NONE
        made.append((axis, was and zero, sources))
    return [made_of(made, _given(values))]


def _reshape(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value], shape = values, equation.outvars[0].aval.shape
    if (order := equation.params.get('dimensions')) is not None:  # transposed first
        value = made_of([part(value, i) for i in order], value.given)
    before = [a.size for a in value.axes]
    if 0 in before:  # it has no entries
        return [opened(shape, value.given, True)]
    for axis in value.axes:
        if axis.size == 1:  # it may be lost
            fix(reading.units, axis, f'a single index, taken by {place(equation)}')
    made: list[Part] = [(Axis(1), False, NONE)] * len(shape)
    for old, new in blocks(before, shape):
        if len(old) == len(new) == 1:
            made[new[0]] = part(value, old[0])
            continue
        # Zero at an index that goes: whichever of the old axes it goes with.
        zero = all(value.zero[i] or not reading.goes(value.axes[i]) for i in old)
        sources = frozenset().union(*(value.sources[i] for i in old))
        axis = merged(reading.units, [value.axes[i] for i in old])
        axes = divided(reading.units, axis, [shape[i] for i in new], place(equation))
        for i, one in zip(new, axes, strict=True):
            made[i] = (one, zero, sources)
    return [made_of(made, value.given)._replace(summed=value.summed)]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest sets of axes that become each other in a reshape, without axes of size 1."""
    old = [i for i, n in enumerate(before) if n != 1]
    new = [i for i, n in enumerate(after) if n != 1]
    made = []
    while old or new:
        ours, theirs = [old.pop(0)], [new.pop(0)]
        mine, other = before[ours[0]], after[theirs[0]]
        while mine != other:
            if mine < other:
                ours.append(old.pop(0))
                mine *= before[ours[-1]]
            else:
                theirs.append(new.pop(0))
                other *= after[theirs[-1]]
        made.append((ours, theirs))
    return made


# --- sums ---------------------------------------------------------------------------------------


def _reduce(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    gone = set(equation.params['axes'])
    sums = equation.primitive.name in ('reduce_sum', 'reduce_max', 'reduce_min')
    for value in values:
        for i in gone:
            if not (reading.sliced and sums):
                fix(
                    reading.units, value.axes[i], f'normalised or reduced over by {place(equation)}'
                )
    [value, *_] = values
    silent = sums or equation.primitive.name == 'reduce_prod'
    silent = silent and all(value.axes[i].size != 0 for i in gone)
    rest = [
        (axis, zero and silent, sources)
        for i, (axis, zero, sources) in enumerate(parts(value))
        if i not in gone
    ]
    over = equation.primitive.name == 'reduce_sum' and tuple(value.axes[i] for i in sorted(gone))
    return [made_of(rest, _given(values))._replace(summed=over or ()) for _ in equation.outvars]


def _cumulative(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    [value] = values
    fix(reading.units, value.axes[equation.params['axis']], f'summed along by {place(equation)}')
    if equation.primitive.name == 'cumlogsumexp':  # of zeros is not zero
        value = value._replace(zero=(False,) * len(value.axes))
    return [value._replace(number=None, summed=())]


def _sort(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    """Sorts and the like: the last axis, or that of `dimension`, is put in another order."""
    reason = f'sorted by {place(equation)}'
    dim = equation.params.get('dimension', equation.params.get('axis', -1)) % len(values[0].axes)
    for value in values:
        fix(reading.units, value.axes[dim], reason)
        for one, other in zip(value.axes, values[0].axes, strict=True):
            unite(reading.units, one, other, reason)
    out = []
    for i, var in enumerate(equation.outvars):
        # The places of the best are numbers of their own; else rows are put in another order.
        made = [
            (axis, zero and i < len(values), NONE)
            for axis, zero, _ in parts(values[i % len(values)])
        ]
        made[dim] = (fixed(var.aval.shape[dim], reason), False, NONE)
        out.append(made_of(made, _given(values)))
    return out


def _windows(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    params, value = equation.params, values[0]
    size, reason = params['window_dimensions'], f'pooled by {place(equation)}'
    # A window that holds nothing but padding is infinite, not zero.
    inside = all(max(pads) < n or n == 1 for pads, n in zip(params['padding'], size, strict=True))
    keeps = equation.primitive.name in WINDOWS - {'reduce_window'} and inside
    made = []
    for i, n in enumerate(equation.outvars[0].aval.shape):
        axis, zero, sources = part(value, i)
        others = ('window_strides', 'base_dilation', 'window_dilation')
        moved = any((params.get(k) or (1,) * len(size))[i] != 1 for k in others)
        if size[i] != 1 or moved or tuple(params['padding'][i]) != (0, 0):
            fix(reading.units, axis, reason)
            axis = fixed(n, reason)
        made.append((axis, zero and keeps, sources if value.given else NONE))
    return [made_of(made, _given(values)) for _ in equation.outvars]


# --- sources ------------------------------------------------------------------------------------


def _source(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    """Numbers that nothing else makes: every index may go."""
    return [opened(var.aval.shape, _given(values)) for var in equation.outvars]


HANDLERS: list[tuple[frozenset[str], Handler]] = [
    (UNARY | NARY | {'select_n', 'complex', 'conj'}, _elementwise),
    (frozenset({'broadcast_in_dim'}), _broadcast),
    (frozenset({'transpose'}), _transpose),
    (frozenset({'squeeze'}), _squeeze),
    (frozenset({'rev'}), _rev),
    (frozenset({'slice'}), _slice),
    (frozenset({'split'}), _split),
    (frozenset({'concatenate'}), _concatenate),
    (frozenset({'stack'}), _stack),
    (frozenset({'unstack'}), _unstack),
    (frozenset({'tile'}), _tile),
    (frozenset({'pad'}), _pad),
    (frozenset({'reshape'}), _reshape),
    (REDUCTIONS, _reduce),
    (CUMULATIVE, _cumulative),
    (frozenset({'sort', 'top_k'}), _sort),
    (WINDOWS, _windows),
    (MADE, _source),
    *axis_products.HANDLERS,
]
