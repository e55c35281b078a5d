"""What products and indexing do to axes; the other operations are in `axis_rules`."""

import numpy as np
from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

from jaxprune.jaxpr import Unknown
from jaxprune.structure.labelled import (
    NONE,
    Labelled,
    Part,
    Reading,
    made_of,
    note_role,
    part,
    parts,
    place,
)
from jaxprune.structure.units import Axis, divided, fix, fixed, picked, unite

#: They write, or add and so on, into places of an array.
SCATTERS = frozenset(
    {'scatter', 'scatter-add', 'scatter-sub', 'scatter-mul', 'scatter-min', 'scatter-max'}
    | {'scatter_add', 'scatter_sub', 'scatter_mul', 'scatter_min', 'scatter_max'}
)

# --- products -----------------------------------------------------------------------------------


def _meet(
    reading: Reading, equation: JaxprEqn, one: Labelled, i: int, other: Labelled, j: int
) -> None:
    """Two axes that are multiplied and summed over."""
    reason = place(equation)
    for value, k, partner in ((one, i, other), (other, j, one)):
        if value.given and not partner.given:
            note_role(reading, value.sources[k], 'in')
    if one.given and other.given:  # a kernel of low rank: one factor makes what the other reads
        note_role(reading, one.sources[i], 'out' if other.sources[j] else 'in')
        note_role(reading, other.sources[j], 'in')
    axis = unite(reading.units, one.axes[i], other.axes[j], reason)
    if not (one.zero[i] or other.zero[j]) and reading.goes(axis):
        reading.heard(axis, f'summed over, not being zero, by {reason}')


def _free(reading: Reading, value: Labelled, i: int, other: Labelled, role: str = 'out') -> Part:
    """An axis of a factor that the product still has."""
    axis, zero, sources = part(value, i)
    if other.given:
        return axis, zero, sources
    note_role(reading, sources, role)
    return axis, zero, NONE


