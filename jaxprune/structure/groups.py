"""Coupled groups: what must be removed together, read off the traced function.

A group is one channel, neuron, head or dimension of heads with everything that goes along: the
slices that make it, biases and normalisation, statistics, and the slices that read it. It holds for
any function of arrays: layouts, depthwise and grouped convolutions, residual sums and flattened
maps are seen in the operations, never guessed from names, shapes or sizes.

The idea of dependency graphs for pruning is that of DepGraph (Fang et al., 2023, arXiv:2301.12900)
and of zero-invariant groups that of OTO (Chen et al., 2021, arXiv:2107.07467).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.errors import check_choice
from jaxprune.structure.coupling import UNKNOWN, Coupling, coupling, may_go, walk
from jaxprune.structure.function import function_of
from jaxprune.structure.units import Axis, Units, found, units_of
from jaxprune.types import Problem, PyTree

#: What can be removed: 'unit', a neuron or a filter; 'head', of attention; 'head_dim', a dimension
#: of all heads together.
KINDS = ('unit', 'head', 'head_dim')
#: What happens to units that a norm runs over.
NORMALISATIONS = ('refuse', 'sliced')
_ROLES = ('out', 'along', 'in')


class Member(NamedTuple):
    """A slice that goes with each group of a family.

    Attributes:
      path: of the parameter or state.
      axis: of its array.
      role: 'out' (the slice makes the unit), 'in' (it reads it), 'along' (it follows it, as a bias
        or a scale does) or 'state' (a statistic).
      indices: for each group, the indices along the axis.
    """

    path: str
    axis: int
    role: str
    indices: tuple[np.ndarray, ...]


class Family(NamedTuple):
    """Groups that are alike: the channels of a layer, the heads of an attention.

    Attributes:
      name: the path of the first parameter that makes its units; for heads with their kind.
      kind: one of `KINDS`.
      size: how many groups there are.
      members: what goes with each of them.
      reason: why none of them may go; '' if they may.
      zero_invariant: if all 'out' and 'along' slices of a group are zero, the output is exactly
        that of the network without the group.
      units: the groups as `Units` numbers them.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    reason: str
    zero_invariant: bool
    units: tuple[int, ...]


class Coupled(NamedTuple):
    """The coupled groups of a function; `print` shows them as a table.

    Attributes:
      families: groups that are alike, in the order in which the function makes them.
      coupling: how they were found.
    """

    families: tuple[Family, ...]
    coupling: Coupling

    def __str__(self) -> str:
        from jaxprune.structure.group_table import table

        return table(self.families)


def groups(
    apply: Problem | Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    model_state: PyTree = None,
    *,
    normalisation: str = 'refuse',
    unknown: str = 'refuse',
) -> Coupled:
    """Finds what must be removed together.

        print(jp.groups(apply, params, x))

    Args:
      apply: `(params, x) -> outputs`, or `(params, model_state, x)` if there is a state. Any
        function of arrays; evaluation or training mode. Or a `Problem`: its network in evaluation
        mode.
      params: parameters, arrays or shapes.
      x: inputs, arrays or shapes.
      model_state: batch statistics and the like.
      normalisation: 'refuse' keeps every unit that a norm runs over, since without it the others
        would change. 'sliced' lets it go, and the norm runs over what is left: a mean is a sum that
        is divided by the number of units, or multiplied by one over it. Another way to write a
        mean keeps the old count.
      unknown: what an operation does that is not known: 'refuse' raises, 'freeze' keeps all units
        that it touches.

    Raises:
      PruneError: an operation that is not known, with its place.
    """
    apply, model_state = function_of(apply, model_state)
    states = () if model_state is None else (model_state,)

    def forward(params: PyTree, x: PyTree, *states: PyTree) -> PyTree:
        return apply(params, *states, x)

    check_choice('normalisation', normalisation, NORMALISATIONS)
    check_choice('value of unknown=', unknown, UNKNOWN)
    sliced = normalisation == 'sliced'
    read = coupling(forward, params, x, *states, sliced=sliced, unknown=unknown)
    return found_in(read)


def found_in(read: Coupling) -> Coupled:
    """The groups of a function that was read."""
    table = read.units
    for axes in (*read.parameter_axes.values(), *read.state_axes.values()):
        for axis in axes:
            units_of(table, axis)  # what nothing is united with is a unit of its own

    goes = may_go(read)

    def freeze(axis: Axis, where: str) -> None:
        table.freeze(found(axis).units, where)

    def mark(axis: Axis, where: str) -> None:
        table.loud.update(table.parts_of(found(axis).units))

    walk(read, lambda source: True, goes, freeze)
    readers = {source for source, roles in read.roles.items() if roles == {'in'}}
    walk(read, lambda source: source not in readers, goes, mark)
    return Coupled(_families(read), read)