def _dot(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    left, right = values
    (contract_l, contract_r), (batch_l, batch_r) = equation.params['dimension_numbers']
    given = left.given and right.given
    if not (left.given or right.given):
        heads = tuple(left.axes[i] for i in batch_l)
        for value, batch in ((left, batch_l), (right, batch_r)):
            rest = tuple(axis for i, axis in enumerate(value.axes) if i not in batch)
            reading.products.append((heads, rest))
    for i, j in zip(contract_l, contract_r, strict=True):
        _meet(reading, equation, left, i, right, j)
    made: list[Part] = []
    for i, j in zip(batch_l, batch_r, strict=True):
        axis = unite(reading.units, left.axes[i], right.axes[j], place(equation))
        sources = left.sources[i] | right.sources[j]
        if not given:
            note_role(reading, sources, 'along')
        made.append((axis, left.zero[i] or right.zero[j], sources if given else NONE))
    for value, other, gone in (
        (left, right, {*contract_l, *batch_l}),
        (right, left, {*contract_r, *batch_r}),
    ):
        made += [_free(reading, value, i, other) for i in range(len(value.axes)) if i not in gone]
    return [made_of(made, given)]


def _conv(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    x, kernel = values
    params, reason = equation.params, place(equation)
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    if params['batch_group_count'] != 1:
        raise Unknown('a convolution of batches in groups')
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    for value, axes in ((x, lhs[2:]), (kernel, rhs[2:])):
        for i in axes:
            fix(reading.units, value.axes[i], f'a side of a window of {reason}')
    sizes = equation.outvars[0].aval.shape
    made: list[Part] = [(fixed(n, f'a side of an image of {reason}'), False, NONE) for n in sizes]
    made[out[0]] = (x.axes[lhs[0]], x.zero[lhs[0]], NONE)
    alone = groups == x.axes[lhs[1]].size == kernel.axes[rhs[0]].size  # depthwise: it makes nothing
    made[out[1]] = _free(reading, kernel, rhs[0], x, 'along' if alone else 'out')
    if groups == 1:
        _meet(reading, equation, x, lhs[1], kernel, rhs[1])
        return [made_of(made, x.given and kernel.given)]
    # Channel (g, i) of group g meets row i of the kernel; output (g, r) belongs to group g.
    channels, outputs = part(x, lhs[1]), part(kernel, rhs[0])
    of_x = _grouped(reading, channels[0], groups, reason)
    of_y = _grouped(reading, outputs[0], groups, reason)
    unite(reading.units, of_x[0], of_y[0], reason)
    if of_x[1].size > 1:
        inside = x._replace(axes=(of_x[1],), zero=channels[1:2], sources=channels[2:])
        _meet(reading, equation, inside, 0, kernel, rhs[1])
    # A group of the kernel is silent where its outputs are zero, or all that it reads is.
    quiet = outputs[1] or (channels[1] and not reading.goes(of_y[1]))
    made[out[1]] = (outputs[0], quiet, made[out[1]][2])
    return [made_of(made, x.given and kernel.given)]


def _grouped(reading: Reading, axis: Axis, groups: int, reason: str) -> list[Axis]:
    """An axis as (groups, inside of a group)."""
    inside = axis.size // groups
    if inside == 1:
        return [axis, Axis(1)]
    return divided(reading.units, axis, [groups, inside], reason)


# --- indexing -----------------------------------------------------------------------------------


def _dynamic_slice(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    value, *starts = values
    made, reason = parts(value), f'indexed by {place(equation)}'
    for i, n in enumerate(equation.params['slice_sizes']):
        axis, *rest = made[i]
        if n == axis.size:
            continue
        if starts[i].number is not None:
            made[i] = (picked(reading.units, axis, slice_at(starts[i].number, n, axis.size)), *rest)
        else:
            fix(reading.units, axis, reason)
            made[i] = (fixed(n, reason), False, NONE)
    return [made_of(made, all(v.given for v in values))]


def slice_at(start: np.ndarray, length: int, size: int) -> slice:
    """Where a dynamic slice lies: JAX moves one that begins too early or late inside."""
    first = int(np.clip(start, 0, size - length))
    return slice(first, first + length)


def _dynamic_update(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    value, update = values[:2]
    made, reason = [], place(equation)
    for i, (axis, zero, _) in enumerate(parts(value)):
        if update.axes[i].size == axis.size:
            axis = unite(reading.units, axis, update.axes[i], reason)
        else:
            fix(reading.units, axis, f'written into by {reason}')
            fix(reading.units, update.axes[i], f'written by {reason}')
        made.append((axis, zero and update.zero[i], NONE))
    return [made_of(made, all(v.given for v in values))]


def _gather(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    value, indices = values
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    batching = set(numbers.operand_batching_dims)
    gone = set(numbers.collapsed_slice_dims) | batching
    reason, given = f'indexed by {place(equation)}', value.given and indices.given
    shape = equation.outvars[0].aval.shape
    made: list[Part] = [(fixed(n, reason), False, NONE) for n in shape]
    others = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for i, j in zip(others, range(len(indices.axes) - 1), strict=True):
        made[i] = (indices.axes[j], False, NONE)
    for i, j in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        axis = unite(reading.units, value.axes[i], indices.axes[j], reason)
        made[others[j]] = (axis, value.zero[i], NONE)
    where = picked_by(equation, indices)
    offsets = iter(numbers.offset_dims)
    for i, axis in enumerate(value.axes):
        if i in gone:
            if i in batching:
                continue
            if where is not None and numbers.start_index_map == (i,):
                at = np.clip(where, 0, axis.size - 1)
                made[others[0]] = (picked(reading.units, axis, at), *part(value, i)[1:])
            else:
                fix(reading.units, axis, reason)
            continue
        out = next(offsets)
        if sizes[i] != axis.size:
            fix(reading.units, axis, reason)
            continue
        one, zero, sources = part(value, i)
        if not given:
            note_role(reading, sources, 'out')
        made[out] = (one, zero, sources if given else NONE)
    return [made_of(made, given)]


def _scatter(reading: Reading, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
    """What is written may only lose indices of the axes that it covers whole."""
    value, indices, update = values
    numbers, reason = equation.params['dimension_numbers'], place(equation)
    batching = dict(
        zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    )
    window = iter(numbers.update_window_dims)
    others = [i for i in range(len(update.axes)) if i not in numbers.update_window_dims]
    given, made = all(v.given for v in values), []
    for j, i in enumerate(others):
        if j not in batching.values():
            fix(reading.units, update.axes[i], f'written by {reason}')
            fix(reading.units, indices.axes[j], f'written by {reason}')
    for i, (axis, zero, sources) in enumerate(parts(value)):
        if i in batching:
            at = others[batching[i]]
            unite(reading.units, indices.axes[batching[i]], axis, reason)
        elif i in numbers.inserted_window_dims:
            fix(reading.units, axis, f'written into by {reason}')
            at = None
        else:
            at = next(window)
        if at is not None and update.axes[at].size == axis.size:
            axis, zero = (
                unite(reading.units, axis, update.axes[at], reason),
                _written_zero(equation.primitive.name, zero, update.zero[at]),
            )
            if not given:
                note_role(reading, sources | update.sources[at], 'along')
        elif at is not None:
            fix(reading.units, axis, f'written into by {reason}')
            fix(reading.units, update.axes[at], f'written by {reason}')
        made.append((axis, zero, NONE))
    return [made_of(made, given)]


def _written_zero(name: str, before: bool, written: bool) -> bool:
    """Is an array still zero where it is written into, or multiplied?"""
    return before or written if name in ('scatter_mul', 'scatter-mul') else before and written


def picked_by(equation: JaxprEqn, indices: Labelled) -> np.ndarray | None:
    """The places that a gather takes along one axis, if they are known and stand in one row."""
    numbers = equation.params['dimension_numbers']
    one_axis = len(numbers.collapsed_slice_dims) == 1 and len(numbers.start_index_map) == 1
    if indices.number is None or numbers.operand_batching_dims or len(indices.axes) != 2:
        return None
    if not one_axis or numbers.start_index_map != numbers.collapsed_slice_dims:
        return None
    where, size = indices.number.ravel(), equation.invars[0].aval.shape[numbers.start_index_map[0]]
    filled = equation.params['mode'] == GatherScatterMode.FILL_OR_DROP
    if filled and ((where < 0) | (where >= size)).any():
        return None  # places outside get a number of their own
    return where


HANDLERS = [
    (frozenset({'dot_general'}), _dot),
    (frozenset({'conv_general_dilated'}), _conv),
    (frozenset({'dynamic_slice'}), _dynamic_slice),
    (frozenset({'dynamic_update_slice'}), _dynamic_update),
    (frozenset({'gather'}), _gather),
    (SCATTERS, _scatter),
]