def product_axes(coupled: Coupled, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Path -> the axes of a kernel's inputs and outputs, as the products that use it tell.

    Parameters that have only one of them, or none, are left out: biases, depthwise kernels. Of
    several input axes, or output axes, the last is taken.
    """
    axes: dict[tuple[str, str], list[int]] = {}
    for (path, axis), roles in coupled.coupling.roles.items():
        for role in roles:
            axes.setdefault((path, role), []).append(axis)
    both = [path for path in paths if (path, 'in') in axes and (path, 'out') in axes]
    return {path: (max(axes[path, 'in']), max(axes[path, 'out'])) for path in both}


def _families(read: Coupling) -> tuple[Family, ...]:
    """The groups of all parameters, those that are alike together, in forward order."""
    slices = _slices(read)
    kinds = _kinds(read)
    alike: dict[tuple, list[int]] = {}
    for unit, at in slices.items():
        pattern = tuple((*key, len(where)) for key, where in at.items())
        silent = unit not in read.units.loud
        key = (pattern, read.units.reason(unit), silent, kinds.get(unit, 'unit'))
        alike.setdefault(key, []).append(unit)
    order = {source: i for i, source in enumerate(read.roles)}
    rows = []
    for (pattern, reason, silent, kind), together in alike.items():
        for units in _disjoint(together, slices):
            members = tuple(
                Member(path, axis, role, tuple(slices[unit][path, axis, role] for unit in units))
                for path, axis, role, _ in pattern
            )
            if any(m.role != 'state' for m in members):
                rows.append((members, kind, reason, silent, tuple(units)))
    rows += [(members, 'unit', reason, False, ()) for members, reason in _fixed(read)]

    def first(members: Sequence[Member]) -> tuple[int, str]:
        makers = [m for m in members if m.role == 'out'] or members
        return min((order.get((m.path, m.axis), len(order)), m.path) for m in makers)

    rows.sort(key=lambda row: first(row[0]))
    names: dict[str, int] = {}
    made = []
    for members, kind, reason, silent, units in rows:
        makes = any(m.role == 'out' for m in members)
        if not makes:
            reason = reason or 'no product makes it'
        size = len(members[0].indices)
        if size == 1:
            reason = reason or 'there is only one'
        name = _name(names, first(members)[1], kind if makes else 'read')
        made.append(Family(name, kind, size, members, reason, silent, units))
    return tuple(made)


def _fixed(read: Coupling) -> list[tuple[tuple[Member, ...], str]]:
    """The axes of parameters none of whose indices may go, and why."""
    made: dict[int, tuple[list[Member], str]] = {}
    for (path, i), roles in read.roles.items():
        axis = found(read.parameter_axes[path][i])
        if axis.fixed:
            role = next(r for r in _ROLES if r in roles)
            each = tuple(np.arange(axis.size)[:, None])
            made.setdefault(id(axis), ([], axis.fixed))[0].append(Member(path, i, role, each))
    return [
        (tuple(members), reason)
        for members, reason in made.values()
        if any(m.role != 'along' for m in members)
    ]


def _disjoint(
    units: Sequence[int], slices: Mapping[int, Mapping[tuple[str, int, str], np.ndarray]]
) -> list[list[int]]:
    """Units that share no index with one another, in order: an index belongs to one group."""
    found: list[tuple[list[int], set[int]]] = []
    for unit in sorted(units, key=lambda unit: tuple(next(iter(slices[unit].values())))):
        indices = set(next(iter(slices[unit].values())).tolist())
        for family, taken in found:
            if not taken & indices:
                family.append(unit)
                taken |= indices
                break
        else:
            found.append(([unit], indices))
    return [family for family, _ in found]


def _name(names: dict[str, int], path: str, kind: str) -> str:
    """A name of its own for each family."""
    name = path if kind == 'unit' else f'{path}:{kind}'
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f'{name}:{names[name]}'


def _slices(read: Coupling) -> dict[int, dict[tuple[str, int, str], np.ndarray]]:
    """Unit -> (path, axis, role) -> the indices that go with it, in forward order of use."""
    rows = [
        (path, i, axis, next((r for r in _ROLES if r in roles), ''))
        for path, axes in read.parameter_axes.items()
        for i, axis in enumerate(axes)
        if (roles := read.roles.get((path, i)))
    ]
    order = {source: i for i, source in enumerate(read.roles)}
    rows.sort(key=lambda row: order[row[:2]])
    rows += [
        (path, i, axis, 'state')
        for path, axes in read.state_axes.items()
        for i, axis in enumerate(axes)
    ]
    made: dict[int, dict[tuple[str, int, str], np.ndarray]] = {}
    known: dict[Axis, dict[int, np.ndarray]] = {}
    for path, i, axis, role in rows:
        axis = found(axis)
        if axis.units is None:
            continue
        if axis not in known:
            known[axis] = by_unit(read.units, axis.units)
        for unit, at in known[axis].items():
            made.setdefault(unit, {})[path, i, role] = at
    return made


def by_unit(table: Units, units: np.ndarray) -> dict[int, np.ndarray]:
    """Each unit without parts -> the indices of an axis that go with it, rising."""
    roots = table.roots(units)
    order = np.argsort(roots, kind='stable')
    distinct, starts = np.unique(roots[order], return_index=True)
    alone = len(distinct) == len(order)  # each index a unit: splitting would take longer
    each = order[:, None] if alone else np.split(order, starts[1:])
    made: dict[int, list[np.ndarray]] = {}
    for unit, at in zip(distinct.tolist(), each, strict=True):
        for part in table.parts(unit):
            made.setdefault(part, []).append(at)
    return {
        unit: np.sort(np.concatenate(at)) if len(at) > 1 else at[0] for unit, at in made.items()
    }


def _kinds(read: Coupling) -> dict[int, str]:
    """The units that are heads or dimensions of heads."""
    made: dict[int, str] = {}

    def parts(axes: Sequence[Axis]) -> set[int]:
        units = [axis.units for axis in map(found, axes) if axis.units is not None]
        return {p for own in units for p in read.units.parts_of(own)}

    for parallel, rest in read.products:
        if heads := parts(parallel):
            made |= {part: made.get(part, 'head_dim') for part in parts(rest)}
            made |= dict.fromkeys(heads, 'head')
    return made
